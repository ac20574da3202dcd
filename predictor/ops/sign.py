"""Raw texts → keys, for workflows whose callers do not sign features themselves."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cube.keys import signs
from predictor.ops.op import Batch, Op, Outputs, Port, Ragged
from predictor.tensors import Texts


class Sign(Op):
    """Keys of texts, by the rule that trainers use. Bag after bag, the slots of a sample have these numbers."""

    def __init__(self, slots: Sequence[int], text: str = "text", keys: str = "keys"):
        """slots: the number of each slot, the seed of its features' signs. text, keys: names of input and output."""
        self._slots = np.array(slots, np.int64)
        self._text, self._keys = text, keys

    def wanted(self) -> Mapping[str, Port]:
        """The texts."""
        return {self._text: Port("BYTES", (-1,), ragged=True, per_row=len(self._slots))}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        super().bind(inputs)
        return {self._keys: Port("UINT64", (-1,), ragged=True, per_row=len(self._slots))}

    def run(self, batch: Batch) -> Outputs:
        return {self._keys: signed(batch[self._text], self._slots)}


def signed(text: Ragged, slots: NDArray[np.int64]) -> Ragged:
    """The keys of raw features. text: bags of BYTES, for each sample one bag for each of `slots`."""
    values, offsets = text
    assert isinstance(values, Texts)  # the port says so
    lengths = np.diff(offsets)
    numbers = np.repeat(np.resize(slots, lengths.size), lengths)
    return Ragged(signs(numbers, values.data, values.starts, values.sizes), offsets)
