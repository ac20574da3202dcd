"""Texts → ids for a net: tokens by a vocabulary, and sequences of different lengths as one array."""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig
from cube.kernels import U, inlined, kernel, mix
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged
from predictor.ops.values import ANY
from predictor.rows import frozen
from predictor.tensors import DTYPES, Texts, texts

_BASIS, _PRIME = U(0xCBF29CE484222325), U(0x100000001B3)  # FNV-1a, 64 bits (Fowler, Noll and Vo)
_SPACE = string.whitespace.encode()
_PUNCTUATION = string.punctuation.encode()


class Tokenise(Op):
    """The id of each token of each text: the number of its line in a vocabulary, from 0.

    Tokens are what stands between white space (ASCII's; all else of UTF-8 is part of a token).
    """

    def __init__(
        self,
        vocabulary: Path,
        *,
        input: str = "text",
        output: str = "ids",
        lower: bool = True,
        split: Literal["space", "words"] = "space",
        unknown: str = "<unk>",
    ):
        """vocabulary: a file with a token on each line. lower: A to Z in texts become a to z, other letters stay.

        split: "words" also ends tokens at ASCII punctuation, and drops it. unknown: the token whose id stands for those
        that the vocabulary lacks; empty: they are left out.
        """
        self._input, self._output = input, output
        self._vocabulary = Vocabulary.of(vocabulary)
        self._breaks, self._lower, self._unknown = np.zeros(256, np.bool_), lower, -1
        if unknown:
            ids, _ = self._vocabulary.ids(texts([unknown.encode()]), self._breaks, lower=False, unknown=-1)
            if not ids.size:
                raise BadConfig(
                    "unknown", repr(unknown), f"a line of {vocabulary}, or nothing to leave such tokens out"
                )
            self._unknown = int(ids[0])
        self._breaks[list(_SPACE + _PUNCTUATION if split == "words" else _SPACE)] = True

    def wanted(self) -> Mapping[str, Port]:
        """The texts, one for each row."""
        return {self._input: Port("BYTES")}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        if inputs[self._input] != Port("BYTES"):
            raise BadConfig(f"input {self._input!r}", str(inputs[self._input]), "BYTES [-1], a text for each row")
        return {self._output: Port("INT64", ragged=True)}

    def run(self, batch: Batch) -> Outputs:
        ids = self._vocabulary.ids(batch[self._input], self._breaks, lower=self._lower, unknown=self._unknown)
        return {self._output: Ragged(*ids)}


class Vocabulary(NamedTuple):
    """Tokens, and a hash table of their numbers: open addressing, at most half full."""

    tokens: Texts
    slots: NDArray[np.int32]  # a power of two of them; -1 where there is no token

    @classmethod
    def of(cls, file: Path) -> "Vocabulary":
        """A file with a token on each line. Raises BadConfig for one that holds a token twice."""
        tokens = lines_of(file)
        slots = np.full(1 << (2 * tokens.starts.size - 1).bit_length(), -1, np.int32)
        again = _fill(tokens.data, tokens.starts, tokens.sizes, slots)
        if again >= 0:
            at = tokens.starts[again]
            token = tokens.data[at : at + tokens.sizes[again]].tobytes().decode(errors="replace")
            raise BadConfig(f"{file}:{again + 1}", f"{token!r} again", "every token once")
        return cls(tokens, slots)

    def ids(
        self, given: Texts, breaks: NDArray[np.bool_], *, lower: bool, unknown: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of all tokens of each text (int64[k]), and where each text's begin (int64[texts + 1]).

        breaks: bool[256], which bytes are between tokens. unknown: the number of tokens that are none of these; -1:
        they are left out.
        """
        ids = np.empty(int(((given.sizes + 1) // 2).sum()), np.int64)  # a token has a byte, and one before the next
        offsets = np.zeros(given.starts.size + 1, np.int64)
        mine = self.tokens
        # Read-only, as some are: numba compiles kernels for these and for others apart.
        _ids(*frozen(given)[1:], breaks, lower, *mine[1:], self.slots, unknown, ids, offsets)
        return ids[: offsets[-1]], offsets


def lines_of(file: Path) -> Texts:
    """The lines of a text file, each without its end. Raises BadConfig for one that cannot be read, or has none."""
    try:
        data = np.frombuffer(file.read_bytes(), np.uint8)
    except OSError as error:
        raise BadConfig(str(file), error.strerror, "a file that can be read") from error
    ends = np.flatnonzero(data == ord("\n"))
    if data.size and data[-1] != ord("\n"):
        ends = np.append(ends, data.size)
    if not ends.size:
        raise BadConfig(str(file), "no lines", "a text on each line")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts
    sizes -= (sizes > 0) & (data[ends - 1] == ord("\r"))
    return Texts((starts.size,), data, starts, sizes)


@inlined
def _hashed(data, at, size, lower):  # type: ignore[no-untyped-def]
    h = _BASIS
    for i in range(at, at + size):
        byte = data[i]
        if lower and 65 <= byte <= 90:
            byte += 32
        h = (h ^ U(byte)) * _PRIME
    return mix(h)


@inlined
def _is_same(data, at, lower, tokens, start, size):  # type: ignore[no-untyped-def]
    for i in range(size):
        byte = data[at + i]
        if lower and 65 <= byte <= 90:
            byte += 32
        if byte != tokens[start + i]:
            return False
    return True


@kernel
def _fill(tokens, starts, sizes, slots):  # type: ignore[no-untyped-def]
    """Put every token into the table. Returns the number of one that is there already, else -1."""
    for number in range(starts.size):
        slot = np.int64(_hashed(tokens, starts[number], sizes[number], False) & U(slots.size - 1))
        while slots[slot] >= 0:
            other = slots[slot]
            if sizes[other] == sizes[number] and _is_same(
                tokens, starts[number], False, tokens, starts[other], sizes[other]
            ):
                return number
            slot = (slot + 1) & (slots.size - 1)
        slots[slot] = number
    return -1


@kernel
def _ids(data, starts, sizes, breaks, lower, tokens, token_starts, token_sizes, slots, unknown, ids, offsets):  # type: ignore[no-untyped-def]
    count = 0
    for text in range(starts.size):
        at, stop = starts[text], starts[text] + sizes[text]
        while at < stop:
            if breaks[data[at]]:
                at += 1
                continue
            begin = at
            while at < stop and not breaks[data[at]]:
                at += 1
            slot = np.int64(_hashed(data, begin, at - begin, lower) & U(slots.size - 1))
            found = unknown
            while slots[slot] >= 0:
                token = slots[slot]
                if token_sizes[token] == at - begin and _is_same(
                    data, begin, lower, tokens, token_starts[token], at - begin
                ):
                    found = np.int64(token)
                    break
                slot = (slot + 1) & (slots.size - 1)
            if found >= 0:
                ids[count] = found
                count += 1
        offsets[text + 1] = count


class Pad(Op):
    """Sequences of different lengths as one array [-1, length, ...], and where it holds their values: BOOL `..._mask`.

    The length is fixed rather than that of the longest sequence: an answer must not depend on what else is in a batch.
    """

    def __init__(
        self,
        length: int,
        *,
        input: str = "ids",
        output: str = "padded",
        pad: float = 0,
        keep: Literal["first", "last"] = "first",
    ):
        """pad: what fills up. keep: which values of a longer sequence."""
        if not 1 <= length <= 1 << 20:
            raise BadConfig("length", length, f"1 to {1 << 20}")
        self._length, self._input, self._output, self._pad, self._keep = length, input, output, pad, keep

    def wanted(self) -> Mapping[str, Port]:
        """The sequences."""
        return {self._input: ANY}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        port = inputs[self._input]
        if not port.ragged or port.datatype == "BYTES":
            raise BadConfig(f"input {self._input!r}", str(port), "ragged numbers")
        dtype = DTYPES[port.datatype]
        if dtype.kind != "f" and not (
            self._pad == int(self._pad) and np.can_cast(np.min_scalar_type(int(self._pad)), dtype)
        ):
            raise BadConfig("pad", self._pad, f"a number that {port.datatype} can hold")
        made = port._replace(shape=(-1, self._length, *port.shape[1:]), ragged=False)
        mask = made._replace(datatype="BOOL", shape=(-1, self._length))
        return {self._output: made, f"{self._output}_mask": mask}

    def run(self, batch: Batch) -> Outputs:
        made, mask = padded(batch[self._input], self._length, self._pad, is_end_kept=self._keep == "last")
        return {self._output: made, f"{self._output}_mask": mask}


def padded(
    given: Ragged, length: int, pad: float = 0, *, is_end_kept: bool = False
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Bags as rows of an array [bags, length, ...], filled up with `pad`; and bool[bags, length], which are values.

    is_end_kept: of a longer bag its last values are kept, not its first.
    """
    values, offsets = given
    assert not isinstance(values, Texts)  # the port says so
    lengths = np.diff(offsets)
    mask = np.arange(length) < lengths[:, None]
    if lengths.size and lengths.max() > length:
        over = np.maximum(lengths - length, 0)
        place = np.arange(values.shape[0]) - np.repeat(offsets[:-1] + (over if is_end_kept else 0), lengths)
        values = values[(place >= 0) & (place < length)]
    made = np.full((lengths.size, length, *values.shape[1:]), pad, values.dtype)
    made[mask] = values
    return made, mask
