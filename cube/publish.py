"""Directories that appear complete or not at all.

Built beside their place under a name that starts with a dot, forced to disk, renamed. A kill at any moment leaves
readers the old state or the new one, and at worst a dotted directory that the next builder of the same name removes.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cube.errors import BadData

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, linux/fs.h


@contextmanager
def publishing(place: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a fresh directory to fill; when the block ends without an error it becomes `place`.

    Raises BadData if `place` exists and may not be replaced. Who has files of a replaced directory open keeps them.
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
        if place.exists():
            _exchange(draft, place)
        else:
            draft.rename(place)
        _force(place.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # after an exchange: what was replaced


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step, where the file system can; else in three, undone if the second fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    aside = other.parent / f".{other.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _force(directory: Path) -> None:
    """fsync the names in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
