"""torch.export programs on the CPU."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from trainer_tools.programs import torch_export


class TorchEngine:
    """One program, its weights shared by all threads; each run uses the calling thread only."""

    platform = "torch_export"

    def __init__(self, path: Path):
        """Load a .pt2; raises BadData."""
        torch.set_num_threads(1)  # requests run beside each other, not one request on all cores
        program = torch_export.load(path)
        self.inputs, self.outputs = torch_export.inputs_of(program), torch_export.outputs_of(program)
        self._module = torch_export.runnable(program)

    def run(self, feeds: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # arrays over a request's bytes are read-only, and only read
            return [output.numpy() for output in self._module(*map(torch.from_numpy, feeds))]
