"""What a handler is, and what it is told of a call: the same behind every door.

A handler sees messages as bytes and a `Call`, never a transport's objects. Four kinds, as in gRPC:

    unary           handler(request, call) -> Reply                   or a coroutine of one
    server stream   handler(request, call) -> async iterator of Reply    (an async generator function)
    client stream   handler(requests, call) -> coroutine of Reply
    both            handler(requests, call) -> async iterator of Reply

A request is `bytes`, or a `memoryview` of a large one; `requests` is an async iterator of them. A plain unary function
runs at once on the event loop, with no task: it must be short. Coroutines of callers that have gone, or whose deadline
has passed, are cancelled.
"""

import enum
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from cube.errors import BadRequest, DeadlineExceeded, ServingError, Status, Wire

M = TypeVar("M", bound=Message)

Buffer = bytes | bytearray | memoryview
Reply = Buffer | Sequence[Buffer]  # a list is one message, sent without joining; numpy arrays will do for buffers
Field = tuple[str, str | bytes]

GRPC_CODES = {
    "OK": 0, "CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6, "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9, "ABORTED": 10,
    "OUT_OF_RANGE": 11, "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14, "DATA_LOSS": 15, "UNAUTHENTICATED": 16,
}  # fmt: skip
# What a door that speaks plain HTTP answers instead.
_HTTP = {
    "CANCELLED": 499, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404, "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 412, "ABORTED": 409,
    "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503, "UNAUTHENTICATED": 401,
}  # fmt: skip


class StatusError(ServingError):
    """A handler's way to answer any gRPC status, with details if it has some."""

    def __init__(self, code: str, message: str, details: bytes = b""):
        """code: a name of GRPC_CODES, not OK; details: a serialised google.rpc.Status, sent as it is."""
        if code not in GRPC_CODES or code == "OK":
            raise ValueError(f"status code {code!r}")
        super().__init__(message)
        self.wire = Wire(code, _HTTP.get(code, 500), retry=code == "UNAVAILABLE")
        self.status = Status(code, message, details)


class Call:
    """Facts of one call that are not in its messages, and what a handler may say beside them."""

    cancelled = False  # the caller has gone
    compression: str | None = None  # of the replies: "gzip" or "deflate", if the caller accepts it
    _metadata: dict[str, str | bytes] | None = None
    _initial: list[Field] | None = None
    _trailing: list[Field] | None = None

    def __init__(self, path: str, fields: tuple[Field, ...] | None = (), deadline: float | None = None, peer: str = ""):
        self.path = path
        self.deadline = deadline  # time.monotonic() at which the caller stops waiting; None: never
        self.peer = peer
        self._fields = fields  # None: see _decoded

    @property
    def fields(self) -> tuple[Field, ...]:
        """The caller's metadata in order, names in lower case, values of names that end in -bin as bytes."""
        if self._fields is None:
            self._fields = self._decoded()
        return self._fields

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The same by name; of repeated names the last."""
        if self._metadata is None:
            self._metadata = dict(self.fields)
        return self._metadata

    @property
    def initial_metadata(self) -> list[Field]:
        """To append to before the first reply: sent in front of it."""
        if self._initial is None:
            self._initial = []
        return self._initial

    @property
    def trailing_metadata(self) -> list[Field]:
        """To append to before the end of the call: sent with its status."""
        if self._trailing is None:
            self._trailing = []
        return self._trailing

    def remaining_s(self, at_most: float) -> float:
        """Seconds left, at most `at_most`; raises DeadlineExceeded where none are."""
        if self.deadline is None:
            return at_most
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{self.path}: the deadline passed {-left * 1e3:.0f} ms ago")
        return min(left, at_most)

    def _decoded(self) -> tuple[Field, ...]:
        """For doors that decode metadata only when they are asked for."""
        raise NotImplementedError


class Kind(enum.Enum):
    """How many messages go each way."""

    UNARY = "unary"
    SERVER_STREAM = "server stream"
    CLIENT_STREAM = "client stream"
    BIDI = "bidi"

    @property
    def takes_stream(self) -> bool:
        """Whether the caller sends any number of messages."""
        return self in (Kind.CLIENT_STREAM, Kind.BIDI)

    @property
    def gives_stream(self) -> bool:
        """Whether the handler does."""
        return self in (Kind.SERVER_STREAM, Kind.BIDI)


Handler = Callable[[Any, Call], Reply | Awaitable[Reply] | AsyncIterator[Reply]]


@dataclass(frozen=True, slots=True)
class Method:
    """A handler and what a door must know of it."""

    handler: Handler
    kind: Kind = Kind.UNARY
    max_request_bytes: int | None = None  # of one message; None: the door's own limit


Handlers = Mapping[str, Handler | Method]  # by full path, /package.Service/Method; a bare function is unary


def as_method(handler: Handler | Method) -> Method:
    """A bare function is a unary method."""
    return handler if isinstance(handler, Method) else Method(handler)


def parse(kind: type[M], message: Buffer) -> M:
    """Decode a protobuf message; raises BadRequest for bytes that are none."""
    try:
        return kind.FromString(message)  # type: ignore[arg-type]  # any buffer will do
    except DecodeError as error:
        raise BadRequest(
            "message", f"{len(message)} bytes that do not parse", f"a {kind.DESCRIPTOR.full_name}"
        ) from error
