"""What a handler is told of a call, and what it is."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from cube.errors import BadRequest, DeadlineExceeded

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Call:
    """Facts of one call that are not in its message."""

    path: str
    metadata: Mapping[str, str | bytes]  # keys in lower case; values of keys that end in -bin are bytes
    deadline: float | None  # time.monotonic() at which the caller stops waiting; None: never

    def remaining_s(self, at_most: float) -> float:
        """Seconds left, at most `at_most`; raises DeadlineExceeded where none are."""
        if self.deadline is None:
            return at_most
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{self.path}: the deadline passed {-left * 1e3:.0f} ms ago")
        return min(left, at_most)


# Request message in, reply message out. A plain function runs on the event loop: it must be short.
Handler = Callable[[bytes, Call], bytes | Awaitable[bytes]]


def parse(kind: type[M], message: bytes) -> M:
    """Decode a protobuf message; raises BadRequest for bytes that are none."""
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise BadRequest(
            "message", f"{len(message)} bytes that do not parse", f"a {kind.DESCRIPTOR.full_name}"
        ) from error
