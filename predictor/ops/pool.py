"""Rows of each bag (one slot of one sample) → what the program takes: one vector, or the rows as they are.

Bag b owns rows[offsets[b] : offsets[b + 1]]. An empty bag pools to zeros. Sums run in float32 from left to right and
a mean divides the sum, as torch's embedding_bag does, so that served and trained scores agree to the bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.kernels import kernel
from cube.rows import RowFormat
from cube.rows import pool as add_up
from predictor.ops.gather import rows_of
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged, offsets_of
from predictor.requests import keys_port, weights_port
from predictor.tensors import DTYPES
from trainer_tools.manifest import Lookup


def pool(
    rows: NDArray[np.float32],
    offsets: NDArray[np.int64],
    mode: str,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """rows: float32[k, dim]; offsets: int64[bags + 1], from 0 to k, never falling. Returns float32[bags, dim].

    mode: "sum", "mean", "max", or "sqrtn", the sum divided by the square root of its length. weights: float32[k], each
    row is multiplied by its own before it is added: torch rounds once for both, so the last bit may differ.
    """
    out = np.empty((offsets.size - 1, rows.shape[1]), np.float32)
    if weights is not None:
        rows = rows * weights[:, None]
    if mode == "max":
        _max(np.ascontiguousarray(rows), offsets, out)
    elif mode == "sqrtn":
        add_up(RowFormat.F32, np.ascontiguousarray(rows).view(np.uint8), offsets, False, out)
        out /= np.sqrt(np.maximum(np.diff(offsets), 1)).astype(np.float32)[:, None]
    else:
        add_up(RowFormat.F32, np.ascontiguousarray(rows).view(np.uint8), offsets, mode == "mean", out)
    return out


@kernel
def _max(rows, offsets, out):  # type: ignore[no-untyped-def]
    """Elementwise largest of each bag; nan wins, as in torch."""
    for bag in range(offsets.size - 1):
        start, stop = offsets[bag], offsets[bag + 1]
        for e in range(out.shape[1]):
            largest = np.float32(0) if start == stop else rows[start, e]
            for at in range(start + 1, stop):
                value = rows[at, e]
                if value > largest or value != value:
                    largest = value
            out[bag, e] = largest


Mode = Literal["as trained", "sum", "mean", "max", "sqrtn"]


class Pool(Op):
    """Each lookup's rows as an input of the program: pooled, or as they are where the program does the rest."""

    def __init__(
        self,
        lookups: Sequence[Lookup],
        dims: Mapping[str, int],
        datatypes: Mapping[str, str] | None = None,
        mode: Mode = "as trained",
    ):
        """dims: elements of a row of each table. datatypes: of each feed, as the program takes it; FP32 if not said.

        mode: how bags are pooled, where the program leaves that to lookups; by default each as the manifest says.
        """
        self._lookups, self._dims, self._datatypes = lookups, dims, dict(datatypes or {})
        if mode != "as trained":
            self._lookups = [k if k.pooling == "none" else _pooled(k, mode) for k in lookups]

    def wanted(self) -> Mapping[str, Port]:
        """Rows of each lookup, and what else its pooling goes by."""
        wanted = {}
        for lookup in self._lookups:
            keys = keys_port(lookup)
            wanted[rows_of(lookup)] = keys._replace(datatype="FP32", shape=(*keys.shape, self._dims[lookup.table]))
            if lookup.weights is not None:
                wanted[lookup.weights] = weights_port(lookup)
            if lookup.padding is not None:
                wanted[lookup.keys] = keys
        return wanted

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        return {k.feed: _feed_port(k, self._dims[k.table], self._datatype(k)) for k in self._lookups}

    def run(self, batch: Batch) -> Outputs:
        return {k.feed: _of_type(_fed(k, batch), DTYPES[self._datatype(k)]) for k in self._lookups}

    def _datatype(self, lookup: Lookup) -> str:
        return self._datatypes.get(lookup.feed, "FP32")


def _feed_port(lookup: Lookup, dim: int, datatype: str) -> Port:
    """What the program is given for a lookup."""
    if lookup.pooling != "none":
        return Port(datatype, (-1, dim), per_row=len(lookup.slots))
    if lookup.lod_level:
        return Port(datatype, _shape(lookup, dim), ragged=True, per_row=len(lookup.slots))
    return Port(datatype, _shape(lookup, dim))


def _shape(lookup: Lookup, dim: int) -> tuple[int, ...]:
    """Of what is not pooled."""
    return tuple(lookup.feed_shape or (-1, dim))


def _without(rows: NDArray[np.float32], keys: NDArray[np.uint64], padding: int) -> NDArray[np.float32]:
    """Zeros for the key that stands for none, whatever the table holds."""
    is_padding = keys == np.uint64(padding)
    return np.where(is_padding[..., None], np.float32(0), rows) if is_padding.any() else rows


def _pooled(lookup: Lookup, mode: str) -> Lookup:
    return msgspec.structs.replace(lookup, pooling=mode)


def _of_type(fed: Any, dtype: np.dtype[Any]) -> Any:
    """A table of float16 was trained as such: its rows come back to what they were."""
    if isinstance(fed, Ragged):
        return Ragged(_of_type(fed.values, dtype), fed.offsets)
    return fed.astype(dtype, copy=False)


def _fed(lookup: Lookup, batch: Batch) -> Any:
    if lookup.lengths is None:
        rows = batch[rows_of(lookup)]
        return rows if lookup.padding is None else _without(rows, batch[lookup.keys], lookup.padding)
    rows, offsets = batch[rows_of(lookup)]
    if lookup.pooling == "none":
        if lookup.padding is not None:
            rows = _without(rows, batch[lookup.keys].values, lookup.padding)
        inner = _shape(lookup, rows.shape[1])[1:]
        if lookup.lod_level:
            return Ragged(rows.reshape(len(rows), *inner), offsets)
        return rows.reshape(batch.rows, *inner)
    weights = None if lookup.weights is None else batch[lookup.weights].values
    if lookup.padding is not None:
        kept = batch[lookup.keys].values != np.uint64(lookup.padding)
        if not kept.all():
            before = offsets_of(kept)
            rows, offsets = rows[kept], before[offsets]
            weights = None if weights is None else weights[kept]
    return pool(rows, offsets, lookup.pooling, weights)
