"""From a request's arrays to what a pruned program is fed: what a predictor does, for proofs and measurements.

A request has the dense inputs of a manifest and, for each lookup, its keys and where it takes them lengths and
weights, as the manifest names them. See manifest.Lookup.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer_tools.manifest import Lookup, Manifest

Request = Mapping[str, NDArray[Any]]
RowsOf = Callable[[str, NDArray[np.uint64]], NDArray[np.float32]]  # table, keys [n] → rows [n, dim], zeros where absent
Run = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]  # a pruned program: inputs by name → outputs


class Bags(NamedTuple):
    """Rows to pool. Bag b owns rows[offsets[b] : offsets[b + 1]]."""

    rows: NDArray[np.float32]  # float32[k, dim]
    offsets: NDArray[np.int64]  # int64[bags + 1], from 0 to k, never falling
    weights: NDArray[np.float32] | None  # float32[k]: of each row


Pooling = Literal["mean", "sum", "max"]
Pool = Callable[[Bags, Pooling], NDArray[np.float32]]  # → float32[bags, dim]; an empty bag is zeros


def feeds(manifest: Manifest, request: Request, rows_of: RowsOf, pool: Pool | None = None) -> dict[str, NDArray[Any]]:
    """The inputs of the pruned program, by name: the dense ones as they are, and float32 rows for each lookup.

    pool: for lookups that pool, which only those of torch programs do.
    """
    made = {tensor.name: request[tensor.name] for tensor in manifest.inputs}
    for lookup in manifest.lookups:
        keys = request[lookup.keys]
        flat = keys.ravel()
        padding = np.zeros(flat.size, np.bool_) if lookup.padding is None else flat == np.uint64(lookup.padding)
        if lookup.pooling == "none":
            rows = rows_of(lookup.table, flat)
            shape = keys.shape if lookup.lengths is None else (-1, *(lookup.feed_shape or [-1, -1])[1:-1])
            made[lookup.feed] = np.where(padding[:, None], np.float32(0), rows).reshape(*shape, rows.shape[1])
        else:
            assert pool is not None, "the caller's programs have lookups that pool"
            made[lookup.feed] = pool(_bags(lookup, request, flat, padding, rows_of), lookup.pooling)
    return made


def parts(manifest: Manifest, request: Request, size: int) -> Iterator[Request]:
    """The same samples, at most `size` of them at a time. Samples lie along the first dimension of every array, but of
    keys and weights of lookups with lengths, which lie one after another."""
    samples = len_of(manifest, request)
    ragged: dict[str, NDArray[np.int64]] = {}
    for lookup in manifest.lookups:
        if lookup.lengths is not None:
            offsets = np.concatenate([[0], np.cumsum(request[lookup.lengths].sum(axis=1, dtype=np.int64))])
            ragged |= {name: offsets for name in (lookup.keys, lookup.weights) if name is not None}
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        yield {
            name: array[ragged[name][start] : ragged[name][stop]] if name in ragged else array[start:stop]
            for name, array in request.items()
        }


def len_of(manifest: Manifest, request: Request) -> int:
    """How many samples a request has."""
    first = next((t.name for t in manifest.inputs if t.shape[:1] == [-1]), None)
    if first is None:
        lookup = manifest.lookups[0]
        first = lookup.keys if lookup.lengths is None else lookup.lengths
    return len(request[first])


def _bags(
    lookup: Lookup, request: Request, keys: NDArray[np.uint64], padding: NDArray[np.bool_], rows_of: RowsOf
) -> Bags:
    """The rows of each slot of each sample, without those of the padding key."""
    assert lookup.lengths is not None, "what is pooled has lengths"
    offsets = np.concatenate([[0], np.cumsum(request[lookup.lengths], dtype=np.int64)])
    weights = None if lookup.weights is None else request[lookup.weights].ravel()
    if padding.any():
        kept = np.concatenate([[0], np.cumsum(~padding)])
        keys, offsets = keys[~padding], kept[offsets]
        weights = None if weights is None else weights[~padding]
    return Bags(rows_of(lookup.table, keys), offsets, weights)
