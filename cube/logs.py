"""What a program says on standard error: a line per life-cycle event and per refusal, none per served call."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from cube.errors import BadConfig

FORMS = ("text", "json")


def log_to_stderr(program: str, form: str = FORMS[0]) -> None:
    """From now on, in one of FORMS; raises BadConfig for another.

    text: time, program[pid], level, message. json: an object with time, level, program, pid, logger and message, and
    with what the line's `extra["facts"]` holds, such as code, path and peer of a refusal.
    """
    if form not in FORMS:
        raise BadConfig("log", repr(form), " or ".join(FORMS))
    handler = logging.StreamHandler(sys.stderr)
    text = f"%(asctime)s {program}[%(process)d] %(levelname)s %(message)s"
    handler.setFormatter(_JsonLines(program) if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class Sparing:
    """Warnings of one kind, at most so many a second: of the others a line says how many there were.

    Owned by the event loop.
    """

    def __init__(self, log: logging.Logger, kind: str, most_per_s: int):
        self._log, self._kind, self._most_per_s = log, kind, most_per_s
        self._second, self._said, self._unsaid = 0, 0, 0

    def warning(self, tell: Callable[[], tuple[str, Mapping[str, Any]]]) -> None:
        """A line "kind: text", if there may be one. tell: text and facts (see `log_to_stderr`), if they are needed."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._said = second, 0
        self._said += 1
        if self._said <= self._most_per_s:
            text, facts = tell()
            self._log.warning("%s: %s", self._kind, text, extra={"facts": facts})
            return
        if not self._unsaid:
            asyncio.get_running_loop().call_later(1.0, self._tell_unsaid)
        self._unsaid += 1

    def _tell_unsaid(self) -> None:
        unsaid, self._unsaid = self._unsaid, 0
        self._log.warning("%s: %d more within a second", self._kind, unsaid)


class _JsonLines(logging.Formatter):
    def __init__(self, program: str):
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname,
            "program": self._program,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)
