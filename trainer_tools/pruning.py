"""What prune-program is asked, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import DataCorrupt
from trainer_tools.accuracy import Accuracy, Wanted
from trainer_tools.graph_picture import picture
from trainer_tools.programs.program import Candidate, Rules, TrainedProgram

# Of max(1, |output|): float32 rounding. Lookups are exact, so anything above is a wrong row or a wrong cut.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Options:
    """What the user asked for, beyond the directory."""

    rules: Rules = field(default_factory=Rules)
    fetch: Sequence[str] = ()  # outputs to serve, instead of those the program names
    vocabularies: Mapping[str, Path] = field(default_factory=dict)  # table → file with the key of each row
    drop_zero_rows: bool = False
    wanted: Wanted = field(default_factory=Wanted)  # of the local cube: its row format, and what that may do to scores
    verify_samples: int = 256  # random ones to compare on; 0: no proof
    verify_lines: Path | None = None  # Criteo lines to compare on too; torch only
    paddle_python: str | None = None  # interpreter that has Paddle, for the proof of a Paddle program
    draw: bool = False  # a picture of the program before and after
    show_progress: bool = False


class Difference(NamedTuple):
    """How far two runs of a program are apart, at the worst of all numbers that come out."""

    largest: float = 0.0  # absolute; infinite between NaN and a number, and where shapes differ
    ulps: float = 0.0  # in steps from one number to the next of the output's type; 0: the same bits, but for -0 and NaN
    relative: float = 0.0  # in parts of max(1, |output|): what TOLERANCE bounds

    def or_larger(self, other: "Difference") -> "Difference":
        """The worst of both."""
        return Difference(*map(max, self, other))

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than that."""
        return self.relative <= TOLERANCE

    def check(self, out: Path) -> None:
        """Raise DataCorrupt if it is more than rounding."""
        if not self.is_rounding:
            found = f"outputs that differ by {self.largest:g} ({self.ulps:g} ulps)"
            raise DataCorrupt(f"{out} proof", found, f"at most {TOLERANCE:g} of max(1, |output|): nothing was written")


ENDLESS = Difference(float("inf"), float("inf"), float("inf"))


def difference(one: NDArray[Any], other: NDArray[Any]) -> Difference:
    """Between an output of the original program, any numeric or boolean array, and the same of the pruned one."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return ENDLESS
    if not one.size:
        return Difference()
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(
            (a == b) | (np.isnan(a) & np.isnan(b)), 0, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf)
        )
        size = np.maximum(np.abs(a), np.abs(b))
        step = _spacing(size.astype(one.dtype)) if one.dtype.kind == "f" else np.ones(1)
        ulps = np.where(np.isfinite(size), apart / step.astype(np.float64), apart)
        relative = np.where(np.isfinite(size), apart / np.maximum(1, size), apart)
    return Difference(float(apart.max()), float(ulps.max()), float(relative.max()))


def _spacing(size: NDArray[Any]) -> NDArray[Any]:
    """From numbers, not negative, to the next of their type; from the largest, to the one before."""
    spacing: NDArray[Any] = np.spacing(np.minimum(size, np.nextafter(np.finfo(size.dtype).max, size.dtype.type(0))))
    return spacing


@dataclass(frozen=True)
class Report:
    """What was done and found. `str` is for people, `json` for programs."""

    out: Path
    name: str
    version: int
    format: str
    candidates: list[Candidate]
    ops: tuple[int, int]  # before, after
    program_bytes: tuple[int, int]  # program and parameters, before and after
    rows: int
    compared: int  # samples
    largest_difference: float
    largest_ulps: float | None = None  # the same in steps between neighbouring numbers; None: not known
    # on ids outside the tables, which read zeros now; None: the program gave them no row, or nothing was compared
    largest_outside: float | None = None
    unproven: str = "--verify 0"  # why nothing was compared, if nothing was
    picture: str = ""  # of the program before and after, as SVG, if it was asked for
    row_format: str = "f32"  # of the local cube
    accuracy: Accuracy | None = None  # what that does to the scores

    def __str__(self) -> str:
        (ops_before, ops_after), (bytes_before, bytes_after) = self.ops, self.program_bytes
        return "\n".join(
            [
                f"prune-program: {self.name} {self.version} ({self.format}) → {self.out}",
                *(described(candidate) for candidate in self.candidates),
                f"  ops    {ops_before} → {ops_after}",
                f"  bytes  {bytes_before:,} → {bytes_after:,}, {self.rows:,} rows exported",
                f"  proof  {self._proof()}",
                *self._rows(),
            ]
        )

    def _rows(self) -> list[str]:
        if self.accuracy:
            return [f"  check  {self.accuracy}"]
        return (
            []
            if self.row_format == "f32"
            else [f"  check  none: what {self.row_format} rows do is not known (--check)"]
        )

    def _proof(self) -> str:
        if not self.compared:
            return f"none: nothing was compared ({self.unproven})"
        ulps = "" if self.largest_ulps is None else f"{self.largest_ulps:g} ulps; "
        outside = ""
        if self.largest_outside is not None:
            outside = f"; on ids outside the tables, which read zeros now, {self.largest_outside:g}"
        return (
            f"original against pruned + rows on {self.compared:,} samples: largest difference "
            f"{self.largest_difference:g} ({ulps}allowed {TOLERANCE:g} of max(1, |output|)){outside}"
        )

    def json(self) -> str:
        """The same as one JSON object."""
        said = {
            "out": str(self.out),
            "name": self.name,
            "version": self.version,
            "format": self.format,
            "lookups": [facts(candidate) for candidate in self.candidates],
            "ops": {"before": self.ops[0], "after": self.ops[1]},
            "bytes": {"before": self.program_bytes[0], "after": self.program_bytes[1]},
            "rows": self.rows,
            "proof": {
                "samples": self.compared,
                "largest_difference": self.largest_difference,
                "largest_ulps": self.largest_ulps,
                "largest_outside": self.largest_outside,
                "allowed": TOLERANCE,
            }
            if self.compared
            else {"samples": 0, "reason": self.unproven},
            "row_format": self.row_format,
            "accuracy": self.accuracy and self.accuracy._asdict(),
        }
        return msgspec.json.format(msgspec.json.encode(said), indent=2).decode()


def drawn(options: Options, before: TrainedProgram, after: TrainedProgram, candidates: Sequence[Candidate]) -> str:
    """The picture, if it was asked for, else nothing."""
    if not options.draw:
        return ""
    gone = [candidate.lookup for candidate in candidates if candidate.is_cut]
    stay = [candidate.lookup for candidate in candidates if not candidate.is_cut]
    return picture(before.graph(), after.graph(), gone, stay)


def facts(candidate: Candidate) -> dict[str, Any]:
    """One lookup as JSON has it."""
    said = candidate.lookup._asdict() | {"is_cut": candidate.is_cut, "reason": candidate.reason}
    del said["obstacle"]  # it is the reason then
    return said


def described(candidate: Candidate) -> str:
    """One lookup on one line."""
    lookup = candidate.lookup
    what = f"{lookup.op} {lookup.name} over {lookup.table or 'no table'}"
    if candidate.is_cut:
        return f"  cut    {what}, ids {lookup.ids} → input {lookup.feed} ({candidate.reason})"
    return f"  stays  {what} ({candidate.reason})"
