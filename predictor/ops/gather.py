"""Keys → rows, out of a cube, in the version that the model was trained with."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cube.client import Ask, Cube
from cube.rpc.calls import Call
from cube.version import Version
from predictor.ops.op import Values
from predictor.ops.sign import signed
from trainer_tools.manifest import Lookup


class Gather:
    """The rows of all lookups, asked for in one call. A key that is not in the table reads zeros and is counted."""

    compute: ClassVar[bool] = False

    def __init__(self, lookups: Sequence[Lookup], versions: Mapping[str, Version], cube: Cube, timeout_s: float):
        """versions: of each table."""
        self._lookups, self._versions, self._cube, self._timeout_s = lookups, versions, cube, timeout_s
        self.takes: tuple[str, ...] = tuple(signed(lookup) for lookup in lookups)
        self.makes: tuple[str, ...] = tuple(name for k in lookups for name in (rows_of(k), found_of(k)))

    async def run(self, values: Mapping[str, Any], call: Call) -> Values:
        timeout_s = call.remaining_s(at_most=self._timeout_s)
        asks = [Ask(k.table, values[signed(k)], self._versions[k.table]) for k in self._lookups]
        answer = await self._cube.lookup(asks, timeout_s)
        made: Values = {}
        for lookup, rows in zip(self._lookups, answer.tables, strict=True):
            made |= {rows_of(lookup): rows.rows, found_of(lookup): rows.found}
        return made


def rows_of(lookup: Lookup) -> str:
    """Name of the value that holds a lookup's rows."""
    return f"{lookup.keys} rows"


def found_of(lookup: Lookup) -> str:
    """Name of the value that marks which keys of a lookup were found."""
    return f"{lookup.keys} found"
