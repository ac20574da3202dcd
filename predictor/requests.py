"""Request inputs → values that a workflow may trust: what a caller can get wrong is refused before it joins a batch.

Sparse features come as three flat tensors, never as a list of lists:

    samples         0               1
    slots      C1    C2   C3    C1   C2   C3
    lengths     1     2    0     1    0    1        INT32 [samples, slots]
    keys      [ a ] [b c] [ ]  [ d ] [ ] [ e ]      UINT64 [5]: a b c d e
    offsets   [0,    1,   3,    3,    4,   4,  5]   made here

With S slots, slot s of sample i owns keys[offsets[S i + s] : offsets[S i + s + 1]]. Where every sample has as many keys
there are no lengths: keys come as UINT64 [samples, ...]. Instead of keys there may be raw features, BYTES to sign.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadRequest
from predictor.ops.op import Port, Ragged, offsets_of
from predictor.ops.sign import signed
from predictor.rows import blank, frozen
from predictor.tensors import DTYPES, Texts, check_alike, datatype_of, shape_text, texts
from trainer_tools.manifest import Lookup, Tensor

_SAMPLE_KEYS = 100  # what keys of samples are below: where keys are ids, tables have these
# What the time of a run goes by is work: samples, keys by the 100, and bytes of texts by the 1000.
KEYS_PER_UNIT = 100
BYTES_PER_UNIT = 1_000


class Request(NamedTuple):
    """What a caller sent, checked."""

    values: dict[str, Any]  # of the form's ports
    rows: int  # samples
    work: int  # in units: see KEYS_PER_UNIT
    keys: int


class Form:
    """What a request must hold, for one workflow."""

    def __init__(
        self,
        dense: Mapping[str, Port],
        lookups: Sequence[Lookup],
        *,
        max_samples: int,
        max_keys: int,
        finite: bool,
        lengths: Mapping[str, str] = {},
        alike: Sequence[Sequence[str]] = (),
    ):
        """max_keys: of one request, over all lookups. finite: refuse dense numbers that are none.

        A plain dense program may want infinities; a ranking model never does. lengths: of each ragged port among
        `dense`, the name of the input that says how many values each of its bags has. alike: groups of inputs with
        lengths that have to be equal.
        """
        self.dense, self.lookups, self.lengths, self._alike = dense, lookups, dict(lengths), alike
        self._max_samples, self._max_keys, self._finite = max_samples, max_keys, finite
        self._slots = [np.array([slot.number for slot in k.slots], np.int64) for k in lookups]
        names = set(dense) | set(self.lengths.values())
        for lookup in lookups:
            names |= {lookup.keys, lookup.text, *(n for n in (lookup.lengths, lookup.weights) if n is not None)}
        self._names = names
        self.ports: dict[str, Port] = dict(dense)
        added: dict[str, list[int]] = {}
        for lookup in lookups:
            if self.ports.setdefault(lookup.keys, keys_port(lookup)) != keys_port(lookup):
                found = f"{self.ports[lookup.keys]} and {keys_port(lookup)}"
                raise BadConfig(f"lookups of {lookup.keys!r}", found, "one shape of keys")
            if added.setdefault(lookup.keys, lookup.added) != lookup.added:
                found = f"{added[lookup.keys]} and {lookup.added} added to them"
                raise BadConfig(f"lookups of {lookup.keys!r}", found, "the same in both")
            if lookup.weights is not None:
                self.ports[lookup.weights] = weights_port(lookup)

    def tensors(self) -> list[Tensor]:
        """The inputs as metadata lists them: of a lookup keys and their lengths."""
        made: list[Tensor] = []
        for name, port in self.dense.items():
            made.append(Tensor(name, port.datatype, list(port.shape)))
            if port.ragged:
                made.append(Tensor(self.lengths[name], "INT32", [-1] if port.per_row == 1 else [-1, port.per_row]))
        for lookup in self.lookups:
            if lookup.lengths is None:
                made.append(Tensor(lookup.keys, "UINT64", _ids_shape(lookup)))
            else:
                made.append(Tensor(lookup.keys, "UINT64", [-1]))
                made.append(Tensor(lookup.lengths, "INT32", [-1, len(lookup.slots)]))
            if lookup.weights is not None:
                made.append(Tensor(lookup.weights, "FP32", [-1]))
        return list({tensor.name: tensor for tensor in made}.values())  # several lookups may be of the same keys

    def examples(self, rows: int) -> list[dict[str, Any]]:
        """Requests of so many samples of zeros, a key in each slot: with keys, and with raw features instead.

        Arrays are read-only as those over a request's bytes are: numba compiles kernels for them apart.
        """
        made: dict[str, Any] = {}
        for name, port in self.dense.items():
            made[name] = frozen(blank(port._replace(ragged=False, shape=tuple(_sized(port.shape))), rows))
            if port.ragged:
                made[self.lengths[name]] = frozen(np.ones((rows, port.per_row), np.int32))
        keys, features = dict(made), dict(made)
        for lookup in self.lookups:
            each = max(_width(lookup) or 0, len(lookup.slots)) // len(lookup.slots)  # keys of a slot
            keys_of_all = rows * len(lookup.slots) * each
            ids = _sized(_ids_shape(lookup))  # a program of a fixed number of samples takes no other
            shape = [ids[0] if ids[0] >= 0 else rows, *ids[1:]] if lookup.lengths is None else [keys_of_all]
            rest: dict[str, Any] = {}
            if lookup.lengths is not None:
                rest[lookup.lengths] = frozen(np.full((rows, len(lookup.slots)), each, np.int32))
            if lookup.weights is not None:
                rest[lookup.weights] = frozen(np.ones(int(np.prod(shape)), np.float32))
            keys |= rest | {lookup.keys: frozen(np.zeros(shape, np.uint64))}
            features |= rest | {lookup.text: texts([b""] * int(np.prod(shape)), tuple(shape))}
        return [keys, features] if self.lookups else [keys]

    def sample(self, rows: int, seed: int = 0, below: int = 1) -> Request:
        """A checked request of random numbers and keys.

        below: what integers that are no keys are below, and how many texts there are, as nobody knows what is taken.
        """
        rng = np.random.default_rng(seed)
        inputs = self.examples(min(rows, self._max_samples))[0]
        for name, value in inputs.items():
            if any(name == lookup.keys for lookup in self.lookups):
                inputs[name] = frozen(rng.integers(0, _SAMPLE_KEYS, value.shape, np.uint64))
            elif isinstance(value, Texts):
                words = [b"%d" % number if number else b"" for number in rng.integers(0, below, value.starts.size)]
                inputs[name] = texts(words, value.shape)
            elif value.dtype.kind == "f":
                inputs[name] = frozen(np.asarray(rng.random(value.shape)).astype(value.dtype))
            elif name in self.dense:  # not lengths
                most = 2 if value.dtype.kind == "b" else int(np.iinfo(value.dtype).max)
                inputs[name] = frozen(rng.integers(0, min(below, most), value.shape).astype(value.dtype))
        return self.read(inputs)

    def read(self, inputs: Mapping[str, Any]) -> Request:
        """A request's tensors by name, checked. Raises BadRequest."""
        if not self._names.issuperset(inputs):
            name = next(name for name in inputs if name not in self._names)
            expected = f"one of {', '.join(sorted(self._names))}"
            raise BadRequest(f"input {name!r}", "a name the model does not take", expected)
        values: dict[str, Any] = {}
        counts: dict[str, int] = {}
        keys = size = 0
        for name, port in self.dense.items():
            value = _given(inputs, name, port)
            _check(name, value, port)
            if port.datatype == "BYTES":
                size += int(value.sizes.sum())
            if self._finite and port.datatype.startswith("FP"):
                _check_finite(name, value)
            if port.ragged:
                value, counts[self.lengths[name]] = self._ragged(inputs, name, port, value)
                keys += value.offsets[-1]
            elif port.shape[:1] == (-1,):
                counts[name] = value.shape[0]
            values[name] = value
        for lookup, slots in zip(self.lookups, self._slots, strict=True):
            found = values.get(lookup.keys)  # several lookups may be of the same keys
            if found is None:
                found = values[lookup.keys] = _looked_up(lookup, _sparse(inputs, lookup, slots, counts))
            if lookup.weights is not None:
                values[lookup.weights] = self._weights(inputs, lookup, found)
            keys += found.size if lookup.lengths is None else int(found.offsets[-1])
        rows = self._agreed(counts)
        if self._alike:
            check_alike(self._alike, inputs)
        if keys > self._max_keys:
            raise BadRequest("request", f"{keys} keys", f"at most {self._max_keys}")
        work = rows + int(keys) // KEYS_PER_UNIT + size // BYTES_PER_UNIT
        return Request(values, rows, work, int(keys))

    def _agreed(self, counts: Mapping[str, int]) -> int:
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
            raise BadRequest("samples", found, "as many in every input")
        samples = next(iter(counts.values()), 1)
        if not 1 <= samples <= self._max_samples:
            raise BadRequest("request", f"{samples} samples", f"1 to {self._max_samples}")
        return samples

    def _ragged(self, inputs: Mapping[str, Any], name: str, port: Port, value: Any) -> tuple[Ragged, int]:
        lengths = _lengths(inputs, self.lengths[name], port.per_row)
        return Ragged(value, _offsets(lengths, value.shape[0], name, self.lengths[name])), len(lengths)

    def _weights(self, inputs: Mapping[str, Any], lookup: Lookup, keys: Ragged) -> Ragged:
        assert lookup.weights is not None
        port = weights_port(lookup)
        value = _given(inputs, lookup.weights, port)
        _check(lookup.weights, value, port)
        if value.shape != (keys.offsets[-1],):
            raise BadRequest(
                f"input {lookup.weights!r} shape", shape_text(value.shape), f"[{keys.offsets[-1]}]: one for each key"
            )
        if self._finite:
            _check_finite(lookup.weights, value)
        return Ragged(value, keys.offsets)


def keys_port(lookup: Lookup) -> Port:
    """The keys of a lookup: in a bag for each slot of each sample, or in the shape of the feed without its last."""
    if lookup.lengths is None:
        return Port("UINT64", tuple(_ids_shape(lookup)))
    return Port("UINT64", (-1,), ragged=True, per_row=len(lookup.slots))


def weights_port(lookup: Lookup) -> Port:
    """A weight for each key."""
    return Port("FP32", (-1,), ragged=True, per_row=len(lookup.slots))


def _ids_shape(lookup: Lookup) -> list[int]:
    """Of keys without lengths: of the feed without its last dimension."""
    return list(lookup.feed_shape or [-1, -1])[:-1]


def _sized(shape: Sequence[int]) -> list[int]:
    """A shape, 2 where a dimension that does not go by rows varies."""
    return [size if size >= 0 or at == 0 else 2 for at, size in enumerate(shape)]


def _given(inputs: Mapping[str, Any], name: str, port: Port) -> Any:
    value = inputs.get(name)
    if value is None:
        raise BadRequest(f"input {name!r}", "nothing", f"{port.datatype} {shape_text(port.shape)}")
    return value


def _check(name: str, value: Any, port: Port) -> None:
    if type(value) is np.ndarray and value.dtype is DTYPES.get(port.datatype):
        shape = port.shape
        if shape[:1] == (-1,) and value.ndim == len(shape) and value.shape[1:] == shape[1:]:
            return  # what nearly every value is
    found = datatype_of(value)
    if found != port.datatype:
        raise BadRequest(f"input {name!r} datatype", found, port.datatype)
    shape = value.shape
    if len(shape) != len(port.shape) or any(w not in (-1, g) for g, w in zip(shape, port.shape, strict=True)):
        raise BadRequest(f"input {name!r} shape", shape_text(shape), shape_text(port.shape))


def _check_finite(name: str, value: NDArray[Any]) -> None:
    if not np.isfinite(value).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise BadRequest(f"input {name!r}{shape_text(at)}", value[at], "a finite number")


def _sparse(inputs: Mapping[str, Any], lookup: Lookup, slots: NDArray[np.int64], counts: dict[str, int]) -> Any:
    """The keys of one lookup; sets how many samples it has."""
    lengths = None
    if lookup.lengths is not None:
        lengths = _lengths(inputs, lookup.lengths, len(lookup.slots))
        counts[lookup.lengths] = len(lengths)
    keys, raw = inputs.get(lookup.keys), inputs.get(lookup.text)
    if (keys is None) == (raw is None):
        found = "neither" if keys is None else "both"
        raise BadRequest(
            f"inputs {lookup.keys!r} and {lookup.text!r}", found, "one of the two: signed keys or raw texts"
        )
    name, datatype, given = (lookup.keys, "UINT64", keys) if raw is None else (lookup.text, "BYTES", raw)
    assert given is not None
    found = datatype_of(given)
    if found != datatype:
        raise BadRequest(f"input {name!r} datatype", found, datatype)
    if lengths is None:
        _check(name, given, Port(datatype, tuple(_ids_shape(lookup))))
        counts[name] = given.shape[0]
        return given if raw is None else _signed_flat(given, slots)
    if len(given.shape) != 1:
        raise BadRequest(f"input {name!r} shape", shape_text(given.shape), f"[{int(lengths.sum())}]")
    if _width(lookup) is not None:
        _check_widths(lookup, lengths)
    bags = Ragged(given, _offsets(lengths, given.shape[0], name, lookup.lengths or ""))
    return bags if raw is None else signed(bags, slots)


def _looked_up(lookup: Lookup, keys: Any) -> Any:
    """The keys that a table has, where the program adds something to what a request holds."""
    if not lookup.added:
        return keys
    return keys._replace(values=lookup.looked_up(keys.values)) if lookup.lengths else lookup.looked_up(keys)


def _width(lookup: Lookup) -> int | None:
    """How many keys every sample of a lookup has: 0 if as many as the first, None if any number each."""
    if len(lookup.added) > 1:
        return len(lookup.added)
    if lookup.pooling != "none" or lookup.lod_level:
        return None
    return max(0, math.prod(_ids_shape(lookup)[1:]))


def _check_widths(lookup: Lookup, lengths: NDArray[np.int32]) -> None:
    """The program takes as many rows of every sample, so none may have some of its neighbour's."""
    each = lengths.sum(axis=1)
    expected = _width(lookup) or (int(each[0]) if each.size else 0)
    if (each != expected).any():
        wrong = int(np.flatnonzero(each != expected)[0])
        found = f"{each[wrong]} keys in sample {wrong}"
        raise BadRequest(f"input {lookup.lengths!r}", found, f"{expected} in every sample, as the program takes them")


def _signed_flat(raw: Texts, slots: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The keys of raw features, in their shape."""
    count = raw.starts.size
    keys = signed(Ragged(raw._replace(shape=(count,)), np.arange(count + 1)), slots[:1]).values
    return keys.reshape(raw.shape)  # type: ignore[union-attr]  # an array


def _lengths(inputs: Mapping[str, Any], name: str, per_row: int) -> NDArray[np.int32]:
    lengths = inputs.get(name)
    if lengths is None:
        raise BadRequest(f"input {name!r}", "nothing", f"INT32 [-1, {per_row}]")
    found = datatype_of(lengths)
    if found != "INT32":
        raise BadRequest(f"input {name!r} datatype", found, "INT32")
    if per_row == 1 and len(lengths.shape) == 1:
        lengths = lengths.reshape(-1, 1)
    if len(lengths.shape) != 2 or lengths.shape[1] != per_row:
        raise BadRequest(
            f"input {name!r} shape", shape_text(lengths.shape), f"[-1, {per_row}]: the model has {per_row} slots"
        )
    if lengths.size and lengths.min() < 0:
        raise BadRequest(f"input {name!r}", f"a length of {lengths.min()}", "0 or more")
    return lengths  # type: ignore[no-any-return]  # its datatype was checked


def _offsets(lengths: NDArray[np.int32], count: int, name: str, lengths_name: str) -> NDArray[np.int64]:
    offsets = offsets_of(lengths)
    if count != offsets[-1]:
        raise BadRequest(f"input {name!r} shape", shape_text((count,)), f"[{offsets[-1]}]: the sum of {lengths_name!r}")
    return offsets
