"""Ops as users write them, named in tests as own_ops:Class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cube.errors import BadConfig, BadData
from predictor.ops.op import Op


class Own(Op):
    """An op of a user's, with every kind of argument."""

    def __init__(
        self,
        number: int,
        share: float = 0.5,
        names: Sequence[str] = (),
        on: bool = False,
        how: Literal["a", "b"] = "a",
        file: Path | None = None,
        more: list[float] = (),
        untold=None,
    ):
        if number < 0:
            raise BadConfig("number", number, "0 or more")
        if number == 13:
            raise BadData("file.txt:1", "x", "y")
        if number == 99:
            raise ZeroDivisionError("by 99")
        self.given = (number, share, names, on, how, file, more, untold)


class Plain(Op):
    """One without arguments."""


class Free(Op):
    """One that takes any."""

    def __init__(self, **config):
        self.config = config


not_an_op = 3


def halves(x):
    return x / 2
