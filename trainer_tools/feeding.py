"""From a request's arrays to what a pruned program is fed: what a predictor does, for proofs and measurements.

A request has the dense inputs of a manifest, with lengths where they are ragged, and, for each lookup, its keys and
where it takes them lengths and weights, as the manifest names them. See manifest.Lookup.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.client import LocalCube
from trainer_tools.manifest import Lookup, Manifest

Request = Mapping[str, NDArray[Any]]
RowsOf = Callable[[str, NDArray[np.uint64]], NDArray[np.float32]]  # table, keys [n] → rows [n, dim], zeros where absent
# A pruned program: inputs by name → outputs. They are arrays, and Sequences where the program is one of ragged ones.
Run = Callable[[Mapping[str, Any]], Sequence[Any]]


class Sequences(NamedTuple):
    """Values of which a sample has any number (Paddle's LoD): sample i has values[offsets[i] : offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]  # [samples + 1], from 0 to len(values), never falling


class Bags(NamedTuple):
    """Rows to pool. Bag b owns rows[offsets[b] : offsets[b + 1]]."""

    rows: NDArray[np.float32]  # float32[k, dim]
    offsets: NDArray[np.int64]  # int64[bags + 1], from 0 to k, never falling
    weights: NDArray[np.float32] | None  # float32[k]: of each row


Pooling = Literal["mean", "sum", "max"]
Pool = Callable[[Bags, Pooling], NDArray[np.float32]]  # → float32[bags, dim]; an empty bag is zeros


def feeds(manifest: Manifest, request: Request, rows_of: RowsOf, pool: Pool | None = None) -> dict[str, Any]:
    """The inputs of the pruned program, by name: the dense ones as they are, and float32 rows for each lookup.

    Arrays, and Sequences of the inputs that are ragged.

    pool: for lookups that pool, which only those of torch programs do.
    """
    made: dict[str, Any] = {tensor.name: request[tensor.name] for tensor in manifest.inputs}
    for name, lengths in manifest.ragged_lengths().items():
        made[name] = Sequences(request[name], offsets_of(request[lengths]))
    for lookup in manifest.lookups:
        flat = lookup.looked_up(request[lookup.keys]).ravel()
        padding = np.zeros(flat.size, np.bool_) if lookup.padding is None else flat == np.uint64(lookup.padding)
        if lookup.pooling == "none":
            rows = np.where(padding[:, None], np.float32(0), rows_of(lookup.table, flat))
            made[lookup.feed] = _unpooled(lookup, request, rows)
        else:
            assert pool is not None, "the caller's programs have lookups that pool"
            made[lookup.feed] = pool(_bags(lookup, request, flat, padding, rows_of), lookup.pooling)
    return made


def parts(manifest: Manifest, request: Request, size: int) -> Iterator[Request]:
    """The same samples, at most `size` of them at a time. Samples lie along the first dimension of every array, but of
    what has lengths (ragged inputs, keys and weights of lookups), which lie one after another."""
    samples = len_of(manifest, request)
    ragged = {name: offsets_of(request[lengths]) for name, lengths in manifest.ragged_lengths().items()}
    for lookup in manifest.lookups:
        if lookup.lengths is not None:
            offsets = offsets_of(request[lookup.lengths].sum(axis=1, dtype=np.int64))
            ragged |= {name: offsets for name in (lookup.keys, lookup.weights) if name is not None}
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        yield {
            name: array[ragged[name][start] : ragged[name][stop]] if name in ragged else array[start:stop]
            for name, array in request.items()
        }


def len_of(manifest: Manifest, request: Request) -> int:
    """How many samples a request has."""
    ragged = manifest.ragged_lengths()
    first = next((ragged.get(t.name, t.name) for t in manifest.inputs if t.shape[:1] == [-1]), None)
    if first is None:
        lookup = manifest.lookups[0]
        first = lookup.keys if lookup.lengths is None else lookup.lengths
    return len(request[first])


def rows_in(cube: LocalCube) -> RowsOf:
    """What lookups read in a cube, of the versions it holds."""
    return lambda table, keys: cube.rows(table, None, keys).rows


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where sequences of these lengths begin, one after another, and where the last ends: int64[lengths.size + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _unpooled(lookup: Lookup, request: Request, rows: NDArray[np.float32]) -> Any:
    """A row for each key, as the program takes them."""
    if lookup.lengths is None:
        return rows.reshape(*request[lookup.keys].shape, rows.shape[1])
    lengths, inner = request[lookup.lengths], (lookup.feed_shape or [-1, -1])[1:-1]
    if lookup.lod_level:
        return Sequences(rows.reshape(len(rows), *inner, rows.shape[1]), offsets_of(lengths))
    return rows.reshape(len(lengths), *inner, rows.shape[1])


def _bags(
    lookup: Lookup, request: Request, keys: NDArray[np.uint64], padding: NDArray[np.bool_], rows_of: RowsOf
) -> Bags:
    """The rows of each slot of each sample, without those of the padding key."""
    assert lookup.lengths is not None, "what is pooled has lengths"
    offsets = offsets_of(request[lookup.lengths])
    weights = None if lookup.weights is None else request[lookup.weights].ravel()
    if padding.any():
        kept = np.concatenate([[0], np.cumsum(~padding)])
        keys, offsets = keys[~padding], kept[offsets]
        weights = None if weights is None else weights[~padding]
    return Bags(rows_of(lookup.table, keys), offsets, weights)
