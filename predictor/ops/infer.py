"""Program inputs → program outputs, by an engine."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from cube.errors import BadConfig, Internal
from predictor.engines.engine import Engine
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged, Value
from predictor.rows import join_rows, slice_rows
from trainer_tools.manifest import Tensor

NanPolicy = Literal["pass", "replace", "fail"]
NAN_POLICIES: tuple[NanPolicy, ...] = ("pass", "replace", "fail")


class Infer(Op):
    """One run of a dense net; of a large batch several at once, on its parts."""

    def __init__(self, engine: Engine, *, nan: NanPolicy = "pass", threads: int = 0, part_rows: int = 32):
        """nan: what becomes of outputs that are no numbers: they pass, become zeros, or the run fails.

        threads: above 1, a batch of more than `part_rows` rows is run as parts of that many rows by this many threads.
        """
        if nan not in NAN_POLICIES:
            raise BadConfig("nan", repr(nan), " or ".join(NAN_POLICIES))
        if threads < 0 or part_rows < 1:
            raise BadConfig("threads and part_rows", f"{threads} and {part_rows}", "at least 0 and 1")
        self._engine, self._nan, self._part_rows = engine, nan, part_rows
        self._takes = [tensor.name for tensor in engine.inputs]
        # A program that takes as many rows every time may make any number of marks of them, as taggers do of a sentence
        is_fixed = not any(port.goes_by_rows for port in self.wanted().values())
        self._makes = {
            name: port._replace(per_row=0) if is_fixed and not port.ragged else port
            for name, port in _ports(engine.outputs, engine.lod_levels).items()
        }
        self._ports: Mapping[str, Port] = {}
        self._threads = ThreadPoolExecutor(threads, "infer") if threads > 1 else None

    def wanted(self) -> Mapping[str, Port]:
        """The program's inputs."""
        return _ports(self._engine.inputs, self._engine.lod_levels)

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op. A feed may have an entry for each slot of each row; only it knows."""
        for name, expected in self.wanted().items():
            given = inputs[name]
            same_kind = (given.datatype, given.ragged) == (expected.datatype, expected.ragged)
            if not same_kind or not _fits(given.shape, expected.shape):
                raise BadConfig(f"input {name!r}", str(given), str(expected))
        self._ports = inputs
        if self._threads is not None and any(not p.goes_by_rows for p in (*inputs.values(), *self._makes.values())):
            raise BadConfig("threads", "a program whose inputs and outputs do not all go by rows", "1 thread")
        return self._makes

    def run(self, batch: Batch) -> Outputs:
        feeds = [batch[name] for name in self._takes]
        if self._threads is None or batch.rows <= self._part_rows:
            made = self._engine.run(feeds)
        else:
            made = self._in_parts(feeds, batch.rows)
        outputs = {name: _ragged(value) for name, value in zip(self._makes, made, strict=True)}
        if self._nan != "pass":
            self._settle(outputs)
        return outputs

    def close(self) -> None:
        """See Op."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _in_parts(self, feeds: Sequence[Value], rows: int) -> list[Any]:
        assert self._threads is not None
        ports = [self._ports[name] for name in self._takes]
        cuts = [(start, min(start + self._part_rows, rows)) for start in range(0, rows, self._part_rows)]
        parts = [[slice_rows(f, p, *cut) for f, p in zip(feeds, ports, strict=True)] for cut in cuts]
        made = [[_ragged(value) for value in part] for part in self._threads.map(self._engine.run, parts)]
        return [
            join_rows(values, port) for values, port in zip(zip(*made, strict=True), self._makes.values(), strict=True)
        ]

    def _settle(self, outputs: dict[str, Any]) -> None:
        for name, made in outputs.items():
            value: Any = made.values if isinstance(made, Ragged) else made
            if value.dtype.kind != "f" or np.isfinite(value).all():
                continue
            if self._nan == "fail":
                at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
                raise Internal(f"output {name!r}{list(at)}: found {value[at]}, expected a number")
            settled = np.where(np.isfinite(value), value, value.dtype.type(0))
            outputs[name] = Ragged(settled, made.offsets) if isinstance(made, Ragged) else settled


def _ports(tensors: Sequence[Tensor], lod_levels: Mapping[str, int]) -> dict[str, Port]:
    return {t.name: Port(t.datatype, tuple(t.shape), ragged=bool(lod_levels.get(t.name))) for t in tensors}


def _ragged(made: Any) -> Any:
    """An engine's pair of values and offsets as ops have it."""
    return Ragged(*made) if type(made) is tuple else made


def _fits(given: Sequence[int], expected: Sequence[int]) -> bool:
    return len(given) == len(expected) and all(a == b or -1 in (a, b) for a, b in zip(given, expected, strict=True))
