"""What a program says on standard error: a line per life-cycle event and per refusal, none per served call."""

import json
import logging
import sys
import time

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
