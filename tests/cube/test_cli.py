"""cube-server, cube-build, cube-ctl as an operator types them."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from places import BIN

from cube import build
from cube.version import Version


@pytest.fixture
def data(tmp_path):
    rows = build.Rows(np.arange(100, dtype=np.uint64), np.ones((100, 2), np.float32))
    build.build(rows, tmp_path / "cube-data", "t", Version(1), 2)
    return tmp_path / "cube-data"


@pytest.mark.parametrize(
    "tool", ["cube-server", "cube-build", "cube-ctl", "prune-program", "predictor-server", "ctr-client"]
)
def test_help_says_what_each_flag_is_for(process, tool):
    done = process(tool, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 300
    if tool != "cube-ctl":
        assert "default" in done.stdout


def test_a_wrong_flag_exits_2(command):
    assert command("cube-server", "--shrad", 0).returncode == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shard", 2, "--shards", 2), "--shard: found 2, expected 0 to 1: the cube has 2 shards"),
        (("--shard", -1, "--shards", 2), "--shard: found -1, expected 0 to 1"),
        (("--shard", 0, "--shards", 0), "--shards: found 0, expected at least 1"),
        (("--shard", 0, "--shards", 3), "1@0: found 0-of-2.seg, 1-of-2.seg, expected 0-of-3.seg"),
        (("--shard", 0, "--shards", 2, "--data", "nowhere"), "nowhere: found no such directory"),
        (("--shard", 0, "--shards", 2, "--data", "/"), "/: found no tables"),
        (("--shard", 0, "--shards", 2, "--listen", "here"), "listen: found 'here', expected host:port"),
        (("--shard", 0, "--shards", 2, "--conf", "nowhere.prototxt"), "nowhere.prototxt: found No such file"),
    ],
)
def test_a_server_that_cannot_start_says_why_on_one_line_and_exits_1(command, data, args, message):
    given = args if "--data" in args else (*args, "--data", data)
    given = given if "--listen" in given else (*given, "--listen", "127.0.0.1:0")
    done = command("cube-server", *given, cwd=data.parent)
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda seg: seg.write_bytes(seg.read_bytes()[:-1]), "truncated copy?"),
        (lambda seg: seg.write_bytes(b"x" * 9000), "expected a cube segment"),
        (lambda seg: seg.write_bytes(seg.with_name("1-of-2.seg").read_bytes()), "the segment of shard 1 of 2"),
        (lambda seg: seg.unlink(), "found 1-of-2.seg, expected 0-of-2.seg"),
    ],
)
def test_a_missing_truncated_or_swapped_segment_is_named(command, data, spoil, message):
    spoil(data / "t" / "1@0" / "0-of-2.seg")
    done = command("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--check")
    assert done.returncode == 1
    assert message in done.stderr
    assert (
        command("cube-server", "--shard", 1, "--shards", 2, "--data", data, "--listen", "h:1", "--check").returncode
        == 0
    )


def test_names_that_are_no_versions_are_passed_over(command, data):
    (data / "t" / ".2@0.draft").mkdir()
    (data / "t" / "notes").mkdir()
    (data / "notes.txt").write_text("x")
    done = command("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr


def test_a_version_built_for_another_number_of_shards_is_passed_over(data, command):
    build.build(build.Rows(np.arange(9, dtype=np.uint64), np.ones((9, 2), np.float32)), data, "t", Version(2), 3)
    done = command("cube-server", "--shard", 2, "--shards", 3, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr
    done = command("cube-server", "--shard", 1, "--shards", 2, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_none_is_misuse(command, value):
    assert command("cube-server", "--shard", 0, "--keep-versions", value).returncode == 2


def test_the_newest_versions_are_kept_open(data, server, command):
    for base in (2, 3):
        build.build(build.Rows(np.arange(9, dtype=np.uint64), np.ones((9, 2), np.float32)), data, "t", Version(base), 2)
    address = server("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--keep-versions", 2)
    shown = json.loads(command("cube-ctl", "--json", "status", "--cube", address).stdout)
    assert [row["version"] for row in shown] == ["3@0", "2@0"]


def test_ctl_shows_status_and_rows_and_counts_what_was_asked(data, command, server):
    cube = ",".join(server("cube-server", "--shard", s, "--shards", 2, "--data", data) for s in range(2))
    done = command("cube-ctl", "--json", "lookup", "--cube", cube, "t", 5, 6, 1000)
    rows = json.loads(done.stdout)
    assert [(r["key"], r["found"], r["row"]) for r in rows] == [
        (5, True, [1, 1]),
        (6, True, [1, 1]),
        (1000, False, [0, 0]),
    ]
    shown = json.loads(command("cube-ctl", "--json", "status", "--cube", cube).stdout)
    assert [row["shard"] for row in shown] == [0, 1]
    assert sum(row["keys_found"] for row in shown) == 2
    assert sum(row["keys_absent"] for row in shown) == 1
    people = command("cube-ctl", "status", "--cube", cube).stdout.splitlines()
    assert people[0].split()[:3] == ["shard", "table", "version"]
    assert "table: found 'x', expected one of t" in command("cube-ctl", "lookup", "--cube", cube, "x", 5).stderr
    assert "keys: found" in command("cube-ctl", "lookup", "--cube", cube, "t", 2**64).stderr


def test_ctl_verifies_files(data, command):
    assert command("cube-ctl", "verify", data).returncode == 0
    path = data / "t" / "1@0" / "1-of-2.seg"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    done = command("cube-ctl", "verify", data)
    assert done.returncode == 1
    assert "1-of-2.seg block 0" in done.stderr
    assert command("cube-ctl", "verify", data.parent / "nowhere").returncode == 1


def test_build_says_what_it_wrote_and_refuses_to_write_it_again(tmp_path, command):
    build.write_rows(tmp_path / "rows", build.Rows(np.array([1, 2, 1], np.uint64), np.ones((3, 2), np.float32)))
    args = (tmp_path / "rows", "--table", "t", "--version", "5@0", "--shards", 2, "--out", tmp_path / "out")
    done = command("cube-build", *args)
    assert done.returncode == 0, done.stderr
    assert "1 duplicate keys replaced" in done.stdout
    again = command("cube-build", *args)
    assert again.returncode == 1
    assert "5@0: found an existing directory" in again.stderr
    assert "--version: found 'x', expected base@delta" in command("cube-build", *args[:4], "x").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_stops_at_once_and_exits_0(data, number):
    args = ["--shard", "0", "--shards", "2", "--data", str(data), "--listen", "127.0.0.1:0"]
    with subprocess.Popen([BIN / "cube-server", *args], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("cube-server: shard 0 of 2 listening on 127.0.0.1:")
        assert "serves t 1@0 (" in line
        begin = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - begin < 5  # under a second where nothing else runs


def test_the_second_server_on_a_port_is_refused(data, server, command):
    address = server("cube-server", "--shard", 0, "--shards", 2, "--data", data)
    done = command("cube-server", "--shard", 1, "--shards", 2, "--data", data, "--listen", address)
    assert done.returncode == 1
    assert f"listen: found {address}, which cannot be bound" in done.stderr
