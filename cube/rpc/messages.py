"""Protobuf messages whose large `bytes` values are not copied.

protobuf copies a bytes value twice on its way in (wire → message → `bytes` object) and three times on its way out. Of
a call that is answered with a megabyte of rows these copies are most. Here the small fields of a message go through
protobuf proper, and the large values of fields named once, the *lifted* ones, go beside it:

    LOOKUP_REPLY = Spliced(pb.LookupReply, "tables.rows", "tables.found")    # at import: the plan is worked out here

    reply, of = LOOKUP_REPLY.decode(message)           large = Large()
    for table in reply.tables:                         reply.tables.add(dim=16, rows=large.put(array))
        np.frombuffer(of(table.rows), "<f4")           LOOKUP_REPLY.encode(reply, large)    # buffers, sent in order

Reading exchanges each large value of a lifted field for a token of a few bytes and has protobuf parse what that leaves;
`of` gives the view into the message that a token stands for, or the value itself where it was too small to bother.
Writing is the same backwards. So the last of several values, merged sub-messages, maps and oneofs mean what they mean
to protobuf, and what is on the wire is plain protobuf.

Of the wire format only this is known here: where a field begins and ends, and that the size of a sub-message stands
before it. It is enough, because no bytes are a wrong value of a bytes field: a message parses with tokens in it exactly
if it does without. Whatever is not plainly regular protobuf parses whole, and so it does with messages of so many
fields that looking at each would cost more than copying. It has the last word on what is a message and what is none.

A view keeps all of the message it was read from in memory. It may begin at any address: an array over it may be
unaligned.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from cube.rpc.calls import Buffer, parse

M = TypeVar("M", bound=Message)

Value: TypeAlias = Buffer | NDArray[Any]
Plan: TypeAlias = "dict[int, Plan]"  # by tag: what to do with a sub-message; of a lifted field: empty

LARGE_BYTES = 64 << 10  # protobuf copies less than this sooner than it is spliced
INLINE_BYTES = 8 << 10  # between large values: one more buffer costs its sender more than copying so much
FIELD_BYTES = 4 << 10  # of a message for each field that is looked at: bounds what a million tiny fields cost
FEW_FIELDS = 32  # are looked at in any case
MAX_BYTES = (2 << 30) - 1  # of a message, by protobuf's rule

VARINT, FIXED64, LENGTH, GROUP, END_GROUP, FIXED32 = range(6)  # wire types

MARK = os.urandom(16)  # begins every token and nothing else: it is never sent
TOKEN_BYTES = len(MARK) + 4
ONE_BYTE = [bytes((number,)) for number in range(128)]
TOKEN_SIZE = ONE_BYTE[TOKEN_BYTES]


class Spliced(Generic[M]):
    """One kind of message and which of its bytes fields are lifted. Made at import; any thread may use it."""

    __slots__ = ("_kind", "_large_bytes", "_name", "_plan")

    def __init__(self, kind: type[M], *paths: str, large_bytes: int = LARGE_BYTES):
        """paths: "field", or "sub.field" and so on for fields of sub-messages; a map's entries have "key" and "value".

        Values of fewer than `large_bytes` stay in the message. Raises ValueError for paths that do not lead to bytes.
        """
        self._kind, self._name, self._large_bytes = kind, kind.DESCRIPTOR.full_name, large_bytes
        self._plan: Plan = {}
        for path in paths:
            _add(self._plan, kind.DESCRIPTOR, path)

    def decode(self, message: Buffer) -> tuple[M, Callable[[bytes], Buffer]]:
        """A message, and `of`, through which its lifted fields are to be read: of(message.field).

        That is what the peer has sent; if it is large, a view into the bytes. The message is not to be sent on: it has
        tokens in it. Raises BadRequest for bytes that do not parse.
        """
        if len(message) < self._large_bytes:
            return parse(self._kind, message), _itself
        views: dict[bytes, memoryview] = {}

        def lift(value: memoryview) -> list[Buffer]:
            token = _token(len(views))
            views[token] = value
            return [TOKEN_SIZE, token]

        looks = max(FEW_FIELDS, len(message) // FIELD_BYTES)
        try:
            rest = _Exchange(message, self._large_bytes, looks, lift).run(self._plan)
            parsed = self._kind.FromString(b"".join(rest))
        except (_Irregular, IndexError, DecodeError):
            return parse(self._kind, message), _itself
        return parsed, lambda value: views.get(value, value)

    def encode(self, message: M, large: "Large") -> list[Buffer]:
        """The serialised message with the values of `large` in it, as buffers to be sent in order without joining.

        Each of them must have been set to one lifted field; raises ValueError otherwise.
        """
        small = message.SerializeToString()
        if not large.values:
            return [small]
        left = dict(large.values)

        def splice(value: memoryview) -> list[Buffer] | None:
            token = bytes(value) if len(value) == TOKEN_BYTES else b""
            return left.pop(token) if token.startswith(MARK) else None

        try:
            pieces = _Exchange(small, TOKEN_BYTES, len(small), splice).run(self._plan)
        except KeyError as error:
            raise ValueError(f"{self._name}: found a large value twice, or one of another message") from error
        if left:
            raise ValueError(f"{self._name}: found {len(left)} of {len(large.values)} large values in no lifted field")
        size = sum(map(len, pieces))
        if size > MAX_BYTES:
            raise ValueError(f"{self._name}: found {size} bytes, expected {MAX_BYTES} at most")
        return _joined(pieces)


class Large:
    """The large values of one message that is being written."""

    __slots__ = ("_large_bytes", "values")

    def __init__(self, large_bytes: int = LARGE_BYTES):
        """Values of fewer than `large_bytes` are copied into the message."""
        self._large_bytes = large_bytes
        self.values: dict[bytes, list[Buffer]] = {}  # by token: size and pieces, as they are written

    def put(self, value: Value | Sequence[Value]) -> bytes:
        """What to set a lifted field to, so that it has this value when it is encoded; a list is a value in pieces.

        A large value is sent from its own memory, if that has no gaps: it must not change before.
        """
        if isinstance(value, np.ndarray) and value.nbytes < self._large_bytes:
            return value.tobytes()  # sooner than a view of it does
        several: Sequence[Any] = value if isinstance(value, (list, tuple)) else (value,)
        pieces = [memoryview(piece) for piece in several]
        if sum(piece.nbytes for piece in pieces) < self._large_bytes:
            return b"".join([piece.tobytes() for piece in pieces])
        token = _token(len(self.values))
        flat = [_flat(piece) for piece in pieces]
        self.values[token] = [varint(sum(map(len, flat))), *flat]
        return token


class _Irregular(Exception):
    """Bytes that protobuf is to judge."""


class _Exchange:
    """Walks through one message and exchanges values of lifted fields."""

    __slots__ = ("_exchange", "_kept", "_least", "_looks", "_message", "_pieces", "_view")

    def __init__(self, message: Buffer, least: int, looks: int, exchange: Callable[[memoryview], list[Buffer] | None]):
        """exchange: of a value of `least` bytes or more, size and value in its place, or None; looks: most fields."""
        self._message, self._view = message, memoryview(message)
        self._least, self._looks, self._exchange = least, looks, exchange
        self._pieces: list[Buffer] = []
        self._kept = 0  # where what is not yet in pieces begins

    def run(self, plan: Plan) -> list[Buffer]:
        """The pieces of the new message. Raises _Irregular, and IndexError where the bytes end too early."""
        self._walk(plan, 0, len(self._message))
        self._pieces.append(self._view[self._kept :])
        return self._pieces

    def _walk(self, plan: Plan, at: int, stop: int) -> int:
        """Exchange within message[at:stop]; returns by how many bytes that has grown."""
        message, least, looks = self._message, self._least, self._looks
        grown = groups = 0
        while at < stop:
            looks -= 1
            if looks < 0:
                raise _Irregular
            tag = message[at]
            at += 1
            if tag > 127:
                tag, at = _long_varint(message, at, tag)
            wire = tag & 7
            if wire == LENGTH:
                sized = at
                size = message[at]
                at += 1
                if size > 127:
                    size, at = _long_varint(message, at, size)
                end = at + size
                if end > stop:
                    raise _Irregular
                if size >= least and tag in plan and not groups:
                    self._looks = looks
                    grown += self._exchanged(plan[tag], sized, at, end)
                    looks = self._looks
                at = end
            elif wire == VARINT:
                if message[at] > 127:
                    last = at + 9
                    while message[at] > 127:
                        if at == last:
                            raise _Irregular
                        at += 1
                at += 1
            elif wire == FIXED64:
                at += 8
            elif wire == FIXED32:
                at += 4
            elif wire == GROUP:  # its fields follow, and none of them is meant by the plan
                groups += 1
            elif wire == END_GROUP:
                groups -= 1
            else:
                raise _Irregular
        if at != stop or groups:
            raise _Irregular
        self._looks = looks
        return grown

    def _exchanged(self, plan: Plan, sized: int, at: int, end: int) -> int:
        """Exchange message[at:end], whose size stands at `sized`, or what is in it; returns as _walk does."""
        pieces = self._pieces
        if not plan:
            new = self._exchange(self._view[at:end])
            if new is None:
                return 0
            pieces.append(self._view[self._kept : sized])
            pieces += new
            self._kept = end
            return sum(map(len, new)) - (end - sized)
        place = len(pieces) + 1
        pieces += (self._view[self._kept : sized], b"")
        self._kept = at
        grown = self._walk(plan, at, end)
        pieces[place] = size = varint(end - at + grown)
        return len(size) + grown - (at - sized)


def _long_varint(message: Buffer, at: int, byte: int) -> tuple[int, int]:
    """A tag or size that does not end with its first byte, and where it ends."""
    number, shift = byte & 127, 7
    while True:
        byte = message[at]
        at += 1
        if byte < 128:
            break
        number |= (byte & 127) << shift
        shift += 7
        if shift > 63:
            raise _Irregular
    number |= byte << shift
    if number >> 32:
        raise _Irregular
    return number, at


def varint(number: int) -> bytes:
    """A number, not below 0, as protobuf writes it."""
    if number < 128:
        return ONE_BYTE[number]
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _token(number: int) -> bytes:
    return MARK + number.to_bytes(4, "little")


def _itself(value: bytes) -> Buffer:
    return value


def _flat(view: memoryview) -> memoryview:
    """The same bytes, of which len() is the number."""
    try:
        return view.cast("B")
    except TypeError:  # gaps, another order, or elements that Python has no name for
        return memoryview(view.tobytes())


def _joined(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in fewer buffers."""
    out: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        if len(piece) < INLINE_BYTES:
            small.append(piece)
        else:
            out += (b"".join(small), piece)
            small = []
    out.append(b"".join(small))
    return [buffer for buffer in out if buffer]


def _add(plan: Plan, owner: Any, path: str) -> None:
    """Add the way to a field of the message `owner`."""
    name, _, below = path.partition(".")
    place, field = f"{owner.full_name}.{name}", owner.fields_by_name.get(name)
    if field is None:
        raise ValueError(f"{place}: found no such field, expected one of {', '.join(owner.fields_by_name)}")
    if field.type != (FieldDescriptor.TYPE_MESSAGE if below else FieldDescriptor.TYPE_BYTES):
        raise ValueError(f"{place}: found another type, expected {'a message' if below else 'bytes'}")
    tag = field.number << 3 | LENGTH
    if below:
        _add(plan.setdefault(tag, {}), field.message_type, below)
    else:
        plan[tag] = {}
