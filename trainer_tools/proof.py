"""The proof of a pruned program: what the original makes of samples, against pruned + rows on the requests for them.

Requests are those that a predictor gets, and feeding makes of them what it makes: what is proven is what is served.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools import feeding
from trainer_tools.feeding import Pool, Request, RowsOf, Run, Sequences
from trainer_tools.manifest import Manifest
from trainer_tools.pruning import ENDLESS, Difference, difference

_RECIPE = "one exported to serve: after model.eval(), of Paddle after clone(for_test=True)"


class Expected(NamedTuple):
    """What the original computes, and the request for the same, so that the original is not needed any more."""

    samples: int
    request: Request
    outputs: list[Any]  # arrays, and Sequences of the outputs that are ragged


def compare(case: Expected, run: Run, manifest: Manifest, rows_of: RowsOf, pool: Pool | None = None) -> Difference:
    """Between the original, and the pruned program on rows of the keys that stand for its ids.

    Raises BadData for a case in which a predictor could not tell samples apart.
    """
    _check_samples(case, manifest)
    after = run(feeding.feeds(manifest, case.request, rows_of, pool))
    worst = Difference()
    for one, other in zip(case.outputs, after, strict=True):
        worst = worst.or_larger(_apart(one, other))
    return worst


def check_random_ops(place: str, random_ops: Sequence[str]) -> None:
    """Raise BadData for a program that has random ops, which are named for people. place: of the program.

    Their presence is enough: a seed makes the first run of every session the same, and no run after it.
    """
    if random_ops:
        ops = ", ".join(random_ops)
        raise BadData(place, f"a program whose own outputs differ from run to run (random ops: {ops})", _RECIPE)


def check_steady(place: str, expected: Callable[[], Sequence[Expected]]) -> None:
    """Raise BadData for a program that computes something else of the same samples each time.

    place: of the program. expected: what it computes, of the same samples whenever it is called.
    """
    worst = Difference()
    for first, second in zip(expected(), expected(), strict=True):
        for one, other in zip(first.outputs, second.outputs, strict=True):
            worst = worst.or_larger(_apart(one, other))
    if not worst.is_rounding:
        raise BadData(place, f"a program whose own outputs differ from run to run, by {worst.largest:g}", _RECIPE)


class Read(NamedTuple):
    """What a lookup of a program reads."""

    name: str  # of the value that holds ids, with what the program adds to them
    keys: NDArray[np.uint64]  # of its table: row i is kept under keys[i]


def request_of(
    said: Manifest, reads: Sequence[Read], values: Mapping[str, Any], samples: int, rng: np.random.Generator
) -> Request:
    """The request that means what a program's values mean.

    reads: of each lookup of the manifest. values: arrays or Sequences by name, the program's inputs and what lookups
    read, of so many samples. Raises BadData for ids that do not lie along these.
    """
    request: dict[str, NDArray[Any]] = {}
    lengths = said.ragged_lengths()
    for tensor in said.inputs:
        value = values[tensor.name]
        if tensor.name in lengths:
            request[tensor.name] = value.values
            request[lengths[tensor.name]] = np.diff(value.offsets).astype(np.int32)
        else:
            request[tensor.name] = value
    for lookup, (name, keys) in zip(said.lookups, reads, strict=True):
        if lookup.keys in request:  # lookups that share ids share keys, those that stand for none too
            continue
        ids = values[name]
        flat, each = _listed(ids)
        if each.size != samples:
            raise BadData(f"ids {name!r}", f"{each.size} for {samples} samples", "ids of a sample after another")
        if lookup.lengths is None:
            request[lookup.keys] = lookup.asked(keys_of(ids, keys, rng))
        else:
            request[lookup.keys] = lookup.asked(keys_of(flat, keys, rng))
            request[lookup.lengths] = each.astype(np.int32)[:, None]
    return request


def keys_of(ids: NDArray[Any], keys: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.uint64]:
    """The keys that stand for ids; for ids without a key, ones that nothing is kept under.

    ids: whole numbers, also as floats.
    """
    ids = ids.astype(np.int64) if ids.dtype.kind == "f" else ids
    made: NDArray[np.uint64] = keys[np.clip(ids, 0, keys.size - 1)]
    unknown = (ids < 0) | (ids >= keys.size)
    if unknown.any():
        strange = rng.integers(0, 1 << 64, 4 * np.count_nonzero(unknown) + 64, dtype=np.uint64)
        strange = strange[~np.isin(strange, keys)]
        made[unknown] = rng.choice(strange, np.count_nonzero(unknown))
    return made


def _check_samples(case: Expected, manifest: Manifest) -> None:
    """Raise BadData unless all that goes by samples has as many, as a predictor counts them."""
    lengths = manifest.ragged_lengths()
    by_samples = [t.name for t in manifest.inputs if t.shape[:1] == [-1]]
    named = {lengths.get(name, name) for name in by_samples} | {k.lengths or k.keys for k in manifest.lookups}
    counts = {f"input {name!r}": len(case.request[name]) for name in sorted(named)}
    for tensor, value in zip(manifest.outputs, case.outputs, strict=True):
        if isinstance(value, Sequences):
            counts[f"output {tensor.name!r}"] = len(value.offsets) - 1
        elif tensor.shape[:1] == [-1] and not manifest.has_fixed_samples():
            counts[f"output {tensor.name!r}"] = len(np.atleast_1d(value))
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise BadData("proof, samples", found, "as many in each: a predictor merges and parts requests by samples")


def _listed(ids: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids one after another, and how many each sample has."""
    if isinstance(ids, Sequences):
        return ids.values.ravel(), np.diff(ids.offsets)
    return ids.ravel(), np.full(len(ids), prod(ids.shape[1:]))


def _apart(one: Any, other: Any) -> Difference:
    if isinstance(one, Sequences) and isinstance(other, Sequences):
        return difference(one.values, other.values) if np.array_equal(one.offsets, other.offsets) else ENDLESS
    return ENDLESS if isinstance(one, Sequences) or isinstance(other, Sequences) else difference(one, other)
