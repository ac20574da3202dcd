"""Parameters that become tables of a cube: under which names and keys, and writing them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.build import check_table_name
from cube.errors import BadData
from cube.keys import SIGN_RULE, signs_of
from cube.version import Version
from trainer_tools import manifest
from trainer_tools.export_rows import ROWS_DIRECTORY, build_cube, read_vocabulary, rows_of
from trainer_tools.programs.program import Lookup, TrainedProgram

# Slots and texts that a wrong implementation signs otherwise: no text, more bytes than one word and than one block of
# the hash, bytes above 127, a slot of no bits and one of many.
_SIGNED = (
    (0, ""), (1, "68fd1e64"), (26, "a"), (7, "0123456789abcdef" * 2), (9, "x" * 203), (65535, "élan"),
    ((1 << 53) - 1, "日本語 click"),
)  # fmt: skip


class Table(NamedTuple):
    """Where the rows of a parameter go: a table of a cube, row i under keys[i]."""

    name: str
    keys: NDArray[np.uint64]


def tables_of(lookups: Sequence[Lookup], vocabularies: Mapping[str, Path]) -> dict[str, Table]:
    """The tables of lookups that go, by parameter, as far as their rows are in the program's files.

    Keys are ids, or what a vocabulary gives for each table. Raises BadData.
    """
    rows = {lookup.table: lookup.rows for lookup in lookups if lookup.rows is not None}
    if vocabularies and set(vocabularies) != set(rows):
        found = ", ".join(sorted(vocabularies))
        raise BadData("--vocabulary", found, f"one for each table that goes, or none: {', '.join(sorted(rows))}")
    tables: dict[str, Table] = {}
    for parameter, count in rows.items():
        name = parameter.replace("/", "_").lstrip(".")
        check_table_name(name)
        if name in (table.name for table in tables.values()):
            raise BadData(f"table {parameter!r}", f"a second {name!r}", "parameters whose names differ without '/'")
        keys = np.arange(count, dtype=np.uint64)
        tables[parameter] = Table(name, read_vocabulary(vocabularies[parameter]) if vocabularies else keys)
    first: dict[str, str] = {}
    for lookup in lookups:
        other = first.setdefault(lookup.ids, lookup.table)
        if lookup.rows is not None and other in tables and not same_keys(tables[lookup.table].keys, tables[other].keys):
            found = f"another than that of {other!r}, which is read by the same ids"
            raise BadData(f"--vocabulary {lookup.table}", found, "one for both: a request has one key for an id")
    return tables


def sign_vectors(sign: str) -> list[manifest.SignVector]:
    """What a manifest shows of how keys are made. sign: as it says; "none": nothing."""
    if sign != SIGN_RULE:
        return []
    keys = signs_of([slot for slot, _ in _SIGNED], [text.encode() for _, text in _SIGNED])
    return [manifest.SignVector(slot, text, f"{key:016x}") for (slot, text), key in zip(_SIGNED, keys, strict=True)]


def are_row_numbers(keys: NDArray[np.uint64]) -> bool:
    """Whether keys are row numbers."""
    return bool(np.array_equal(keys, np.arange(keys.size, dtype=np.uint64)))


def same_keys(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> bool:
    """Whether ids mean the same keys in both, of which one may have more."""
    return one is other or np.array_equal(one, other) or (are_row_numbers(one) and are_row_numbers(other))


def export(
    program: TrainedProgram,
    tables: Mapping[str, Table],
    paddings: Mapping[str, int | None],
    draft: Path,
    version: Version,
    drop_zero_rows: bool,
) -> dict[str, manifest.Table]:
    """Write tables below `draft`: rows for cube-build, and the same as a cube.

    paddings: by parameter, the row that counts as zeros.
    """
    exported = write_rows(program, tables, paddings, draft, version, drop_zero_rows)
    build_cubes(draft, exported)
    return exported


def write_rows(
    program: TrainedProgram,
    tables: Mapping[str, Table],
    paddings: Mapping[str, int | None],
    draft: Path,
    version: Version,
    drop_zero_rows: bool,
) -> dict[str, manifest.Table]:
    """The first half of `export`, after which the program's tables are not needed."""
    written = {}
    for parameter, table in tables.items():
        rows = rows_of(table.name, program.table(parameter), table.keys, paddings.get(parameter))
        count = rows.write(draft / ROWS_DIRECTORY / table.name, drop_zero_rows)
        written[table.name] = manifest.Table(version=str(version), dim=rows.rows.shape[1], rows=count, absent="zeros")
    return written


def build_cubes(draft: Path, tables: Mapping[str, manifest.Table]) -> None:
    """The second half: the rows that are there as a cube."""
    for name, table in tables.items():
        build_cube(draft, name, Version.parse(table.version))
