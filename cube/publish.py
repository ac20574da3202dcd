"""Directories that appear complete or not at all.

Built beside their place under a name that starts with a dot, every file forced to disk, renamed. A kill at any moment
leaves readers the old state or the new one, and at worst a dotted directory that nobody reads. (On file systems that
cannot exchange two names in one step, a kill in the middle of a replacement leaves the old state under a dotted name.)
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cube.errors import BadData

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # Linux: fcntl.h, linux/fs.h


@contextmanager
def publishing(place: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a fresh directory to fill; when the block ends without an error it becomes `place`.

    Raises BadData if `place` exists, or has come to exist, and may not be replaced. Builders of one place do not touch
    each other's drafts; one of them wins. Who has files of a replaced directory open keeps them.
    """
    if place.exists() and not replace:
        raise exists_already(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".draft", dir=place.parent))
    try:
        draft.chmod(0o755)
        yield draft
        publish(draft, place, replace)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # after an exchange: what was replaced


def publish(draft: Path, place: Path, replace: bool = False) -> None:
    """Make a filled directory beside `place`, or in a directory beside it, be `place`; raises BadData if that exists.

    Where it replaces, the draft is afterwards what was replaced.
    """
    for path in (draft, *draft.rglob("*")):
        _force(path)
    if replace and place.exists():
        _exchange(draft, place)
    else:
        _move(draft, place)
    for directory in (place.parent, place.parent.parent):
        _force(directory)


def exists_already(place: Path) -> BadData:
    """What whoever wants to publish at `place` is told."""
    return BadData(str(place), "an existing directory", "a new one: what is published never changes")


def _move(draft: Path, place: Path) -> None:
    """Rename to a name that must not exist; raises BadData if it does by now."""
    failed = _renameat2(draft, place, _RENAME_NOREPLACE)
    if failed in (errno.EINVAL, errno.ENOSYS):  # this file system cannot say "only if it is not there"
        failed = errno.EEXIST if place.exists() else 0
        if not failed:
            draft.rename(place)
    if failed == errno.EEXIST:
        raise exists_already(place)
    if failed:
        raise OSError(failed, os.strerror(failed), str(place))


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step, where the file system can; else in three, undone if the second fails."""
    if not _renameat2(one, other, _RENAME_EXCHANGE):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name}.", suffix=".old", dir=other.parent))
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _renameat2(one: Path, other: Path, flags: int) -> int:
    """renameat2(2); returns 0 or the error number."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags)
    return 0 if done == 0 else ctypes.get_errno()


def _force(path: Path) -> None:
    """fsync a file's bytes or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
