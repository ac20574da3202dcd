"""The CTR client: Criteo lines in, click probabilities out."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData, BadRequest
from predictor.client.inference import AsyncClient
from trainer_tools import criteo
from trainer_tools.criteo import CriteoRows


class Scored(NamedTuple):
    """Scores of a file and how it went."""

    scores: NDArray[np.float32]  # click probability of each line
    labels: NDArray[np.int8]
    model_version: str
    table_versions: dict[str, str]
    requests: int
    seconds: float
    latencies_s: NDArray[np.float64]  # of each request
    keys: int
    keys_absent: int

    def summary(self) -> dict[str, float | int | str | dict[str, str]]:
        """For people and programs. Times in milliseconds; auc is nan where the lines have one class only."""
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) * 1e3
        return {
            "model_version": self.model_version,
            "table_versions": self.table_versions,
            "samples": len(self.scores),
            "requests": self.requests,
            "seconds": self.seconds,
            "samples_per_s": len(self.scores) / self.seconds,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "keys": self.keys,
            "keys_absent": self.keys_absent,
            "auc": criteo.auc(self.labels, self.scores),
        }


async def score(
    client: AsyncClient,
    model: str,
    batches: Iterator[CriteoRows],
    concurrency: int,
    timeout_s: float,
    progress: Callable[[int], object] = lambda samples: None,
) -> Scored:
    """Score batches of lines, `concurrency` requests at a time; raises the first error of any.

    Time counts from the first request on, over an open connection. Every answer must come from one model version and
    one version of each table; raises BadRequest if they differ, BadData for no lines.
    """
    scores: dict[int, NDArray[np.float32]] = {}
    labels: dict[int, NDArray[np.int8]] = {}
    latencies: list[float] = []
    versions: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    counts = {"keys": 0, "keys_absent": 0}
    first = next(batches, None)  # read before time counts: the first read may compile the reader
    if first is None:
        raise BadData("lines to score", "none", "at least one")
    numbered = enumerate(itertools.chain([first], batches))

    async def work() -> None:
        for number, batch in numbered:  # the workers share one iterator
            inputs: dict[str, NDArray[Any]] = {"dense": batch.dense, "keys": batch.keys, "lengths": batch.lengths}
            begin = time.perf_counter()
            answer = await client.infer(model, inputs, ["prob"], timeout_s=timeout_s)
            latencies.append(time.perf_counter() - begin)
            prob = answer.outputs["prob"]
            assert isinstance(prob, np.ndarray)
            if prob.shape != (len(batch.labels), 2):
                raise BadRequest(
                    f"model {model!r} output 'prob'", f"shape {list(prob.shape)}", f"[{len(batch.labels)}, 2]"
                )
            scores[number], labels[number] = prob[:, 1], batch.labels
            tables = tuple(sorted((k[6:], str(v)) for k, v in answer.facts.items() if k.startswith("table.")))
            versions.add((answer.version, tables))
            for name in counts:
                counts[name] += int(answer.facts.get(name, 0))
            progress(len(batch.labels))

    await client.metadata(model, timeout_s)
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    seconds = time.perf_counter() - begin
    if len(versions) != 1:
        raise BadRequest("answers", f"{len(versions)} combinations of versions", "one")
    ((version, tables),) = versions
    in_order = [np.concatenate([part[i] for i in range(len(part))]) for part in (scores, labels)]
    return Scored(
        in_order[0], in_order[1], version, dict(tables), len(latencies), seconds, np.array(latencies), **counts
    )  # fmt: skip


def batches_of(path: Path, size: int) -> Iterator[CriteoRows]:
    """The samples of a file, `size` at a time, in bounded memory; raises BadData."""
    for chunk in criteo.chunks(path):
        yield from chunk.batches(size)
