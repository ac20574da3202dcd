"""Raw texts → keys, for callers that do not sign features themselves. Keys pass through."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from cube.keys import signs
from cube.rpc.calls import Call
from predictor.ops.op import Values
from predictor.ops.read import offsets_of
from trainer_tools.manifest import Lookup


class Sign:
    """The keys of one lookup, by the rule that the trainer used."""

    compute: ClassVar[bool] = False

    def __init__(self, lookup: Lookup):
        self._lookup = lookup
        self._numbers = np.array([slot.number for slot in lookup.slots], np.int64)
        self.takes: tuple[str, ...] = (lookup.keys, lookup.text, offsets_of(lookup))
        self.makes: tuple[str, ...] = (signed(lookup),)

    def run(self, values: Mapping[str, Any], call: Call) -> Values:
        texts = values[self._lookup.text]
        if texts is None:
            return {signed(self._lookup): values[self._lookup.keys]}
        lengths = np.diff(values[offsets_of(self._lookup)])
        slots = np.repeat(np.resize(self._numbers, lengths.size), lengths)
        return {signed(self._lookup): signs(slots, texts.data, texts.starts, texts.sizes)}


def signed(lookup: Lookup) -> str:
    """Name of the value that holds a lookup's keys."""
    return f"{lookup.keys} signed"
