"""Keys → rows, out of a cube, in the version that the model was trained with."""

import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from cube.client import Answer, Ask, Cube, Rows
from cube.errors import BadRequest, DeadlineExceeded
from cube.version import Version
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged
from predictor.requests import keys_port
from trainer_tools.manifest import Lookup

Absent = Literal["zeros", "fail"]


class Gather(Op):
    """The rows of all lookups, asked for in one call. A key that is not in the table reads zeros and is marked."""

    waits: ClassVar[bool] = True

    def __init__(
        self,
        lookups: Sequence[Lookup],
        tables: Mapping[str, tuple[Version, int]],
        cube: Cube,
        timeout_s: float,
        absent: Absent = "zeros",
    ):
        """tables: version and dim of each. timeout_s: longest wait, where the caller set no deadline.

        absent: what becomes of a request with a key that its table does not have: "zeros", it reads them, or "fail".
        """
        self._lookups, self._tables, self._cube, self._timeout_s = lookups, tables, cube, timeout_s
        self._fails = absent == "fail"
        self._makes_up = False

    def wanted(self) -> Mapping[str, Port]:
        """The keys of each lookup."""
        return {lookup.keys: keys_port(lookup) for lookup in self._lookups}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        made = {}
        for lookup in self._lookups:
            keys, dim = keys_port(lookup), self._tables[lookup.table][1]
            made[rows_of(lookup)] = keys._replace(datatype="FP32", shape=(*keys.shape, dim))
            made[found_of(lookup)] = keys._replace(datatype="BOOL")
        return made

    def run(self, batch: Batch) -> Outputs | Awaitable[Outputs]:
        asks = [Ask(k.table, _flat(batch[k.keys]), self._tables[k.table][0]) for k in self._lookups]
        answer = self._made_up(asks) if self._makes_up else self._cube.lookup_now(asks)
        return self._made(batch, answer) if answer is not None else self._later(batch, asks)

    @contextmanager
    def with_made_up_rows(self) -> Iterator[None]:
        """In this block every key has a row, of numbers that depend on the key only: to try out what follows.

        Who makes up keys does not know which ones a table has, and rows of zeros tell nothing.
        """
        self._makes_up = True
        try:
            yield
        finally:
            self._makes_up = False

    def _made_up(self, asks: Sequence[Ask]) -> Answer:
        tables = []
        for ask in asks:
            columns = np.arange(1, self._tables[ask.table][1] + 1, dtype=np.uint64)
            mixed = (ask.keys[:, None] + np.uint64(1)) * columns * np.uint64(0x9E3779B97F4A7C15)
            rows = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
            tables.append(Rows(rows, np.ones(ask.keys.size, np.bool_), self._tables[ask.table][0]))
        return Answer(tables, {})

    async def _later(self, batch: Batch, asks: Sequence[Ask]) -> Outputs:
        return self._made(batch, await self._cube.lookup(asks, _left_s(batch, self._timeout_s)))

    def _made(self, batch: Batch, answer: Answer) -> Outputs:
        made: dict[str, Any] = {}
        for lookup, rows in zip(self._lookups, answer.tables, strict=True):
            if self._fails and not rows.found.all():
                key = _flat(batch[lookup.keys])[~rows.found][0]
                count = int(np.count_nonzero(~rows.found))
                found = f"{count} without a row, such as {key}"
                raise BadRequest(f"input {lookup.keys!r} keys", found, f"keys that table {lookup.table!r} has")
            keys = batch[lookup.keys]
            if isinstance(keys, Ragged):
                made[rows_of(lookup)] = Ragged(rows.rows, keys.offsets)
                made[found_of(lookup)] = Ragged(rows.found, keys.offsets)
            else:
                made[rows_of(lookup)] = rows.rows.reshape(*keys.shape, rows.rows.shape[1])
                made[found_of(lookup)] = rows.found.reshape(keys.shape)
        return made


def _left_s(batch: Batch, at_most: float) -> float:
    left_s = at_most if batch.deadline is None else min(batch.deadline - time.monotonic(), at_most)
    if left_s <= 0:
        raise DeadlineExceeded("the deadline has passed")
    return left_s


def _flat(keys: Any) -> NDArray[np.uint64]:
    flat: Any = keys.values if isinstance(keys, Ragged) else keys.reshape(-1)
    return flat  # type: ignore[no-any-return]


def rows_of(lookup: Lookup) -> str:
    """Name of the value that holds a lookup's rows."""
    return f"{lookup.feed} rows"  # several lookups may be of the same keys


def found_of(lookup: Lookup) -> str:
    """Name of the value that marks which keys of a lookup were found."""
    return f"{lookup.feed} found"
