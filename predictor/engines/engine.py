"""What an engine is: the contract that one suite of tests holds all of them to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer_tools.manifest import Tensor

# The value of an input: an array, or, where `lod_levels` says so, sequences of different lengths one after another:
# (values, offsets), of which sequence i is values[offsets[i] : offsets[i + 1]]; offsets int64, from 0 to len(values).
Feed = NDArray[Any] | tuple[NDArray[Any], NDArray[np.int64]]

FITTING = "inputs that fit the program and each other"  # what a program expects that cannot compute with its inputs


class Engine(Protocol):
    """A loaded dense net. `run` may be called from several threads at once; its weights are there once."""

    platform: str  # as KServe's metadata calls it
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def lod_levels(self) -> Mapping[str, int]:
        """1 for each input that takes (values, offsets), and each output that is such a pair."""

    def run(self, feeds: Sequence[Feed]) -> list[Any]:
        """Outputs for inputs, both in the order of the lists above.

        Datatypes and declared shapes were checked; feeds may be read-only, and are only read. Outputs are arrays of
        their own or over memory that only they hold. Raises BadRequest where the program cannot compute with these
        values (ids outside its table, inputs that do not fit each other) and Overloaded where memory is short; after
        either the next run is as good as any. What else is raised is a fault of the program's.
        """

    def close(self) -> None:
        """Let go of the program and its weights. No run may be under way, and none may follow."""


def place_of(program: Path) -> str:
    """How an error of a run names the program: callers see it, and where files lie is not theirs to know."""
    return f"program {program.name!r}"
