"""Ops that pass on, name, join and choose values, whatever these are."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadRequest
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged, offsets_of
from predictor.tensors import DTYPES, Texts, shape_text

ANY = Port("", ())  # of an input that may hold anything: `bind` is told what


class PassOn(Op):
    """Makes what it is given: a request to those that depend on it, or anything as the reply."""

    def wanted(self) -> None:
        """See Op."""
        return

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        return inputs

    def run(self, batch: Batch) -> Outputs:
        return dict(batch)


class Select(Op):
    """Some of the values it is given, under other names, and of these some columns."""

    def __init__(self, names: Sequence[str], *, columns: Sequence[int] = (), flat: bool = False):
        """names: of the values to keep, as NAME or NEW=NAME.

        columns: which to keep, and in which order, of the last dimension of each value; -1 is the last one. None: all.
        flat: a single column is no dimension any more, so that [-1, 2] becomes [-1].
        """
        self._sources = renamed(names)
        self._columns, self._is_flat = list(columns), flat
        if flat and len(columns) != 1:
            raise BadConfig("flat", f"{len(columns)} columns", "columns with one number")

    def wanted(self) -> Mapping[str, Port]:
        """See Op."""
        return dict.fromkeys(self._sources.values(), ANY)

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        return {name: self._port(source, inputs[source]) for name, source in self._sources.items()}

    def _port(self, name: str, port: Port) -> Port:
        if not self._columns:
            return port
        last = port.shape[-1] if len(port.shape) > 1 else -1
        if last < 0:
            raise BadConfig(f"columns of {name!r}", str(port), "a last dimension whose size is known")
        for column in self._columns:
            if not -last <= column < last:
                raise BadConfig(f"columns of {name!r}", column, f"-{last} to {last - 1}")
        return port._replace(shape=port.shape[:-1] if self._is_flat else (*port.shape[:-1], len(self._columns)))

    def run(self, batch: Batch) -> Outputs:
        if not self._columns:
            return {name: batch[source] for name, source in self._sources.items()}
        return {name: self._taken(batch[source]) for name, source in self._sources.items()}

    def _taken(self, value: Any) -> Any:
        if isinstance(value, Ragged):
            return Ragged(self._taken(value.values), value.offsets)
        columns = self._columns[0] if self._is_flat else self._columns
        if not isinstance(value, Texts):
            return value[..., columns]
        starts, sizes = (part.reshape(value.shape)[..., columns] for part in (value.starts, value.sizes))
        return Texts(starts.shape, value.data, starts.ravel(), sizes.ravel())


def renamed(names: Sequence[str]) -> dict[str, str]:
    """NAME and NEW=NAME → {name of the output: name of the input}. Raises BadConfig."""
    sources: dict[str, str] = {}
    for said in names:
        new, _, old = said.rpartition("=")
        if not old or said.startswith("="):
            raise BadConfig("names", repr(said), "NAME or NEW=NAME")
        if (new or old) in sources:
            raise BadConfig("names", f"{new or old!r} twice", "every name once")
        sources[new or old] = old
    if not sources:
        raise BadConfig("names", "none", "at least one")
    return sources


class Concat(Op):
    """Several values as one: arrays side by side along an axis; ragged ones bag by bag, one input after the other."""

    def __init__(self, inputs: Sequence[str] = (), *, axis: int = -1, output: str = "joined"):
        """inputs: in which order; all that it is given if there are none. axis: of arrays, but not 0, their rows."""
        self._said, self._axis, self._output = list(inputs), axis, output
        self._inputs = self._said

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return dict.fromkeys(self._said, ANY) if self._said else None

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        self._inputs = self._said or list(inputs)
        ports = _alike(inputs, self._inputs)
        first = ports[0]
        if first.ragged:
            self._check_sizes(ports, range(1, len(first.shape)))
            return {self._output: first}
        dimensions = len(first.shape)
        if not (-dimensions < self._axis < dimensions and self._axis != 0):
            raise BadConfig(
                "axis", f"{self._axis} of {first}", f"1 to {dimensions - 1}, or counted from the last one, -1"
            )
        self._axis %= dimensions
        self._check_sizes(ports, [at for at in range(dimensions) if at != self._axis])
        sizes = [port.shape[self._axis] for port in ports]
        shape = list(first.shape)
        shape[self._axis] = -1 if -1 in sizes else sum(sizes)
        return {self._output: first._replace(shape=tuple(shape))}

    def _check_sizes(self, ports: Sequence[Port], dimensions: Sequence[int]) -> None:
        for name, port in zip(self._inputs, ports, strict=True):
            if any(port.shape[at] != ports[0].shape[at] for at in dimensions):
                raise BadConfig(f"input {name!r}", str(port), f"{ports[0]}, as input {self._inputs[0]!r}")

    def run(self, batch: Batch) -> Outputs:
        values = [batch[name] for name in self._inputs]
        if isinstance(values[0], Ragged):
            _check_shapes(self._inputs, values)
            return {self._output: joined_bags(values)}
        _check_shapes(self._inputs, values, but=self._axis)
        if isinstance(values[0], Texts):
            return {self._output: _joined_texts(values, self._axis)}
        return {self._output: np.concatenate(values, self._axis)}


def joined_bags(values: Sequence[Ragged]) -> Ragged:
    """Bag b of the result has the values of bag b of each of `values`, in their order."""
    lengths = np.stack([np.diff(value.offsets) for value in values])
    offsets = offsets_of(lengths.sum(0))
    begins = offsets[:-1] + np.cumsum(lengths, 0) - lengths  # of each bag of each value, in the result
    places = [
        np.repeat(begin - value.offsets[:-1], count) + np.arange(value.offsets[-1])
        for value, begin, count in zip(values, begins, lengths, strict=True)
    ]
    parts: list[Any] = [value.values for value in values]
    if isinstance(parts[0], Texts):
        starts, sizes = np.empty((2, offsets[-1], *parts[0].shape[1:]), np.int64)
        data, before = _one_buffer(parts)
        for place, part, at in zip(places, parts, before, strict=True):
            starts[place], sizes[place] = (part.starts + at).reshape(part.shape), part.sizes.reshape(part.shape)
        return Ragged(Texts(starts.shape, data, starts.ravel(), sizes.ravel()), offsets)
    made = np.empty((offsets[-1], *parts[0].shape[1:]), parts[0].dtype)
    for place, part in zip(places, parts, strict=True):
        made[place] = part
    return Ragged(made, offsets)


def _joined_texts(values: Sequence[Texts], axis: int) -> Texts:
    data, before = _one_buffer(values)
    starts = np.concatenate([(v.starts + at).reshape(v.shape) for v, at in zip(values, before, strict=True)], axis)
    sizes = np.concatenate([v.sizes.reshape(v.shape) for v in values], axis)
    return Texts(starts.shape, data, starts.ravel(), sizes.ravel())


def _one_buffer(values: Sequence[Texts]) -> tuple[NDArray[np.uint8], list[int]]:
    """All texts' bytes, and where those of each begin."""
    ends = np.cumsum([value.data.size for value in values])
    return np.concatenate([value.data for value in values]), [0, *map(int, ends[:-1])]


class Cast(Op):
    """Numbers as numbers of another datatype. Fractions are cut off; what a datatype cannot hold is refused."""

    def __init__(self, to: str, inputs: Sequence[str] = ()):
        """to: a datatype as KServe names it, BOOL for "is not zero". inputs: all that it is given if there are none."""
        if to not in DTYPES:
            raise BadConfig("to", repr(to), f"one of {', '.join(DTYPES)}")
        self._to, self._inputs = to, list(inputs)

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return dict.fromkeys(self._inputs, ANY) if self._inputs else None

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        for name, port in inputs.items():
            if port.datatype == "BYTES":
                raise BadConfig(f"input {name!r}", str(port), "numbers")
        return {name: port._replace(datatype=self._to) for name, port in inputs.items()}

    def run(self, batch: Batch) -> Outputs:
        return {name: self._cast(name, value) for name, value in batch.items()}

    def _cast(self, name: str, value: Any) -> Any:
        if isinstance(value, Ragged):
            return Ragged(self._cast(name, value.values), value.offsets)
        to = DTYPES[self._to]
        if to.kind != "b" and value.size and not np.can_cast(value.dtype, to):
            self._check_range(name, value, to)
        return value.astype(to, copy=False)

    def _check_range(self, name: str, value: NDArray[Any], to: np.dtype[Any]) -> None:
        if to.kind == "f":
            finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            most = float(np.finfo(to).max)
            fits = -most <= low and high <= most
        else:
            low, high = value.min().item(), value.max().item()
            limits = np.iinfo(to)
            fits = limits.min - 1 < low and high < limits.max + 1  # fractions are cut off; false for nan
        if not fits:
            raise BadRequest(f"value {name!r}", f"numbers from {low} to {high}", f"what {self._to} can hold")


class Choose(Op):
    """Of each row either the value `yes` or the value `no`, as `condition` says: brings two branches together."""

    inputs: ClassVar[Mapping[str, Port]] = {"condition": Port("BOOL"), "yes": ANY, "no": ANY}

    def __init__(self, output: str = "chosen"):
        """output: its name."""
        self._output, self._port = output, ANY

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        if inputs["condition"] != Port("BOOL"):
            raise BadConfig("input 'condition'", str(inputs["condition"]), "BOOL [-1], a value for each row")
        if inputs["yes"] != inputs["no"]:
            raise BadConfig("input 'no'", str(inputs["no"]), f"{inputs['yes']}, as input 'yes'")
        self._port = inputs["yes"]
        if not self._port.goes_by_rows:
            raise BadConfig("input 'yes'", str(self._port), "values that go by rows")
        return {self._output: self._port}

    def run(self, batch: Batch) -> Outputs:
        yes, no = batch["yes"], batch["no"]
        _check_shapes(("yes", "no"), (yes, no))
        return {self._output: chosen(batch["condition"], yes, no, self._port)}


def chosen(condition: NDArray[np.bool_], yes: Any, no: Any, port: Port) -> Any:
    """The rows of `yes` where `condition` (bool[rows]) is true, else those of `no`. Both are of `port`."""
    marks = condition if port.per_row == 1 else np.repeat(condition, port.per_row)
    if not isinstance(yes, Ragged):
        return _merged(marks, yes, marks, no, ~marks)
    lengths = np.where(marks, np.diff(yes.offsets), np.diff(no.offsets))
    offsets = offsets_of(lengths)
    of_yes, of_no = np.repeat(marks, np.diff(yes.offsets)), np.repeat(~marks, np.diff(no.offsets))
    return Ragged(_merged(np.repeat(marks, lengths), yes.values, of_yes, no.values, of_no), offsets)


def _merged(marks: NDArray[np.bool_], yes: Any, of_yes: NDArray[np.bool_], no: Any, of_no: NDArray[np.bool_]) -> Any:
    """Where `marks` is true the entries `of_yes` of `yes`, elsewhere those `of_no` of `no`, each in their order."""
    if not isinstance(yes, Texts):
        made = np.empty((marks.size, *yes.shape[1:]), yes.dtype)
        made[marks], made[~marks] = yes[of_yes], no[of_no]
        return made
    data, (_, before) = _one_buffer((yes, no))
    starts, sizes = np.empty((2, marks.size, *yes.shape[1:]), np.int64)
    starts[marks], starts[~marks] = yes.starts.reshape(yes.shape)[of_yes], no.starts.reshape(no.shape)[of_no] + before
    sizes[marks], sizes[~marks] = yes.sizes.reshape(yes.shape)[of_yes], no.sizes.reshape(no.shape)[of_no]
    return Texts(starts.shape, data, starts.ravel(), sizes.ravel())


class Average(Op):
    """The mean of several arrays, element by element: the scores of an ensemble."""

    def __init__(self, inputs: Sequence[str] = (), *, weights: Sequence[float] = (), output: str = "average"):
        """inputs: all that it is given if there are none. weights: of each input; they are divided by their sum."""
        self._said, self._output = list(inputs), output
        self._inputs = self._said
        if weights and len(weights) != len(inputs):
            raise BadConfig("weights", f"{len(weights)} for {len(inputs)} inputs", "one for each of inputs")
        if weights and (min(weights) < 0 or not 0 < sum(weights) < np.inf):
            raise BadConfig("weights", list(weights), "numbers of at least 0, not all 0")
        self._shares = self._weights = [weight / sum(weights) for weight in weights]

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return dict.fromkeys(self._said, ANY) if self._said else None

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        self._inputs = self._said or list(inputs)
        self._shares = self._weights or [1 / len(self._inputs)] * len(self._inputs)
        for name, port in zip(self._inputs, _alike(inputs, self._inputs), strict=True):
            if not port.datatype.startswith("FP") or port.ragged or port.shape != inputs[self._inputs[0]].shape:
                raise BadConfig(f"input {name!r}", str(port), "arrays of FP16, FP32 or FP64, all of one shape")
        return {self._output: inputs[self._inputs[0]]}

    def run(self, batch: Batch) -> Outputs:
        values = [batch[name] for name in self._inputs]
        _check_shapes(self._inputs, values)
        made = values[0] * values[0].dtype.type(self._shares[0])
        for value, share in zip(values[1:], self._shares[1:], strict=True):
            made += value * value.dtype.type(share)
        return {self._output: made}


def _alike(inputs: Mapping[str, Port], names: Sequence[str]) -> list[Port]:
    """The ports of values that are to be joined: alike in all but their sizes. Raises BadConfig."""
    if not names:
        raise BadConfig("inputs", "none", "at least one")
    first = inputs[names[0]]
    for name in names:
        port = inputs[name]
        same_sizes = port._replace(shape=first.shape)
        if same_sizes != first or len(port.shape) != len(first.shape):
            raise BadConfig(f"input {name!r}", str(port), f"{first}, as input {names[0]!r}")
    return [inputs[name] for name in names]


def _check_shapes(names: Sequence[str], values: Sequence[Any], but: int | None = None) -> None:
    """Values whose ports leave a size open may still differ in it. but: a dimension in which they may."""
    shapes = [_sizes(value, but) for value in values]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            found, expected = shape_text(shape), f"{shape_text(shapes[0])}, as of {names[0]!r}"
            raise BadRequest(f"sizes of value {name!r}", found, expected)


def _sizes(value: Any, but: int | None) -> tuple[int, ...]:
    if isinstance(value, Ragged):
        return tuple(value.values.shape[1:])
    return tuple(size for at, size in enumerate(value.shape) if at != but)
