"""The version of a table: which base it is, and how many deltas were laid over it."""

from typing import NamedTuple

from cube.errors import BadData

_LIMIT = 1 << 63


class Version(NamedTuple):
    """`base@delta`, ordered: a later base beats any delta of an earlier one."""

    base: int
    delta: int = 0

    def __str__(self) -> str:
        return f"{self.base}@{self.delta}"

    @classmethod
    def parse(cls, text: str, place: str = "version") -> "Version":
        """Read `base@delta` (or `base` alone, delta 0), both decimal numbers below 2**63; raises BadData."""
        base, _, delta = text.partition("@")
        if not all(part.isascii() and part.isdigit() for part in (base, delta or "0")):
            raise BadData(place, repr(text), "base@delta, two decimal numbers such as 1763766000@0")
        version = cls(int(base), int(delta or "0"))
        if max(version) >= _LIMIT:
            raise BadData(place, repr(text), "numbers below 2**63")
        return version
