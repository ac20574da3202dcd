"""Keys → rows, out of a cube, in the version that the model was trained with."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cube.client import Cube
from cube.rpc.calls import Call
from cube.version import Version
from predictor.ops.op import Values
from predictor.ops.sign import signed
from trainer_tools.manifest import Lookup


class Gather:
    """The rows of all lookups, asked for at once. A key that is not in the table reads zeros and is counted."""

    compute: ClassVar[bool] = False

    def __init__(self, lookups: Sequence[Lookup], versions: Mapping[str, Version], cube: Cube, timeout_s: float):
        """versions: of each table."""
        self._lookups, self._versions, self._cube, self._timeout_s = lookups, versions, cube, timeout_s
        self.takes: tuple[str, ...] = tuple(signed(lookup) for lookup in lookups)
        self.makes: tuple[str, ...] = tuple(name for k in lookups for name in (rows_of(k), found_of(k)))

    async def run(self, values: Mapping[str, Any], call: Call) -> Values:
        timeout_s = call.remaining_s(at_most=self._timeout_s)
        asked = [
            self._cube.gather(lookup.table, self._versions[lookup.table], values[signed(lookup)], timeout_s)
            for lookup in self._lookups
        ]
        made: Values = {}
        for lookup, rows in zip(self._lookups, await asyncio.gather(*asked), strict=True):
            made |= {rows_of(lookup): rows.rows, found_of(lookup): rows.found}
        return made


def rows_of(lookup: Lookup) -> str:
    """Name of the value that holds a lookup's rows."""
    return f"{lookup.keys} rows"


def found_of(lookup: Lookup) -> str:
    """Name of the value that marks which keys of a lookup were found."""
    return f"{lookup.keys} found"
