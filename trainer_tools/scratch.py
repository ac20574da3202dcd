"""Temporary files, in the directory that TMPDIR names, which may be another disk than the one of the result."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cube.errors import BadData

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: numpy wrote less than it was to


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the time of the block. Raises BadData naming its place where there is none, or no more room."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="prune-program."))
    except OSError as error:
        raise BadData("temporary files", error.strerror or error, "a directory to write to: TMPDIR") from error
    try:
        yield directory
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = f"temporary files in {directory.parent}"
        raise BadData(place, error.strerror or error, "a directory with more room: TMPDIR") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
