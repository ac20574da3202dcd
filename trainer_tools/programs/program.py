"""What prune-program asks of every program format, and the one rule for which lookups go.

A format reads a directory into a `TrainedProgram` and says of each lookup in it what it is and, where it cannot be cut,
why. `decide` makes of that, and of what the user asked for, which lookups go; the format then cuts exactly those.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from numpy.typing import NDArray

from cube.errors import BadData
from trainer_tools.graph_picture import Graph
from trainer_tools.manifest import Tensor

MIN_ROWS = 1000  # smaller tables (positions, weekdays, marks) cost a dense program nothing, and a lookup costs a call


class Lookup(NamedTuple):
    """One lookup of a program."""

    name: str  # of its output in the program; unique
    op: str  # the program's word for what does it
    table: str  # name of the parameter
    rows: int | None  # None: they are not in the program's files but on a parameter server
    dim: int
    ids: str  # name of what it reads
    feed: str  # name of the input that takes its place
    obstacle: str = ""  # why it cannot be cut; empty if it can


class Ids(NamedTuple):
    """What a lookup reads."""

    reads: str  # the program's value that holds them, with what it adds to them
    inputs: list[str]  # of the program, from which they are arranged; mostly they are one as it is
    padding: int | None = None  # the id that reads zeros whatever the table holds
    has_lengths: bool = False  # a request holds them one after another, and how many each sample has
    added: tuple[int, ...] = ()  # what the program adds to ids before it looks them up; see manifest.Lookup
    is_sum: bool = False  # a request holds them with that, for their name without it means those of another lookup
    outside: "Outside | None" = None  # None: nothing was done to them


class Outside(NamedTuple):
    """What ops that go with a lookup did to ids outside its table."""

    told: str  # for people
    has_below: bool  # whether ids below 0 had a row, and read zeros now
    has_beyond: bool  # whether ids beyond the last had one, and read zeros now

    @property
    def read_zeros(self) -> bool:
        """Whether some do."""
        return self.has_below or self.has_beyond


class Rules(NamedTuple):
    """What the user asked for. Names are those of lookups or of tables."""

    min_rows: int | None = None  # None: MIN_ROWS, or 0 where the trainer named the lookups
    keep: Collection[str] = ()
    only: Collection[str] = ()


class Candidate(NamedTuple):
    """A lookup, whether it goes, and why."""

    lookup: Lookup
    is_cut: bool
    reason: str


class TrainedProgram(Protocol):
    """A program with its tables. Its files are read, never written; nothing in them is run."""

    @property
    def format(self) -> str:
        """As in a manifest."""

    def inputs(self) -> list[Tensor]:
        """Name, datatype and shape of each input, in order."""

    def outputs(self) -> list[Tensor]:
        """The same of each output."""

    def ops(self) -> int:
        """How many operations a run does."""

    def random_ops(self) -> list[str]:
        """Its ops that compute something else in every run, for people: OP (name)."""

    def graph(self) -> Graph:
        """What it computes, to be drawn; bodies of loops and branches are one op with what holds them."""

    def lookups(self) -> list[Lookup]:
        """Every lookup that the outputs depend on, in the program's order."""

    def table(self, name: str) -> NDArray[Any]:
        """A parameter, float32 or float16 [rows, dim], memory-mapped where the format allows. Raises BadData."""

    def cut(self, lookups: Sequence[Lookup]) -> Self:
        """The program without these lookups and without the tables that nothing else reads, checked.

        Each lookup's output is an input now, named `feed`. Inputs nobody reads any more go, the others keep their
        order, the new ones come last. Raises BadData.
        """

    def write(self, directory: Path) -> str:
        """Write program and parameters into an empty directory; the program's file in it."""


def decide(program: TrainedProgram, rules: Rules) -> list[Candidate]:
    """Which lookups go. Raises BadData for a name nobody has, and for --only of a lookup that cannot be cut."""
    lookups = program.lookups()
    known = {name for lookup in lookups for name in (lookup.name, lookup.table)}
    for flag, names in (("--keep", rules.keep), ("--only", rules.only)):
        for name in names:
            if name not in known:
                raise BadData(flag, repr(name), f"a lookup or table: {', '.join(sorted(known)) or 'there is none'}")
    return [_decided(lookup, rules) for lookup in lookups]


def chosen(candidates: Sequence[Candidate], place: str) -> list[Lookup]:
    """The lookups that go; raises BadData if that is none."""
    found = [candidate.lookup for candidate in candidates if candidate.is_cut]
    if not found:
        stay: dict[str, list[str]] = {}
        for candidate in candidates:
            stay.setdefault(candidate.reason, []).append(candidate.lookup.name)
        why = "; ".join(f"{_listed(names)}: {reason}" for reason, names in stay.items())
        raise BadData(place, f"no lookup to cut{': ' if why else ''}{why}", "one; a dense program is served as it is")
    return found


def readers(candidates: Sequence[Candidate], reads: Callable[[Lookup], Collection[str]]) -> dict[str, list[str]]:
    """Of each input that lookups read which stay: these, for people. reads: the inputs that a lookup reads."""
    found: dict[str, list[str]] = {}
    for lookup, is_cut, reason in candidates:
        for name in () if is_cut else reads(lookup):
            found.setdefault(name, []).append(f"{lookup.name} over {lookup.table}, which stays ({reason})")
    return found


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} stays"
    return f"{', '.join(names[:3])} stay" if len(names) < 4 else f"{names[0]} and {len(names) - 1} others stay"


def _decided(lookup: Lookup, rules: Rules) -> Candidate:
    names = {lookup.name, lookup.table}
    if names.intersection(rules.keep):
        return Candidate(lookup, False, "--keep names it")
    if lookup.obstacle:
        if names.intersection(rules.only):
            raise BadData(f"--only, lookup {lookup.name}", lookup.obstacle, "a lookup that can be cut")
        return Candidate(lookup, False, lookup.obstacle)
    if rules.only:
        is_named = bool(names.intersection(rules.only))
        return Candidate(lookup, is_named, "--only names it" if is_named else "--only does not name it")
    if lookup.rows is None:
        return Candidate(lookup, True, f"rows of {lookup.dim} on a parameter server")
    least = MIN_ROWS if rules.min_rows is None else rules.min_rows
    if lookup.rows < least:
        return Candidate(lookup, False, f"{lookup.rows:,} rows, fewer than --min-rows {least:,}")
    return Candidate(lookup, True, f"{lookup.rows:,} rows of {lookup.dim}")
