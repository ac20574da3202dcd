"""The largest scores of each row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig
from cube.kernels import kernel
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged, offsets_of
from predictor.ops.text import lines_of
from predictor.ops.values import ANY
from predictor.rows import frozen
from predictor.tensors import Texts

MOST = 1_000  # of k: a score is put in its place among the k best so far by moving those below it


class TopK(Op):
    """`values`, the k largest of each row in falling order, and `indices`, where they stood.

    Of an array [-1, n] both are [-1, k]. Of ragged scores (the candidates of each request) both are ragged, and a bag
    of fewer than k keeps all. Equal scores keep their order, and nan comes last, so no answer depends on chance.
    """

    def __init__(self, k: int, *, input: str = "scores", labels: Path | None = None):
        """labels: a file with a line for each column; the output `labels`, BYTES [-1, k], has those of the largest."""
        if not 1 <= k <= MOST:
            raise BadConfig("k", k, f"1 to {MOST}")
        self._k, self._input = k, input
        self._labels = None if labels is None else lines_of(labels)
        self._labels_at = str(labels)

    def wanted(self) -> Mapping[str, Port]:
        """See Op."""
        return {self._input: ANY}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        port, place = inputs[self._input], f"input {self._input!r}"
        if port.datatype in ("BYTES", "BOOL", "FP16"):
            raise BadConfig(place, str(port), "integers, FP32 or FP64")
        if port.ragged:
            if port.shape != (-1,) or self._labels is not None:
                raise BadConfig(place, str(port), "scores in one dimension, and no labels, where they are ragged")
            return {"values": port, "indices": port._replace(datatype="INT64")}
        if len(port.shape) != 2 or port.shape[1] < self._k:
            raise BadConfig(place, str(port), f"[-1, n], n known and at least k, {self._k}")
        if self._labels is not None and self._labels.shape[0] != port.shape[1]:
            expected = f"{port.shape[1]}, one for each column of {self._input!r}"
            raise BadConfig(self._labels_at, f"{self._labels.shape[0]} lines", expected)
        made = port._replace(shape=(port.shape[0], self._k))
        ports = {"values": made, "indices": made._replace(datatype="INT64")}
        return ports if self._labels is None else ports | {"labels": made._replace(datatype="BYTES")}

    def run(self, batch: Batch) -> Outputs:
        scores: Any = batch[self._input]
        if isinstance(scores, Ragged):
            best, where, offsets = largest(np.asarray(scores.values), scores.offsets, self._k)
            return {"values": Ragged(best, offsets), "indices": Ragged(where, offsets)}
        rows, columns = scores.shape
        best, where, _ = largest(scores.reshape(-1), np.arange(rows + 1) * columns, self._k)
        made: dict[str, Any] = {"values": best.reshape(rows, self._k), "indices": where.reshape(rows, self._k)}
        if self._labels is not None:
            texts = self._labels
            made["labels"] = Texts((rows, self._k), texts.data, texts.starts[where], texts.sizes[where])
        return made


def largest(
    scores: NDArray[Any], offsets: NDArray[np.int64], k: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The k largest of each bag, or all of a smaller one, in falling order.

    scores: [n] of a number type; offsets: int64[bags + 1]. Returns these scores, where in its bag each stood (int64),
    and the offsets of the new bags.
    """
    kept = offsets_of(np.minimum(np.diff(offsets), k))
    best, where = np.empty(kept[-1], scores.dtype), np.empty(kept[-1], np.int64)
    # Read-only, as some are: numba compiles kernels for these and for others apart.
    _largest(frozen(np.ascontiguousarray(scores)), frozen(offsets), kept, best, where)
    return best, where, kept


@kernel
def _largest(scores, offsets, kept, best, where):  # type: ignore[no-untyped-def]
    for bag in range(offsets.size - 1):
        first, count, most = kept[bag], 0, kept[bag + 1] - kept[bag]
        for at in range(offsets[bag], offsets[bag + 1]):
            score = scores[at]
            if count == most:
                last = best[first + count - 1]
                if not (score > last or (last != last and score == score)):
                    continue
            else:
                count += 1
            place = first + count - 1
            while place > first and (
                score > best[place - 1] or (best[place - 1] != best[place - 1] and score == score)
            ):
                best[place], where[place] = best[place - 1], where[place - 1]
                place -= 1
            best[place], where[place] = score, at - offsets[bag]
