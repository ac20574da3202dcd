"""Keys → rows, out of a cube, in the version that the model was trained with."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cube.client import Cube
from cube.rpc.calls import Call
from cube.version import Version
from predictor.ops.op import Values
from predictor.ops.sign import signed
from trainer_tools.manifest import Lookup


class Gather:
    """The rows of one lookup. A key that is not in the table reads zeros and is counted."""

    compute: ClassVar[bool] = False

    def __init__(self, lookup: Lookup, version: Version, cube: Cube, timeout_s: float):
        self._lookup, self._version, self._cube, self._timeout_s = lookup, version, cube, timeout_s
        self.takes: tuple[str, ...] = (signed(lookup),)
        self.makes: tuple[str, ...] = (rows_of(lookup), found_of(lookup))

    async def run(self, values: Mapping[str, Any], call: Call) -> Values:
        keys = values[signed(self._lookup)]
        timeout_s = call.remaining_s(at_most=self._timeout_s)
        rows = await self._cube.gather(self._lookup.table, self._version, keys, timeout_s)
        return {rows_of(self._lookup): rows.rows, found_of(self._lookup): rows.found}


def rows_of(lookup: Lookup) -> str:
    """Name of the value that holds a lookup's rows."""
    return f"{lookup.keys} rows"


def found_of(lookup: Lookup) -> str:
    """Name of the value that marks which keys of a lookup were found."""
    return f"{lookup.keys} found"
