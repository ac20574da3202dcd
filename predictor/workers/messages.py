"""What a parent and a worker say to each other: msgpack over a socket that keeps the bounds of messages (SEQPACKET).

Values lie in shared memory (`slabs`), whose descriptors go with the message that first needs them. The parent asks one
thing at a time, and the worker answers it:

    Make   → Made       import the op and make it
    Bind   → Bound      tell it what it is given
    Open   → Opened     it may be run from now on
    Work   → Done       run it
    any    → Failed     what was asked did not work out
           → Logged     at any time: a line for the parent's log
"""

from typing import Any

import msgspec

from cube.errors import Internal
from predictor.ops.op import Port
from predictor.workers.slabs import Piece

MAX_MESSAGE_BYTES = 64 << 10


class Message(msgspec.Struct, array_like=True, tag=True, tag_field="message", frozen=True):
    """What goes over the socket."""


class Make(Message, frozen=True):
    """An op of a type, module:Class or module:function, with its config."""

    type: str
    config: dict[str, Any]
    place: str  # for messages


class Made(Message, frozen=True):
    """See Op.wanted."""

    wanted: dict[str, Port] | None


class Bind(Message, frozen=True):
    """See Op.bind."""

    inputs: dict[str, Port]


class Bound(Message, frozen=True):
    """See Op.bind."""

    outputs: dict[str, Port]


class Open(Message, frozen=True):
    """See Op.open."""


class Opened(Message, frozen=True):
    """It may be run."""


class Work(Message, frozen=True):
    """A batch."""

    pieces: tuple[Piece, ...]
    rows: int
    deadline: float | None  # time.monotonic(), which is the same in all processes of a machine
    slab_size: int  # of the slab that comes with it and holds batches from now on; 0: the one before does
    freed: tuple[int, ...]  # slabs of results that nobody reads any more


class Done(Message, frozen=True):
    """What the op made."""

    pieces: tuple[Piece, ...]
    used: int  # bytes of the slab that they lie in
    slab: int  # its number; 0: it is for this result only, and comes with it
    slab_size: int  # where the slab comes with it; 0: it came before
    dropped: int  # the number of a slab that will not be used any more; 0: none


class Failed(Message, frozen=True):
    """An error."""

    code: str  # name of a gRPC status code
    text: str
    trace: str  # of a fault; else empty
    unexpected: tuple[str, str, str] | None  # place, found and expected of a BadConfig


class Logged(Message, frozen=True):
    """A line that something in the worker logged."""

    logger: str
    level: int
    text: str


FromParent = Make | Bind | Open | Work
FromWorker = Made | Bound | Opened | Done | Failed | Logged

_encoder = msgspec.msgpack.Encoder()
from_parent: msgspec.msgpack.Decoder[FromParent] = msgspec.msgpack.Decoder(FromParent)
from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encoded(message: Message) -> bytes:
    """Raises Internal for one that is too long, TypeError for one that msgpack has no form of."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise Internal(f"{type(message).__name__}: found {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    return data
