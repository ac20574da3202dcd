"""What prune-program is asked, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainer_tools.programs.program import Candidate, Rules

TOLERANCE = 1e-6  # float32 rounding of a score; lookups are exact, so anything above is a wrong row or a wrong cut


@dataclass(frozen=True)
class Options:
    """What the user asked for, beyond the directory."""

    rules: Rules = field(default_factory=Rules)
    fetch: Sequence[str] = ()  # outputs to serve, instead of those the program names; Paddle only
    vocabularies: Mapping[str, Path] = field(default_factory=dict)  # table → file with the key of each row; Paddle only
    drop_zero_rows: bool = False
    verify_samples: int = 256  # random ones to compare on; 0: no proof
    verify_lines: Path | None = None  # Criteo lines to compare on too; torch only
    paddle_python: str | None = None  # interpreter that has Paddle, for the proof of a Paddle program
    show_progress: bool = False


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
    unproven: str = "--verify 0"  # why nothing was compared, if nothing was

    def __str__(self) -> str:
        (ops_before, ops_after), (bytes_before, bytes_after) = self.ops, self.program_bytes
        proof = f"original against pruned + rows on {self.compared:,} samples: largest difference"
        return "\n".join(
            [
                f"prune-program: {self.name} {self.version} ({self.format}) → {self.out}",
                *(described(candidate) for candidate in self.candidates),
                f"  ops    {ops_before} → {ops_after}",
                f"  bytes  {bytes_before:,} → {bytes_after:,}, {self.rows:,} rows exported",
                f"  proof  {proof} {self.largest_difference:g}"
                if self.compared
                else f"  proof  none: nothing was compared ({self.unproven})",
            ]
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
            "proof": {"samples": self.compared, "largest_difference": self.largest_difference}
            if self.compared
            else {"samples": 0, "reason": self.unproven},
        }
        return msgspec.json.format(msgspec.json.encode(said), indent=2).decode()


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
