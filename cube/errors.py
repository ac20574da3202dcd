"""What can go wrong, and what each side is told.

ServingError
 ├─ BadRequest         the caller must change the request
 ├─ NotServed          no such model, table or version here
 ├─ Overloaded         try again, or elsewhere; OutOfMemory: or with less at once
 ├─ ShardUnavailable   a shard did not answer
 ├─ DeadlineExceeded   the caller's time is up
 ├─ DataCorrupt        bytes on disk or wire are not what was written
 ├─ BadData            a data file holds something it must not; only commands meet it
 ├─ FailedPrecondition not as things stand at the server
 ├─ Unauthenticated    no token, or one that the server does not know
 ├─ BadConfig          flags, environment and files do not make a server; only start-up meets it
 └─ Internal           a fault of ours; the details are in the server's log, not in the reply

A message names the place first, then what was found and what was expected. The status codes live here and nowhere
else: doors and channels translate by `ServingError.wire`, nothing parses a message.
"""

from typing import NamedTuple


class Wire(NamedTuple):
    """How an error leaves the process."""

    grpc: str  # name of a gRPC status code: this module needs no grpc
    http: int
    retry: bool  # may a client send the same request again?


class Status(NamedTuple):
    """How a call ended, exactly as the peer said it."""

    code: str  # name of a gRPC status code
    message: str
    details: bytes = b""  # grpc-status-details-bin: by custom a google.rpc.Status


class ServingError(Exception):
    """Base of everything this project raises on purpose. Its text is one line and safe to show to the caller."""

    wire = Wire("INTERNAL", 500, retry=False)
    # What only an error that came over the wire knows: the type above is our reading of `status`.
    status: Status | None = None
    trailing: tuple[tuple[str, str | bytes], ...] = ()  # metadata that came with it
    never_processed = False  # the server did nothing with the call: any call may be sent again


def _short(text: str, most: int = 300) -> str:
    """A part of a message, cut: names come from callers, and a status that is too long is lost on the way."""
    return text if len(text) <= most else f"{text[: most - 20]}… ({len(text)} characters)"


class _Unexpected(ServingError):
    """An error of the form place, found, expected."""

    def __init__(self, place: str, found: object, expected: object):
        self.place, self.found, self.expected = _short(place), _short(str(found)), _short(str(expected))
        super().__init__(f"{self.place}: found {self.found}, expected {self.expected}")


class BadRequest(_Unexpected):
    """The request can never succeed as it stands."""

    wire = Wire("INVALID_ARGUMENT", 400, retry=False)


class BadData(_Unexpected):
    """A line of a data file, an array file or an argument of a command is not what it must be."""

    wire = Wire("INVALID_ARGUMENT", 400, retry=False)


class BadConfig(_Unexpected):
    """A server cannot start with what it was given."""

    wire = Wire("FAILED_PRECONDITION", 412, retry=False)


class DataCorrupt(_Unexpected):
    """Bytes on disk or on the wire are not what was written."""

    wire = Wire("DATA_LOSS", 500, retry=False)


class NotServed(ServingError):
    """No such model, table or version here. `served` is what there is."""

    wire = Wire("NOT_FOUND", 404, retry=False)

    def __init__(self, what: str, served: list[str]):
        super().__init__(f"{_short(what)}: not served here, which serves {_short(', '.join(served) or 'none')}")
        self.what, self.served = what, served


class Overloaded(ServingError):
    """A limit on what may be in flight is reached."""

    wire = Wire("RESOURCE_EXHAUSTED", 429, retry=True)


class OutOfMemory(Overloaded):
    """Memory is short for this much at once; less may do."""


class ShardUnavailable(ServingError):
    """Shard `shard` did not answer."""

    wire = Wire("UNAVAILABLE", 503, retry=True)

    def __init__(self, shard: int, endpoint: str, cause: object):
        super().__init__(f"cube shard {shard}: no answer from {endpoint} ({cause})")
        self.shard, self.endpoint = shard, endpoint


class Unavailable(ServingError):
    """Nothing answers at an endpoint, or what answers is shutting down."""

    wire = Wire("UNAVAILABLE", 503, retry=True)


class DeadlineExceeded(ServingError):
    """The caller's deadline passed before the answer was there."""

    wire = Wire("DEADLINE_EXCEEDED", 504, retry=False)


class Unimplemented(ServingError):
    """A method or a feature that is not here."""

    wire = Wire("UNIMPLEMENTED", 501, retry=False)


class FailedPrecondition(ServingError):
    """Right in itself, but not as things stand there: the wrong shard, a version that is in use."""

    wire = Wire("FAILED_PRECONDITION", 412, retry=False)


class Unauthenticated(ServingError):
    """The server wants to see a token that it knows."""

    wire = Wire("UNAUTHENTICATED", 401, retry=False)


class Internal(ServingError):
    """A fault of ours."""


_BY_STATUS: dict[str, type[ServingError]] = {
    "INVALID_ARGUMENT": BadRequest,
    "NOT_FOUND": NotServed,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "DATA_LOSS": DataCorrupt,
    "UNIMPLEMENTED": Unimplemented,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNAUTHENTICATED": Unauthenticated,
}


def from_wire(
    status: str,
    message: str,
    details: bytes = b"",
    trailing: tuple[tuple[str, str | bytes], ...] = (),
    never_processed: bool = False,
) -> ServingError:
    """The error a peer meant by a gRPC status name and message.

    Its type and text travel, and what `status` and `trailing` hold; the facts a local error has as attributes do not.
    """
    kind = _BY_STATUS.get(status, Internal)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.status = Status(status, message, details)
    error.trailing, error.never_processed = trailing, never_processed
    return error


FAULT = Status("INTERNAL", "internal error; the server's log has it")
MAX_MESSAGE_BYTES = 4 << 10  # of a status message as it is sent; all trailers together must pass peers that take 8 KB


def to_wire(error: Exception) -> Status:
    """What a caller is told of an error. One that is not a ServingError is a fault: it belongs into the log."""
    if not isinstance(error, ServingError):
        return FAULT
    code, told = error.wire.grpc, error.status
    # Details repeat the code: those of an upstream's status that has become another one here would contradict it.
    return Status(code, _sendable(str(error)), told.details if told is not None and told.code == code else b"")


def _sendable(text: str) -> str:
    """A status message, cut to what header fields can carry."""
    if len(text) <= MAX_MESSAGE_BYTES // 12:  # the usual case: a character takes at most 12
        return text.encode("utf-8", "replace").decode()  # lone surrogates
    text = text.encode("utf-8", "replace").decode()
    used = kept = 0
    for character in text[: MAX_MESSAGE_BYTES + 1]:
        used += _sent_bytes(character)
        kept += used <= MAX_MESSAGE_BYTES - _sent_bytes("…")
    return text if used <= MAX_MESSAGE_BYTES else text[:kept] + "…"


def _sent_bytes(character: str) -> int:
    """Bytes of a character when it is percent-encoded."""
    return 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
