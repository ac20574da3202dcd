"""The log as JSON: an object a line, for life-cycle events and refusals alike."""

import json
import logging
import signal

import numpy as np
import pytest
from cube_process import cube_process
from stores import built

from cube.errors import BadConfig
from cube.logs import log_to_stderr
from cube.pb import cube_pb2 as pb
from cube.service import LOOKUP
from cube.version import Version


@pytest.mark.slow
def test_a_server_tells_programs_what_it_tells_people(tmp_path):
    built(tmp_path / "cube", "t", Version(7), range(10), np.zeros((10, 4)))
    with cube_process(tmp_path / "cube", "--log", "json") as server:
        with server.calling() as call, pytest.raises(Exception, match="nobody"):
            call(LOOKUP, pb.LookupRequest(tables=[pb.TableKeys(table="nobody")]), pb.LookupReply)
        server.wait_for("refused")
        server.process.send_signal(signal.SIGTERM)
        code, log = server.end()
    lines = [json.loads(line) for line in log.splitlines()]
    assert code == 0
    assert all({"time", "level", "program", "pid", "logger", "message"} <= set(line) for line in lines)
    assert {line["program"] for line in lines} == {"cube-server"}
    (refusal,) = [line for line in lines if line["message"].startswith("refused")]
    assert (refusal["level"], refusal["code"], refusal["path"]) == ("WARNING", "NOT_FOUND", LOOKUP)
    assert any("opened" in line["message"] for line in lines)
    assert lines[-1]["message"] == "drained"


def test_a_fault_carries_its_trace_in_the_same_line(capsys):
    before = logging.root.handlers[:]
    try:
        log_to_stderr("prog", "json")
        try:
            raise KeyError("here")
        except KeyError:
            logging.getLogger("x").exception("it failed\non two lines")
    finally:
        logging.root.handlers[:] = before
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert said["message"] == "it failed\non two lines"
    assert "KeyError: 'here'" in said["exception"]


def test_another_form_is_refused():
    with pytest.raises(BadConfig, match="'xml', expected text or json"):
        log_to_stderr("prog", "xml")
