"""A Python function as a dense net: arrays in, arrays out."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, Internal, OutOfMemory
from predictor.engines.engine import Feed
from predictor.named import imported
from predictor.tensors import DTYPES, shape_text
from trainer_tools.manifest import Tensor


class CallableEngine:
    """`module:function`, called with an array for each input, in their order.

    It returns an array for each output, in their order: a tuple or a list, or the array itself if there is one. It is
    called from several threads at once, and must not write to what it is given. What it raises reaches the caller if it
    is one of cube.errors, and is a fault in the server's log otherwise.
    """

    platform = "python"
    lod_levels: ClassVar[dict[str, int]] = {}

    def __init__(self, target: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]):
        """Import the function; raises BadConfig. What the module does when it is imported happens now."""
        for tensor in (*inputs, *outputs):
            if tensor.datatype not in DTYPES:
                raise BadConfig(f"callable {target} {tensor.name!r}", tensor.datatype, f"one of {', '.join(DTYPES)}")
        function = imported(target, f"callable {target}", "function")
        if not callable(function):
            raise BadConfig(f"callable {target}", f"a {type(function).__name__}", "a function")
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._function, self._target = function, target

    def run(self, feeds: Sequence[Feed]) -> list[NDArray[Any]]:
        """See Engine. Internal where the function's answer is not what was declared."""
        try:
            made = self._function(*feeds)
        except MemoryError as error:
            raise OutOfMemory(f"callable {self._target}: not enough memory for this request") from error
        arrays = list(made) if isinstance(made, tuple | list) else [made]
        if len(arrays) != len(self.outputs):
            raise Internal(f"callable {self._target}: made {len(arrays)} outputs, not {len(self.outputs)}")
        for tensor, array in zip(self.outputs, arrays, strict=True):
            if not isinstance(array, np.ndarray) or not _fits(tensor, array):
                found = f"{array.dtype} {shape_text(array.shape)}" if isinstance(array, np.ndarray) else type(array)
                declared = f"{tensor.datatype} {shape_text(tensor.shape)}"
                raise Internal(f"callable {self._target}: output {tensor.name!r} is {found}, not {declared}")
        return arrays

    def close(self) -> None:
        """See Engine. The module stays imported."""


def _fits(tensor: Tensor, array: NDArray[Any]) -> bool:
    return (
        array.dtype == DTYPES[tensor.datatype]
        and array.ndim == len(tensor.shape)
        and all(size in (-1, found) for size, found in zip(tensor.shape, array.shape, strict=True))
    )
