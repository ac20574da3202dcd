"""A torch program as a trainer left it, and what becomes of its lookups: as signature.json says, or without one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube import build
from cube.errors import BadData
from cube.keys import SIGN_RULE
from trainer_tools import manifest
from trainer_tools.export_rows import read_vocabulary
from trainer_tools.manifest import Signature, TrainedLookup
from trainer_tools.programs import torch_export
from trainer_tools.programs.program import Lookup
from trainer_tools.programs.torch_export import TorchProgram
from trainer_tools.programs.torch_lookups import TorchLookup
from trainer_tools.tables import Table, same_keys, tables_of

UNSIGNED = "none"  # of a manifest and a signature: keys are the program's own ids


class Trained(NamedTuple):
    """A program as a trainer left it."""

    directory: Path
    source: Path
    program: TorchProgram
    signature: Signature | None
    stem: str = ""  # of the file that was named

    @property
    def name(self) -> str:
        """Of the model."""
        return self.signature.name if self.signature else self.stem or self.directory.resolve().name

    @property
    def version(self) -> int:
        """Of the model; without a signature when the program was saved, in Unix seconds."""
        return self.signature.version if self.signature else int(self.source.stat().st_mtime)

    @property
    def place(self) -> str:
        """Of what is said in the signature."""
        return str(self.directory / manifest.SIGNATURE_FILE)


class Cut(NamedTuple):
    """A lookup that goes."""

    found: TorchLookup
    feed: str
    table: Table
    said: TrainedLookup | None  # by the trainer


def read(place: Path) -> Trained:
    """The program in a directory, or in the file that is named, and what its trainer said of it."""
    directory = place.parent if place.is_file() else place
    path = directory / manifest.SIGNATURE_FILE
    if place.is_file() and place != path:
        signature = manifest.read(Signature, path) if path.exists() else None
        if signature is None or manifest.inside(directory, signature.program, f"{path} program") != place:
            return Trained(directory, place, TorchProgram(torch_export.load(place)), None, place.stem)
    if not path.exists():
        found = sorted(directory.glob("*.pt2"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise BadData(str(directory), names, "one *.pt2, or signature.json, which names it")
        return Trained(directory, found[0], TorchProgram(torch_export.load(found[0])), None)
    signature = manifest.read(Signature, path)
    if signature.sign not in (SIGN_RULE, UNSIGNED):
        raise BadData(f"{path} sign", repr(signature.sign), f"{SIGN_RULE!r}, or {UNSIGNED!r} where keys are ids")
    source = manifest.inside(directory, signature.program, f"{path} program")
    return Trained(directory, source, TorchProgram(torch_export.load(source)), signature)


def said_of(trained: Trained) -> dict[str, TrainedLookup]:
    """What the signature says of each lookup that it names. Raises BadData for what it says of none, or unclearly."""
    assert trained.signature is not None, "only a trainer says something"
    said: dict[str, TrainedLookup] = {}
    for lookup in trained.signature.lookups:
        place = f"{trained.place} lookup of {lookup.ids!r}"
        found = [k for k in trained.program.found if _is_meant(lookup, k)]
        if not found or any(k.name in said for k in found):
            known = "; ".join(
                f"ids {k.called}, offsets {k.offsets or 'none'}, parameter {k.table}" for k in trained.program.found
            )
            what = "one that is named before" if found else f"ids {lookup.ids}, offsets {lookup.offsets or 'none'}"
            raise BadData(place, what, f"one of the program's lookups, once: {known or 'it has none'}")
        if len({k.table for k in found}) > 1:
            raise BadData(place, f"parameters {', '.join(k.table for k in found)}", "`parameter`, one of these")
        said |= {k.name: lookup for k in found}
    return said


def _is_meant(said: TrainedLookup, found: TorchLookup) -> bool:
    """Whether a lookup is the one that a trainer speaks of."""
    offsets = None if found.is_even else found.offsets
    if said.parameter is None:
        is_one = said.offsets == offsets
    else:  # that is enough, where offsets are arranged
        is_one = said.parameter == found.table and said.offsets in (None, offsets)
    return is_one and (said.ids in (found.called, found.ids) or [said.ids] == found.inputs)


def cuts_of(trained: Trained, lookups: Sequence[Lookup], vocabularies: Mapping[str, Path]) -> list[Cut]:
    """What is known of each lookup that goes. Raises BadData where that does not fit together.

    vocabularies: files with the keys of parameters, for a program without a signature; else keys are row numbers.
    """
    gone = {lookup.name: lookup for lookup in lookups}
    if trained.signature is None:
        tables, said = tables_of(lookups, vocabularies), dict[str, TrainedLookup]()
    else:
        said = said_of(trained)
        tables = _tables_said(trained, lookups, said)
    found = [k for k in trained.program.found if k.name in gone]
    cuts = [Cut(k, gone[k.name].feed, tables[k.table], said.get(k.name)) for k in found]
    for cut in cuts:
        _check(trained, cut, cuts)
    return cuts


def _tables_said(trained: Trained, lookups: Sequence[Lookup], said: Mapping[str, TrainedLookup]) -> dict[str, Table]:
    """The tables by parameter, under the names and keys that the trainer gave them."""
    vocabularies: dict[str, NDArray[np.uint64]] = {}
    tables: dict[str, Table] = {}
    for lookup in lookups:
        name, vocabulary = said[lookup.name].table, said[lookup.name].vocabulary
        build.check_table_name(name)
        if vocabulary is None:
            keys = np.arange(lookup.rows or 0, dtype=np.uint64)
        else:
            path = manifest.inside(trained.directory, vocabulary, f"{trained.place} vocabulary")
            keys = vocabularies[vocabulary] if vocabulary in vocabularies else read_vocabulary(path)
            vocabularies[vocabulary] = keys
        table = tables.setdefault(lookup.table, Table(name, keys))
        if table.name != name or not np.array_equal(table.keys, keys):
            found = f"{name!r} with {keys.size} keys, and {table.name!r} with {table.keys.size}"
            raise BadData(f"{trained.place} parameter {lookup.table}", found, "one table with one vocabulary")
        for parameter, other in tables.items():
            if other.name == name and parameter != lookup.table:
                found = f"parameters {parameter} and {lookup.table}"
                raise BadData(f"{trained.place} table {name!r}", found, "one parameter")
    return tables


def _check(trained: Trained, cut: Cut, cuts: Sequence[Cut]) -> None:
    """Raise BadData for a lookup that does not fit with the others, or with the program."""
    place = f"lookup {cut.found.name}"
    for other in cuts:
        if cut.found.ids == other.found.ids and not same_keys(cut.table.keys, other.table.keys):
            found = f"another than that of {other.found.name}, which reads the same ids"
            raise BadData(f"{place} vocabulary", found, "one for both: a request has one key for an id")
    padding = cut.found.padding
    if padding is not None and padding >= cut.table.keys.size and cut.found.pooling != "sum":
        found = f"row {padding}, which has no key"
        raise BadData(f"{place} padding_idx", found, f"a row with a key: an absent key counts in a {cut.found.pooling}")
    if cut.said is None:
        return
    slots = len(cut.said.slots)
    if cut.found.pooling == "none":
        columns = trained.program.nodes[cut.found.ids].meta["val"].shape[1:]
        last = columns[-1] if len(columns) and isinstance(columns[-1], int) else 1
        if slots not in (1, last):
            raise BadData(f"{place} slots", slots, f"1, or {last} as ids have columns")
    elif cut.found.slots != slots:
        expected = f"{cut.found.slots} in signature.json: the program reads as many bags a sample"
        raise BadData(f"{place} slots", slots, expected)
