"""A bound on what is done for people rather than for callers: recordings, requests that are looked into."""

from collections.abc import Iterator
from contextlib import contextmanager

from cube.errors import Overloaded


class AtOnce:
    """So many at once, and no more. Owned by the event loop."""

    def __init__(self, place: str, most: int):
        """place: for messages."""
        self._place, self._most, self._there = place, most, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """While the block runs there is one more; raises Overloaded where that is one too many."""
        if self._there >= self._most:
            raise Overloaded(f"{self._place}: {self._there} are being made, at most {self._most} may be at once")
        self._there += 1
        try:
            yield
        finally:
            self._there -= 1
