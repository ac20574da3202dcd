"""What an op is.

An op is an object with names of values it takes, names of values it makes, and `run`. It keeps nothing of a request:
the same op runs many requests at once. `compute` says that `run` is a plain function that keeps a core busy: the
executor runs it in a compute thread. Without it, `run` may be a coroutine.
"""

from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar, Protocol

from cube.rpc.calls import Call

Values = dict[str, Any]  # numpy arrays and Texts by name


class Op(Protocol):
    """A step."""

    compute: ClassVar[bool]
    takes: tuple[str, ...]
    makes: tuple[str, ...]

    def run(self, values: Mapping[str, Any], call: Call) -> Values | Awaitable[Values]:
        """Values made, by name, from a request's values so far."""
