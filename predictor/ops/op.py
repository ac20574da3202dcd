"""What an op is.

    class Double(Op):
        inputs = {"x": Port("FP32", (-1, 4))}
        outputs = {"y": Port("FP32", (-1, 4))}

        def run(self, batch):
            return {"y": 2 * batch["x"]}

An op takes a batch of rows (samples of one request or of several, merged) and returns a value for each of its
outputs, whose rows are those of the batch, in their order. It is made once per node, with the fields of the node's
`config` as keyword arguments, and keeps nothing of a batch: the same op may run several batches at once. `run` may
return an awaitable instead (or be a coroutine), for ops that wait rather than compute.
"""

import inspect
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig
from predictor.tensors import DTYPES, Texts, datatype_of, shape_text


class Ragged(NamedTuple):
    """Rows of different lengths: bag b owns values[offsets[b] : offsets[b + 1]]."""

    values: NDArray[Any] | Texts  # [k, ...]
    offsets: NDArray[np.int64]  # int64[bags + 1], from 0 to k, never falling


Value = NDArray[Any] | Texts | Ragged


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """The offsets of bags of these lengths: int64[n + 1], from 0. lengths: n integers, of any shape."""
    offsets = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class Port(NamedTuple):
    """What an input or an output of an op holds."""

    datatype: str  # as KServe names it
    shape: tuple[int, ...] = (-1,)  # -1: varies. If the first one varies it goes by the rows of the batch
    ragged: bool = False  # a Ragged, `shape` is that of its values, and its bags go by the rows of the batch
    # Entries of the first dimension (or bags) for each row of the batch. 0: that dimension varies, and counts no rows
    per_row: int = 1

    def __str__(self) -> str:
        per_row = "" if self.per_row <= 1 else f", {self.per_row} a row"
        return f"{'ragged ' if self.ragged else ''}{self.datatype} {shape_text(self.shape)}{per_row}"

    @property
    def goes_by_rows(self) -> bool:
        """Whether a part of the rows has a part of the value, so that batches can be merged and split."""
        return self.per_row > 0 and (self.ragged or self.shape[:1] == (-1,))

    def misfit(self, value: Any, rows: int) -> str:
        """How a value is not what the port holds, for a batch of so many rows; empty if it is."""
        if self.ragged:
            if not isinstance(value, Ragged):
                return f"{type(value).__name__}, not a Ragged"
            return _misfit_offsets(value, rows * self.per_row) or _misfit(value.values, self.datatype, self.shape, -1)
        return _misfit(value, self.datatype, self.shape, rows * self.per_row if self.per_row else -1)


def _misfit_offsets(value: Ragged, bags: int) -> str:
    """Kernels trust offsets, and a neighbour's values lie behind them: nothing but right ones may pass."""
    offsets = value.offsets
    if type(offsets) is not np.ndarray or offsets.dtype != np.int64 or offsets.ndim != 1:
        return "offsets that are no array int64[bags + 1]"
    if offsets.size != bags + 1:
        return f"{offsets.size - 1} bags, not {bags}"
    count = value.values.shape[0] if getattr(value.values, "shape", ()) else 0
    if offsets[0] != 0 or offsets[-1] != count or (offsets[1:] < offsets[:-1]).any():
        return f"offsets that do not rise from 0 to {count}, the number of values"
    return ""


def _misfit(value: Any, datatype: str, shape: tuple[int, ...], first: int) -> str:
    """first: what the first dimension is if it varies; -1: anything."""
    if type(value) is np.ndarray:
        dtype = DTYPES.get(datatype)
        if value.dtype is dtype and shape[:1] == (-1,) and value.shape == (first, *shape[1:]):
            return ""  # what nearly every value is
        if value.dtype != dtype:
            return f"dtype {value.dtype}"
    elif not isinstance(value, Texts):
        return f"a {type(value).__name__}, not an array"
    elif datatype != "BYTES":
        return "BYTES"
    elif wrong := _misfit_texts(value):
        return wrong
    there = value.shape
    if len(there) != len(shape):
        return f"shape {shape_text(there)}"
    for at, (found, expected) in enumerate(zip(there, shape, strict=True)):
        wanted = first if expected < 0 and at == 0 else expected
        if wanted not in (-1, found):
            return f"shape {shape_text(there)}, not {wanted} in dimension {at}"
    return ""


def _misfit_texts(value: Texts) -> str:
    """The same of texts: where each lies."""
    count = int(np.prod(value.shape))
    if value.starts.size != count or value.sizes.size != count:
        return f"{value.starts.size} starts and {value.sizes.size} sizes of {count} texts"
    starts, sizes = value.starts, value.sizes
    if count and (starts.min() < 0 or sizes.min() < 0 or (starts + sizes).max() > value.data.size):
        return f"texts beyond their {value.data.size} bytes"
    return ""


class Batch(dict[str, Any]):
    """The inputs of one run of an op, by name; `rows` is how many rows they have."""

    __slots__ = ("deadline", "rows")

    rows: int
    deadline: float | None  # time.monotonic() at which nobody waits for the answer any more; None: never


Outputs = Mapping[str, Any]  # arrays, Texts and Ragged by name


def names_of(made: Any) -> str:
    """What an op has returned, for messages where it is not a mapping with the names of its outputs."""
    return ", ".join(map(str, made)) or "nothing" if isinstance(made, Mapping) else f"a {type(made).__name__}"


class Op:
    """A step of a workflow. Subclass it, name the class in a node's `type` as module:Class."""

    inputs: ClassVar[Mapping[str, Port]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {}
    waits: ClassVar[bool] = (
        False  # `run` may return an awaitable though it is no coroutine, and belongs on the event loop
    )

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """What is made of `inputs`, as the op's node is given them; called at load. Raises BadConfig.

        Ops that take what they are given, whatever it is, override this.
        """
        for name, port in self.inputs.items():
            given = inputs.get(name)
            if given is not None and not _accepts(port, given):
                raise BadConfig(f"input {name!r}", str(given), str(port))
        return self.outputs

    def wanted(self) -> Mapping[str, Port] | None:
        """The inputs it takes; None: all values of the nodes it depends on."""
        return self.inputs

    def open(self) -> None:
        """Called once before the first run, in the process that runs the op."""

    def run(self, batch: Batch) -> Outputs | Awaitable[Outputs]:
        """A value for each output."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once after the last run."""

    @property
    def within(self) -> "Op":
        """The op that makes the outputs, where this one has others run it."""
        return self

    @property
    def is_waiting(self) -> bool:
        """Whether `run` returns at once and its outputs come later."""
        return self.waits or inspect.iscoroutinefunction(self.run)


def _accepts(port: Port, given: Port) -> bool:
    return (
        given.datatype == port.datatype
        and given.ragged == port.ragged
        and given.per_row == port.per_row
        and len(given.shape) == len(port.shape)
        and all(a == b or -1 in (a, b) for a, b in zip(given.shape, port.shape, strict=True))
    )


def port_of(value: Value) -> Port:
    """What a value's port would be, were its first dimension rows."""
    if isinstance(value, Ragged):
        return Port(datatype_of(value.values), (-1, *value.values.shape[1:]), ragged=True)
    return Port(datatype_of(value), (-1, *value.shape[1:]))
