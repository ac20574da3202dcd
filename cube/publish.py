"""Directories that appear complete or not at all.

Built beside their place under a name that starts with a dot, forced to disk, renamed. A kill at any moment leaves
readers the old state or the new one, and at worst a dotted directory that the next builder of the same name removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cube.errors import BadData


@contextmanager
def publishing(place: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a fresh directory to fill; when the block ends without an error it becomes `place`.

    Raises BadData if `place` exists and may not be replaced. A replaced directory is moved aside first and removed
    last, so a reader that opened its files before keeps them.
    """
    if place.exists() and not replace:
        raise BadData(str(place), "an existing directory", "a new one: what is published never changes")
    draft = place.parent / f".{place.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for directory in (draft, *(p for p in draft.rglob("*") if p.is_dir())):
            _force(directory)
        old = place.parent / f".{place.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        draft.rename(place)
        _force(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _force(directory: Path) -> None:
    """fsync the names in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
