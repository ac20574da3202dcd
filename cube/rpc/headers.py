"""Header blocks of HTTP/2: HPACK (RFC 7541) both ways, and what RFC 9113 §8 demands of the fields in them.

Why it is fast. A peer sends the same block again and again, so a block is decoded once and found by its bytes from
then on: for as long as the dynamic table stands still if it refers to that table, for ever if it does not. Clients
that put an ever changing field into the table (grpc-go and grpc-js do that with `grpc-timeout`) never repeat a block;
for them the fields are decoded each time, but what follows from the stable ones (validation, and whatever the layer
above works out) is found by those fields. All caches are bounded and die with their connection.

Sending uses no dynamic table: constant blocks are made once, which is cheaper than any compression.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from hpack.exceptions import HPACKError
from hpack.hpack import decode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

Field = tuple[bytes, bytes]

TABLE_BYTES = HeaderTable.DEFAULT_SIZE  # what RFC 9113 §6.5.2 gives a peer that is not told otherwise; we never are
CACHED = 256  # blocks, and shapes, kept for one connection
CACHED_BLOCK_BYTES = 2_048  # a longer block is not worth its memory

# Fields that differ from call to call in real traffic; all others are the stable part of a head.
VOLATILE = frozenset(
    (
        b"grpc-timeout", b"content-length", b"traceparent", b"tracestate", b"baggage", b"grpc-trace-bin",
        b"grpc-tags-bin", b"x-request-id", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"date",
        b"grpc-message", b"grpc-status-details-bin",
    )
)  # fmt: skip

_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_RESPONSE_PSEUDO = frozenset((b":status",))
_CONNECTION_SPECIFIC = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
# RFC 9113 §8.2.1: no NUL, CR or LF anywhere, no white space at the ends.
_VALUE = re.compile(rb"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?")
_TEXT = re.compile(rb"[^\0\r\n]*")  # gRPC's messages may have spaces at the ends

_STATIC = HeaderTable.STATIC_TABLE
_STATIC_SIZE = len(_STATIC)


class CompressionError(Exception):
    """A block that is not HPACK. The connection cannot go on: its compression state is lost."""


class TooLarge(Exception):
    """A header list over the limit."""


class Shape:
    """What follows from the stable fields of a block, worked out once for all blocks that share them."""

    __slots__ = (
        "authority", "bad_head", "bad_trailers", "method", "note", "path", "pseudo_fields", "scheme", "status",
    )  # fmt: skip

    def __init__(self, fields: Iterable[Field], is_request: bool):
        pseudo: dict[bytes, bytes] = {}
        problem, host = "", None
        known = _REQUEST_PSEUDO if is_request else _RESPONSE_PSEUDO
        regular = False
        for name, value in fields:
            if name[:1] == b":":
                if regular:
                    problem = problem or f"{_text(name)} after a regular field"
                if name not in known or name in pseudo:
                    problem = problem or f"{_text(name)} unknown or repeated"
                pseudo[name] = value
            else:
                regular = True
                problem = problem or _problem_of_name(name, value)
                if name == b"host":
                    host = value
            if not _VALUE.fullmatch(value):
                problem = problem or f"{_text(name)}: a value with control characters or white space at its ends"
        self.method, self.scheme = pseudo.get(b":method"), pseudo.get(b":scheme")
        self.path, self.authority = pseudo.get(b":path"), pseudo.get(b":authority")
        self.status = pseudo.get(b":status")
        self.pseudo_fields = len(pseudo)
        self.note: Any = None  # the layer above keeps here what it made of this shape
        self.bad_trailers = problem or ("a pseudo-field in trailers" if pseudo else "")
        self.bad_head = problem or (self._bad_request(host) if is_request else self._bad_response())

    def _bad_request(self, host: bytes | None) -> str:
        if self.method == b"CONNECT":
            if self.scheme is not None or self.path is not None or not self.authority:
                return "CONNECT with :scheme or :path, or without :authority"
            return ""
        if not self.method or not self.scheme or not self.path:
            return ":method, :scheme or :path missing or empty"
        if not self.path.startswith(b"/") and self.path != b"*":
            return ":path that does not start with /"
        if host is not None and self.authority is not None and host != self.authority:
            return "host that differs from :authority"
        return ""

    def _bad_response(self) -> str:
        status = self.status
        return "" if status is not None and len(status) == 3 and status.isdigit() else ":status missing or no number"


class Head(NamedTuple):
    """One decoded block."""

    fields: tuple[Field, ...]  # all of them, pseudo-fields included, in order
    shape: Shape
    volatile: tuple[Field, ...]  # those of VOLATILE
    content_length: int | None
    bad: str  # why it is malformed, whichever part of a message it is; empty if it is not
    is_plain: bool  # a well-formed head of a request or a final response that does not announce its length

    @property
    def method(self) -> bytes | None:
        return self.shape.method

    @property
    def path(self) -> bytes | None:
        return self.shape.path

    @property
    def scheme(self) -> bytes | None:
        return self.shape.scheme

    @property
    def authority(self) -> bytes | None:
        return self.shape.authority

    @property
    def status(self) -> bytes | None:
        return self.shape.status


class Decoder:
    """Blocks of one direction of one connection, in order."""

    def __init__(self, is_request: bool, max_list_bytes: int):
        """is_request: whether the blocks are requests (else responses); max_list_bytes: as RFC 9113 §6.5.2 counts."""
        self._is_request, self._most = is_request, max_list_bytes
        self._table = HeaderTable()
        self.lasting: dict[bytes, Head] = {}  # blocks that do not refer to the dynamic table
        self._passing: dict[bytes, Head] = {}  # blocks that do: forgotten when it changes
        self._shapes: dict[tuple[Field, ...], Shape] = {}

    def decode(self, block: bytes) -> Head:
        """Decode one whole block. Raises CompressionError, TooLarge."""
        head = self.lasting.get(block) or self._passing.get(block)  # `or`: a Head is never empty
        if head is not None:
            return head
        try:
            fields, changed, referred = self._fields(block)
        except (HPACKError, IndexError) as error:
            raise CompressionError(str(error)) from error
        if changed:
            self._passing.clear()
        is_small = len(block) <= CACHED_BLOCK_BYTES
        head = self._head(tuple(fields), is_small)
        if not changed and is_small:
            cache = self._passing if referred else self.lasting
            if len(cache) >= CACHED:
                cache.clear()
            cache[block] = head
        return head

    def _fields(self, block: bytes) -> tuple[list[Field], bool, bool]:
        """The fields, whether the table has changed, whether it was referred to. RFC 7541 §6."""
        table, dynamic = self._table, self._table.dynamic_entries
        fields: list[Field] = []
        changed = referred = False
        at, end, room = 0, len(block), self._most
        while at < end:
            first = block[at]
            if first >= 0x80:  # §6.1 indexed
                if first == 0xFF:
                    index, used = decode_integer(block[at : at + 12], 7)
                    at += used
                else:
                    index = first & 0x7F
                    at += 1
                if 0 < index <= _STATIC_SIZE:
                    field = _STATIC[index - 1]
                else:
                    field = table.get_by_index(index)
                    referred = True
            elif first & 0xE0 == 0x20:  # §6.3 table size update
                if fields:
                    raise CompressionError("a table size update after a field")
                size, used = decode_integer(block[at : at + 12], 5)
                if size > TABLE_BYTES:
                    raise CompressionError(f"a table of {size} bytes, where {TABLE_BYTES} are allowed")
                table.maxsize = size
                changed = True
                at += used
                continue
            else:  # §6.2 literal: added to the table (01), or not (0000 and 0001)
                prefix = 6 if first >= 0x40 else 4
                index = first & ((1 << prefix) - 1)
                if index:
                    if index == (1 << prefix) - 1:
                        index, used = decode_integer(block[at : at + 12], prefix)
                    else:
                        used = 1
                    at += used
                    if index <= _STATIC_SIZE:
                        name = _STATIC[index - 1][0]
                    else:
                        name = table.get_by_index(index)[0]
                        referred = True
                else:
                    name, at = _string(block, at + 1)
                value, at = _string(block, at)
                field = (name, value)
                if prefix == 6:
                    table.add(name, value)
                    changed = True
            room -= 32 + len(field[0]) + len(field[1])
            if room < 0:
                raise TooLarge(f"a header list of more than {self._most} bytes")
            fields.append(field)
        return fields, changed, referred or bool(changed and dynamic)

    def _head(self, fields: tuple[Field, ...], keep: bool) -> Head:
        volatile = tuple([field for field in fields if field[0] in VOLATILE])
        stable = tuple([field for field in fields if field[0] not in VOLATILE]) if volatile else fields
        shape = self._shapes.get(stable)
        if shape is None:
            shape = Shape(stable, self._is_request)
            if keep:
                if len(self._shapes) >= CACHED:
                    self._shapes.clear()
                self._shapes[stable] = shape
        length, bad = None, ""
        for name, value in volatile:
            allowed = _TEXT if name == b"grpc-message" else _VALUE
            if not allowed.fullmatch(value):
                bad = f"{_text(name)}: a value with control characters or white space at its ends"
            elif name == b"content-length":
                if not value.isdigit() or len(value) > 18 or length not in (None, int(value)):
                    bad = "content-length that is no number, or two that differ"
                else:
                    length = int(value)
        if volatile and fields.index(volatile[0]) < shape.pseudo_fields:
            bad = "a pseudo-field after a regular field"
        status = shape.status
        is_plain = not bad and not shape.bad_head and length is None and (status is None or status[:1] != b"1")
        return Head(fields, shape, volatile, length, bad, is_plain)


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """A string literal (RFC 7541 §5.2) at `at`, and where the next thing starts."""
    first = block[at]
    if first & 0x7F == 0x7F:
        size, used = decode_integer(block[at : at + 12], 7)
    else:
        size, used = first & 0x7F, 1
    at += used
    if at + size > len(block):
        raise CompressionError("a string that ends after its block")
    text = block[at : at + size]
    return (decode_huffman(text) if first & 0x80 else text), at + size


def _problem_of_name(name: bytes, value: bytes) -> str:
    if not _NAME.fullmatch(name):
        return f"{_text(name)}: not a field name in lower case"
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
        return f"{_text(name)}: a field of HTTP/1.1 connections"
    return ""


def _text(name: bytes) -> str:
    return repr(name[:50])[1:]


def encode(fields: Iterable[Field]) -> bytes:
    """A block that leaves the peer's dynamic table alone: static entries, and literals that are not added to it."""
    out = bytearray()
    for name, value in fields:
        index, values = HeaderTable.STATIC_TABLE_MAPPING.get(name, (0, {}))
        exact = values.get(value)
        if exact is not None and value:
            out.append(0x80 | exact)
            continue
        _put_integer(out, 0x00, 4, index)
        if not index:
            _put_integer(out, 0x00, 7, len(name))
            out += name
        _put_integer(out, 0x00, 7, len(value))
        out += value
    return bytes(out)


def _put_integer(out: bytearray, first: int, prefix: int, number: int) -> None:
    """RFC 7541 §5.1."""
    most = (1 << prefix) - 1
    if number < most:
        out.append(first | number)
        return
    out.append(first | most)
    number -= most
    while number >= 0x80:
        out.append(0x80 | number & 0x7F)
        number >>= 7
    out.append(number)
