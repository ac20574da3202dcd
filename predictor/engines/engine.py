"""What an engine is."""

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from trainer_tools.manifest import Tensor


class Engine(Protocol):
    """A loaded dense net. Its methods may be called from several threads at once."""

    platform: str  # as KServe's metadata calls it
    inputs: list[Tensor]
    outputs: list[Tensor]

    def run(self, feeds: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs for inputs, both in the order of the lists above. Shapes and datatypes were checked."""
