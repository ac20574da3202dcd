"""What a workflow answers: which values, under which names, or as a JSON text for each row."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cube.errors import BadConfig
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged
from predictor.ops.values import ANY, renamed
from predictor.tensors import Texts


class Respond(Op):
    """The values of a reply. As JSON: one output, BYTES [-1], for each row an object with its part of every value.

    nan and infinities become null, bytes that are no UTF-8 the replacement character.
    """

    def __init__(self, names: Sequence[str] = (), *, json: bool = False, output: str = "json"):
        """names: of the values to answer with, as NAME or NEW=NAME; all that it is given if there are none."""
        self._said = renamed(names) if names else {}
        self._sources = self._said
        self._is_json, self._output = json, output
        self._ports: Mapping[str, Port] = {}
        self._row: Any = None  # the class of a row's object

    def wanted(self) -> Mapping[str, Port] | None:
        """See Op."""
        return dict.fromkeys(self._said.values(), ANY) if self._said else None

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        self._sources = self._said or {name: name for name in inputs}
        if not self._is_json:
            return {name: inputs[source] for name, source in self._sources.items()}
        for name in self._sources.values():
            if not inputs[name].goes_by_rows:
                raise BadConfig(f"input {name!r}", str(inputs[name]), "a value that goes by rows")
        self._ports = inputs
        # Fields have numbers for names, since those of values need not be Python's.
        fields = [(f"f{i}", Any) for i in range(len(self._sources))]
        names = {f"f{i}": name for i, name in enumerate(self._sources)}
        self._row = msgspec.defstruct("Row", fields, rename=names, gc=False)
        return {self._output: Port("BYTES")}

    def run(self, batch: Batch) -> Outputs:
        if not self._is_json:
            return {name: batch[source] for name, source in self._sources.items()}
        columns = [_by_row(batch[source], self._ports[source].per_row) for source in self._sources.values()]
        lines = np.frombuffer(msgspec.json.Encoder().encode_lines(list(map(self._row, *columns))), np.uint8)
        ends = np.flatnonzero(lines == ord("\n"))  # JSON has no line end within a text
        starts = np.concatenate([[0], ends[:-1] + 1])
        return {self._output: Texts((ends.size,), lines, starts, ends - starts)}


def _by_row(value: Any, per_row: int) -> list[Any]:
    """A value as Python objects, one for each row."""
    if isinstance(value, Ragged):
        flat, ends = _by_row(value.values, 1), value.offsets.tolist()
        bags = [flat[start:stop] for start, stop in itertools.pairwise(ends)]
    elif isinstance(value, Texts):
        data, stops = value.data.tobytes(), (value.starts + value.sizes).tolist()
        each = [data[a:b].decode(errors="replace") for a, b in zip(value.starts.tolist(), stops, strict=True)]
        bags = np.array(each, object).reshape(value.shape).tolist()
    else:
        bags = value.tolist()
    return bags if per_row == 1 else [bags[at : at + per_row] for at in range(0, len(bags), per_row)]
