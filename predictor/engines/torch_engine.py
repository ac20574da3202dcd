"""torch.export programs on the CPU."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools.programs import torch_export


class TorchEngine:
    """One program, its weights shared by all threads; each run uses the calling thread only."""

    platform = "torch_export"

    def __init__(self, path: Path):
        """Load a .pt2; raises BadData."""
        torch.set_num_threads(1)  # requests run beside each other, not one request on all cores
        _silence_read_only_warning()
        program = torch_export.load(path)
        if torch_export.is_stateful(program):
            expected = "a program whose answer depends on its inputs only"
            raise BadData(str(path), "a program that changes its own buffers or inputs", expected)
        self.inputs, self.outputs = torch_export.inputs_of(program), torch_export.outputs_of(program)
        self._module = torch_export.runnable(program)

    def run(self, feeds: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        with torch.inference_mode():
            return [output.numpy() for output in self._module(*map(torch.from_numpy, feeds))]


def _silence_read_only_warning() -> None:
    """torch warns once per process of a tensor over a read-only array. Ours lie over a request's bytes: only read."""
    read_only = np.zeros(1, np.float32)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(read_only)
