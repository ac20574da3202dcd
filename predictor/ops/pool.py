"""Reduce the rows of each bag (one slot of one sample) to one vector.

Bag b owns rows[offsets[b] : offsets[b + 1]]. An empty bag pools to zeros. Sums run in float32 from left to right and
a mean divides the sum, as torch's embedding_bag does, so that served and trained scores agree to the bit.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cube.rows import RowFormat
from cube.rows import pool as add_up
from cube.rpc.calls import Call
from predictor.ops.gather import rows_of
from predictor.ops.op import Values
from predictor.ops.read import offsets_of
from trainer_tools.manifest import Lookup


def pool(rows: NDArray[np.float32], offsets: NDArray[np.int64], mean: bool) -> NDArray[np.float32]:
    """rows: float32[k, dim]; offsets: int64[bags + 1], from 0 to k, never falling. Returns float32[bags, dim]."""
    out = np.empty((offsets.size - 1, rows.shape[1]), np.float32)
    add_up(RowFormat.F32, np.ascontiguousarray(rows).view(np.uint8), offsets, mean, out)
    return out


class Pool:
    """The pooled rows of one lookup, under the name of the program's input."""

    compute: ClassVar[bool] = True

    def __init__(self, lookup: Lookup):
        self._lookup = lookup
        self.takes: tuple[str, ...] = (rows_of(lookup), offsets_of(lookup))
        self.makes: tuple[str, ...] = (lookup.feed,)

    def run(self, values: Mapping[str, Any], call: Call) -> Values:
        rows, offsets = values[rows_of(self._lookup)], values[offsets_of(self._lookup)]
        return {self._lookup.feed: pool(rows, offsets, self._lookup.pooling == "mean")}
