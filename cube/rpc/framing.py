"""What gRPC puts into HTTP/2: length-prefixed messages, compression, metadata, time-outs, status. Pure functions.

Source: the protocol's description, doc/PROTOCOL-HTTP2.md and doc/compression.md of gRPC.
"""

import base64
import binascii
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any
from urllib.parse import quote, unquote

from cube.errors import BadRequest, Internal, Overloaded, ServingError, Unimplemented, Wire
from cube.rpc.calls import GRPC_CODES, Buffer, Field, Reply

PREFIX = Struct(">BI")  # is it compressed, how many bytes
LARGE = 64 << 10  # a message of so many bytes is not copied where a view will do
ENCODINGS = ("identity", "deflate", "gzip")
ACCEPTED = ", ".join(ENCODINGS).encode()
CODE_NAMES = {str(code).encode(): name for name, code in GRPC_CODES.items()}

_WBITS = {"gzip": 31, "deflate": 15}  # gRPC's deflate is zlib's format
_UNITS = {0x48: 3600.0, 0x4D: 60.0, 0x53: 1.0, 0x6D: 1e-3, 0x75: 1e-6, 0x6E: 1e-9}  # H M S m u n
_NAME, _PRINTABLE = re.compile(r"[0-9a-z_.-]+"), re.compile(r"[ -~]*")
# Fields of a head that are the protocol's, not the caller's.
_RESERVED = frozenset(
    (
        b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding",
        b"grpc-message-type", b"grpc-status", b"grpc-message", b"grpc-status-details-bin",
    )
)  # fmt: skip


class MessageTooLarge(Overloaded):
    """A message over the limit."""

    wire = Wire("RESOURCE_EXHAUSTED", 413, retry=False)

    def __init__(self, size: int, most: int):
        super().__init__(f"a message of {size} bytes, where at most {most} are accepted")


# ---- messages ----


def frame(reply: Reply) -> tuple[list[Buffer], int]:
    """A message as buffers of bytes, its prefix first and nothing copied, and its size with the prefix."""
    if isinstance(reply, (list, tuple)):
        parts = [part if type(part) is bytes else octets(part) for part in reply]
        size = sum(map(len, parts))
    else:
        part = reply if type(reply) is bytes else octets(reply)
        parts, size = [part], len(part)
    return [PREFIX.pack(0, size), *parts], size + 5


def compressed(reply: Reply, encoding: str) -> tuple[list[Buffer], int]:
    """The same, compressed with "gzip" or "deflate"."""
    press = zlib.compressobj(6, zlib.DEFLATED, _WBITS[encoding])
    parts = reply if isinstance(reply, (list, tuple)) else [reply]
    body = b"".join([*[press.compress(octets(part)) for part in parts], press.flush()])
    return [PREFIX.pack(1, len(body)), body], len(body) + 5


def octets(buffer: Any) -> Buffer:
    """Any C-contiguous buffer, such as a numpy array, as one of bytes."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return b""  # memoryview cannot cast shapes with a zero
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class Messages:
    """Whole messages out of the bytes of DATA frames, however they are split."""

    __slots__ = ("_body", "_head", "_left", "_most", "_pressed", "encoding", "held")

    def __init__(self, most: int, encoding: str = "identity"):
        """most: bytes of a message, before and after decompression."""
        self.encoding = encoding
        self.held = 0  # bytes of the message that is not whole yet
        self._most = most
        self._head = b""  # of a prefix that is not whole yet
        self._body: bytearray | None = None
        self._left = 0
        self._pressed = 0

    @property
    def is_between(self) -> bool:
        """Whether no message has begun."""
        return self._body is None and not self._head

    def feed(self, data: Buffer) -> Iterator[Buffer]:
        """The messages that are whole with `data`, one by one: a compressed one is expanded when it is asked for.

        To be iterated to its end. Raises MessageTooLarge, Internal for what is no message.
        """
        at, end = 0, len(data)
        while True:
            if self._body is None:
                if self._head:
                    need = 5 - len(self._head)
                    self._head += bytes(data[at : at + need])
                    at = min(at + need, end)
                    if len(self._head) < 5:
                        return
                    pressed, size = PREFIX.unpack(self._head)
                    self._head = b""
                elif end - at < 5:
                    self._head = bytes(data[at:])
                    return
                else:
                    pressed, size = PREFIX.unpack_from(data, at)
                    at += 5
                # What does not compress grows a little: the limit is on the message, not on what carries it.
                if size > (self._most + (self._most >> 8) + 64 if pressed else self._most):
                    raise MessageTooLarge(size, self._most)
                if size <= end - at:
                    yield self._whole(pressed, piece(data, at, at + size))
                    at += size
                    continue
                self._body, self._left, self._pressed = bytearray(), size, pressed
            # No memory is set aside for what a prefix promises: the array grows with what has come (and grows in
            # place: a large realloc moves pages, not bytes).
            part = data[at : at + self._left]
            self._body += part
            at += len(part)
            self._left -= len(part)
            self.held = len(self._body)
            if self._left:
                return
            body, self._body, self.held = self._body, None, 0
            yield self._whole(self._pressed, memoryview(body) if len(body) >= LARGE else bytes(body))

    def _whole(self, pressed: int, body: Buffer) -> Buffer:
        if not pressed:
            return body
        if pressed != 1:
            raise Internal(f"a message flagged {pressed}, where 0 or 1 was expected")
        if self.encoding not in _WBITS:
            raise Internal("a compressed message in a call without grpc-encoding")
        return _inflated(body, _WBITS[self.encoding], self._most)


def piece(data: Buffer, start: int, stop: int) -> Buffer:
    """A message within received bytes: copied if small, a view if large."""
    if stop - start < LARGE:
        return bytes(data[start:stop])
    return memoryview(data)[start:stop]


def _inflated(body: Buffer, wbits: int, most: int) -> bytes:
    parts, left, rest = [], most, bytes(body)
    try:
        while True:
            inflate = zlib.decompressobj(wbits)
            parts.append(inflate.decompress(rest, left + 1))
            left -= len(parts[-1])
            if left < 0:
                raise MessageTooLarge(most - left, most)
            if not inflate.eof:
                raise Internal("a compressed message that is cut off")
            rest = inflate.unused_data
            if not rest or wbits != _WBITS["gzip"]:  # gzip may have several members
                return b"".join(parts)
    except zlib.error as error:
        raise Internal(f"a compressed message that is damaged: {error}") from error


# ---- metadata ----


def encode_metadata(metadata: Iterable[Field]) -> list[tuple[bytes, bytes]]:
    """Metadata as header fields. Raises BadRequest for a name or a value that cannot be sent."""
    fields = []
    for name, value in metadata:
        if not _NAME.fullmatch(name) or name.encode() in _RESERVED:
            raise BadRequest("metadata", repr(name), "a name of a-z 0-9 _ . - that is not the protocol's own")
        if name.endswith("-bin"):
            octet = value if isinstance(value, bytes) else value.encode()
            fields.append((name.encode(), base64.b64encode(octet).rstrip(b"=")))
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if not _PRINTABLE.fullmatch(text):
            raise BadRequest(f"metadata {name!r}", repr(text), "printable ASCII, or a name that ends in -bin")
        fields.append((name.encode(), text.strip().encode("ascii")))
    return fields


def decode_metadata(fields: Iterable[tuple[bytes, bytes]]) -> tuple[Field, ...]:
    """What is the caller's own in header fields. Raises BadRequest for -bin values that are no base64."""
    metadata: list[Field] = []
    for name, value in fields:
        if name[:1] == b":" or name in _RESERVED:
            continue
        if not name.endswith(b"-bin"):
            metadata.append((name.decode("ascii"), value.decode("latin-1")))
            continue
        metadata.extend((name.decode("ascii"), unbase64(name, part.strip())) for part in value.split(b","))
    return tuple(metadata)


def unbase64(name: bytes, value: bytes) -> bytes:
    """A -bin value: base64, with or without padding. Raises BadRequest."""
    try:
        return base64.b64decode(value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), validate=True)
    except binascii.Error as error:
        raise BadRequest(f"metadata {name.decode('ascii')!r}", "a value that is no base64", "base64") from error


# ---- time-outs ----


@lru_cache(1_024)
def encode_timeout(seconds: float) -> bytes:
    """grpc-timeout: at most 8 digits and a unit, rounded up to three digits.

    Time-outs that are nearly equal make equal header blocks, which the peer has decoded before; who sends one keeps the
    exact deadline itself.
    """
    count, unit = math.ceil(round(seconds * 1e6, 3)), b"u"
    if count >= 1_000:
        step = 10 ** (len(str(count)) - 3)
        count = -(-count // step) * step
    for larger in (b"m", b"S"):
        if count and count % 1_000 == 0:
            count, unit = count // 1_000, larger
    return b"%d%b" % (min(max(count, 0), 99_999_999), unit)


@lru_cache(1_024)
def decode_timeout(value: bytes) -> float:
    """Seconds. Raises BadRequest for what is no time-out."""
    unit = _UNITS.get(value[-1]) if value else None
    digits = value[:-1]
    if unit is None or not digits.isdigit() or len(digits) > 8:
        raise BadRequest("grpc-timeout", repr(value)[1:40], "at most 8 digits and one of H M S m u n")
    return int(digits) * unit


# ---- status ----


def encode_status(code: str, message: str, details: bytes) -> list[tuple[bytes, bytes]]:
    """The fields that end a call."""
    fields = [(b"grpc-status", b"%d" % GRPC_CODES[code])]
    if message:
        # Spaces at the ends are legal for gRPC and malformed for HTTP/2: they are encoded too.
        text = quote(message.encode("utf-8", "replace"), safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
        start, stop = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
        text = "%20" * start + text[start:stop] + "%20" * (len(text) - max(stop, start))
        fields.append((b"grpc-message", text.encode("ascii")))
    if details:
        fields.append((b"grpc-status-details-bin", base64.b64encode(details).rstrip(b"=")))
    return fields


def decode_status(fields: Sequence[tuple[bytes, bytes]]) -> tuple[str, str, bytes] | None:
    """Name of the code, message and details in trailers; None if they have no status."""
    code, message, details = None, "", b""
    for name, value in fields:
        if name == b"grpc-status":
            code = CODE_NAMES.get(value, "UNKNOWN")
        elif name == b"grpc-message":
            message = unquote(value.decode("latin-1"), encoding="utf-8", errors="replace")
        elif name == b"grpc-status-details-bin":
            try:
                details = unbase64(name, value)
            except ServingError:
                details = b""
    return None if code is None else (code, message, details)


def encoding_of(value: bytes) -> str:
    """A grpc-encoding we can read; raises Unimplemented."""
    text = value.decode("latin-1")
    if text not in ENCODINGS:
        raise Unimplemented(f"grpc-encoding {text[:40]!r} is not supported, only {ACCEPTED.decode()}")
    return text
