"""Which processes run on this machine."""

import contextlib
from pathlib import Path


def processes_that_name(place: Path) -> list[str]:
    """Command lines of the running processes that name a file or directory, whoever started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(place) in line:
                found.append(line)
    return found
