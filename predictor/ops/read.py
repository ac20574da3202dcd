"""Request inputs → values that the rest of the workflow may trust: everything a caller can get wrong is refused here.

Sparse features come as three flat tensors, never as a list of lists:

    samples         0               1
    slots      C1    C2   C3    C1   C2   C3
    lengths     1     2    0     1    0    1        INT32 [samples, slots]
    keys      [ a ] [b c] [ ]  [ d ] [ ] [ e ]      UINT64 [5]: a b c d e
    offsets   [0,    1,   3,    3,    4,   4,  5]   made here

With S slots, slot s of sample i owns keys[offsets[S i + s] : offsets[S i + s + 1]].
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cube.errors import BadRequest
from cube.rpc.calls import Call
from predictor.ops.op import Values
from predictor.tensors import datatype_of, shape_text
from trainer_tools.manifest import Lookup, Tensor

# Names of values that no program can have: tensors of torch programs are named by Python identifiers.
SAMPLES = "number of samples"
WORK = "units of work"  # samples, and keys by the 100: what the time of a run goes by
KEYS_PER_UNIT = 100


class Read:
    """The first op of every workflow."""

    compute: ClassVar[bool] = False
    takes: tuple[str, ...] = ()

    def __init__(
        self, dense: Sequence[Tensor], lookups: Sequence[Lookup], max_samples: int, max_keys: int, finite: bool
    ):
        """max_keys: of one request, over all lookups. finite: refuse dense numbers that are none.

        A plain dense program may want infinities; a ranking model never does.
        """
        self._dense, self._lookups = dense, lookups
        self._max_samples, self._max_keys, self._finite = max_samples, max_keys, finite
        self._names = {t.name for t in dense} | {name for k in lookups for name in (k.keys, k.text, k.lengths)}
        made = [t.name for t in dense] + [n for k in lookups for n in (k.keys, k.text, offsets_of(k))]
        self.makes: tuple[str, ...] = (SAMPLES, WORK, *made)

    def run(self, values: Mapping[str, Any], call: Call) -> Values:
        for name in values:
            if name not in self._names:
                raise BadRequest(
                    f"input {name!r}", "a name the model does not take", f"one of {', '.join(sorted(self._names))}"
                )
        made: Values = {}
        for tensor in self._dense:
            made[tensor.name] = self._checked(values, tensor)
        counts = {t.name: len(made[t.name]) for t in self._dense if t.shape[:1] == [-1]}
        for lookup in self._lookups:
            made |= self._sparse(values, lookup)
            counts[lookup.lengths] = len(values[lookup.lengths])
        made[SAMPLES] = self._agreed(counts)
        keys = sum(int(made[offsets_of(lookup)][-1]) for lookup in self._lookups)
        if keys > self._max_keys:
            raise BadRequest("request", f"{keys} keys", f"at most {self._max_keys}")
        made[WORK] = made[SAMPLES] + keys // KEYS_PER_UNIT
        return made

    def _agreed(self, counts: dict[str, int]) -> int:
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
            raise BadRequest("samples", found, "as many in every input")
        samples = next(iter(counts.values()), 1)
        if not 1 <= samples <= self._max_samples:
            raise BadRequest("request", f"{samples} samples", f"1 to {self._max_samples}")
        return samples

    def _checked(self, values: Mapping[str, Any], tensor: Tensor) -> Any:
        value = values.get(tensor.name)
        if value is None:
            raise BadRequest(f"input {tensor.name!r}", "nothing", f"{tensor.datatype} {shape_text(tensor.shape)}")
        _check_type(tensor.name, value, tensor.datatype)
        fits = len(value.shape) == len(tensor.shape) and all(
            w in (-1, g) for g, w in zip(value.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BadRequest(f"input {tensor.name!r} shape", shape_text(value.shape), shape_text(tensor.shape))
        if self._finite and tensor.datatype.startswith("FP") and not np.isfinite(value).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise BadRequest(f"input {tensor.name!r}{shape_text(at)}", value[at], "a finite number")
        return value

    def _sparse(self, values: Mapping[str, Any], lookup: Lookup) -> Values:
        lengths, keys, texts = (values.get(name) for name in (lookup.lengths, lookup.keys, lookup.text))
        slots = len(lookup.slots)
        if lengths is None:
            raise BadRequest(f"input {lookup.lengths!r}", "nothing", f"INT32 [-1, {slots}]")
        _check_type(lookup.lengths, lengths, "INT32")
        if len(lengths.shape) != 2 or lengths.shape[1] != slots:
            raise BadRequest(
                f"input {lookup.lengths!r} shape",
                shape_text(lengths.shape),
                f"[-1, {slots}]: the model has {slots} slots",
            )
        if lengths.size and lengths.min() < 0:
            raise BadRequest(f"input {lookup.lengths!r}", f"a length of {lengths.min()}", "0 or more")
        if (keys is None) == (texts is None):
            found = "neither" if keys is None else "both"
            raise BadRequest(
                f"inputs {lookup.keys!r} and {lookup.text!r}", found, "one of the two: signed keys or raw texts"
            )
        given: Any = keys if texts is None else texts
        name, datatype = (lookup.keys, "UINT64") if texts is None else (lookup.text, "BYTES")
        _check_type(name, given, datatype)
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if given.shape != (offsets[-1],):
            raise BadRequest(
                f"input {name!r} shape", shape_text(given.shape), f"[{offsets[-1]}]: the sum of {lookup.lengths!r}"
            )
        return {offsets_of(lookup): offsets, lookup.keys: keys, lookup.text: texts}


def offsets_of(lookup: Lookup) -> str:
    """Name of the value that says where each bag of a lookup starts."""
    return f"{lookup.lengths} offsets"


def _check_type(name: str, value: Any, datatype: str) -> None:
    found = datatype_of(value)
    if found != datatype:
        raise BadRequest(f"input {name!r} datatype", found, datatype)
