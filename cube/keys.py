"""Feature → key, and key → shard.

The *sign* of a feature is XXH64 (Collet's xxHash, 64-bit variant) of the feature's raw text, with the slot number as
the seed. Byte for byte: input = the text's bytes as they stand in the data, no terminator, no case folding; seed =
the slot number as an unsigned 64-bit integer; result = an unsigned 64-bit integer, every value legal. Any language's
xxHash library gives the same key. `tests/golden/signs.json` holds vectors that trainer, client and server are tested
against.

The *legacy sign* is what the CTR demos of Paddle Serving used: CPython 2's string hash of (decimal column number + raw
text), on 64 bits, then a floored modulus (`legacy_ids`).

A *shard* is chosen by rule (`ShardRule`), one for all tables of a cube: builders, servers and clients must agree on it.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData
from cube.kernels import U, inlined, kernel, mix, scaled

SIGN_RULE = "xxh64(text, seed=slot)"

LEGACY_MODULUS = 1_000_001

_P1, _P2, _P3 = U(0x9E3779B185EBCA87), U(0xC2B2AE3D27D4EB4F), U(0x165667B19E3779F9)
_P4, _P5 = U(0x85EBCA77C2B2AE63), U(0x27D4EB2F165667C5)
_SHARD_SEED = U(0x5851F42D4C957F2D)  # unlike any segment's seed, so that a shard's keys still spread within it


class ShardRule(IntEnum):
    """How a key's shard is chosen. On disk and in stores' facts: never renumber."""

    MIX = 1  # floor(mix(key ^ seed) * shards / 2**64): even, whatever the keys have in common
    MODULO = 2  # key mod shards, unsigned: the ancestor's rule, for its clients. As even as the keys are

    @property
    def text(self) -> str:
        """The name in flags, configuration and messages: mix, modulo."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str, place: str = "shard_rule") -> "ShardRule":
        """The rule of a name; raises BadConfig."""
        if text not in (names := [rule.text for rule in cls]):
            raise BadConfig(place, repr(text), " or ".join(names))
        return cls[text.upper()]


@inlined
def _rotl(x: np.uint64, by: int) -> np.uint64:
    return (x << U(by)) | (x >> U(64 - by))


@inlined
def _word(data: NDArray[np.uint8], at: int, size: int) -> np.uint64:
    """`size` little-endian bytes."""
    value = U(0)
    for i in range(size):
        value |= U(data[at + i]) << U(8 * i)
    return value


@inlined
def _round(lane, word):  # type: ignore[no-untyped-def]
    return _rotl(lane + word * _P2, 31) * _P1


@kernel
def _xxh64(slots, data, starts, sizes, out):  # type: ignore[no-untyped-def]
    for i in range(starts.size):
        seed, at, left = U(slots[i]), starts[i], sizes[i]
        if left >= 32:
            a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
            while left >= 32:  # ends: left falls by 32 a turn
                a = _round(a, _word(data, at, 8))
                b = _round(b, _word(data, at + 8, 8))
                c = _round(c, _word(data, at + 16, 8))
                d = _round(d, _word(data, at + 24, 8))
                at, left = at + 32, left - 32
            h = _rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)
            h = (h ^ _round(U(0), a)) * _P1 + _P4
            h = (h ^ _round(U(0), b)) * _P1 + _P4
            h = (h ^ _round(U(0), c)) * _P1 + _P4
            h = (h ^ _round(U(0), d)) * _P1 + _P4
        else:
            h = seed + _P5
        h += U(sizes[i])
        while left >= 8:
            h = _rotl(h ^ _round(U(0), _word(data, at, 8)), 27) * _P1 + _P4
            at, left = at + 8, left - 8
        if left >= 4:
            h = _rotl(h ^ (_word(data, at, 4) * _P1), 23) * _P2 + _P3
            at, left = at + 4, left - 4
        while left > 0:
            h = _rotl(h ^ (U(data[at]) * _P5), 11) * _P1
            at, left = at + 1, left - 1
        h ^= h >> U(33)
        h *= _P2
        h ^= h >> U(29)
        h *= _P3
        out[i] = h ^ (h >> U(32))


@kernel
def _cpython2_hash(columns, data, starts, sizes, out):  # type: ignore[no-untyped-def]
    for i in range(starts.size):
        x, length, divisor = np.int64(0), np.int64(0), np.int64(1)
        while columns[i] // divisor >= 10:
            divisor *= 10
        while divisor > 0:  # the column number's decimal digits, most significant first
            byte = np.int64(48 + (columns[i] // divisor) % 10)
            if length == 0:
                x = byte << 7
            x = (x * np.int64(1000003)) ^ byte
            length, divisor = length + 1, divisor // 10
        for j in range(sizes[i]):
            x = (x * np.int64(1000003)) ^ np.int64(data[starts[i] + j])
        x ^= length + sizes[i]
        out[i] = -2 if x == -1 else x


@kernel
def _shards(keys, shards, modulo, out):  # type: ignore[no-untyped-def]
    for i in range(keys.size):
        out[i] = keys[i] % U(shards) if modulo else scaled(mix(keys[i] ^ _SHARD_SEED), U(shards))


def signs(
    slots: NDArray[np.int64], data: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The keys of features whose texts lie in one buffer.

    slots: int64[n] slot numbers; data: uint8[any]; feature i's text is data[starts[i] : starts[i] + sizes[i]].
    Returns uint64[n].
    """
    slots, data, starts, sizes = _checked(slots, data, starts, sizes)
    out = np.empty(starts.size, np.uint64)
    _xxh64(slots, data, starts, sizes, out)
    return out


def signs_of(slots: Sequence[int] | NDArray[np.int64], texts: Sequence[bytes]) -> NDArray[np.uint64]:
    """`signs` for texts in a list: uint64[n]."""
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.cumsum(sizes) - sizes
    return signs(np.asarray(slots, np.int64), np.frombuffer(b"".join(texts), np.uint8), starts, sizes)


def legacy_signs(
    columns: NDArray[np.int64], data: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """CPython 2's 64-bit `hash(str(column) + text)`: int64[n]; arguments as in `signs`.

    Column numbers are not negative. The C++ client of the ancestor numbered Criteo's columns from 13, its Python
    reader from 14.
    """
    columns, data, starts, sizes = _checked(columns, data, starts, sizes)
    if columns.size and columns.min() < 0:
        raise BadData("columns", int(columns.min()), "no negative column number")
    out = np.empty(starts.size, np.int64)
    _cpython2_hash(columns, data, starts, sizes, out)
    return out


def legacy_ids(signs: NDArray[np.int64], modulus: int = LEGACY_MODULUS) -> NDArray[np.uint64]:
    """Row ids of legacy signs: floored sign mod modulus, as Python and numpy define it. uint64[n]."""
    ids: NDArray[np.uint64] = np.mod(signs, np.int64(modulus)).astype(np.uint64)
    return ids


def shards_of(keys: NDArray[np.uint64], shards: int, rule: ShardRule = ShardRule.MIX) -> NDArray[np.int32]:
    """The shard of each key. keys: uint64[n]; returns int32[n], each in [0, shards)."""
    out = np.empty(keys.size, np.int32)
    _shards(np.ascontiguousarray(keys, np.uint64), shards, rule is ShardRule.MODULO, out)
    return out


def _checked(
    slots: NDArray[np.int64], data: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The kernels read where they are told to: nothing may point outside the buffer."""
    slots, starts, sizes = (np.ascontiguousarray(a, np.int64) for a in (slots, starts, sizes))
    if not slots.size == starts.size == sizes.size:
        raise BadData("texts", f"{slots.size} slots, {starts.size} starts, {sizes.size} sizes", "as many of each")
    if starts.size and (starts.min() < 0 or sizes.min() < 0 or (starts > data.size - sizes).any()):
        raise BadData("texts", "a text outside its buffer", f"starts and sizes within {data.size} bytes")
    return slots, np.ascontiguousarray(data, np.uint8), starts, sizes
