"""cube-server, cube-build, cube-ctl as an operator types them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from places import BIN
from stores import built

from cube.version import Version
from trainer_tools import export_rows


@pytest.fixture
def data(tmp_path):
    built(tmp_path / "cube-data", "t", Version(1), np.arange(100), np.ones((100, 2)), shards=2)
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
        (lambda seg: seg.write_bytes(seg.with_name("1-of-2.seg").read_bytes()), "the rows of shard 1 of 2"),
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


def test_a_server_of_a_replicated_shard_is_told_where_to_listen(command, data, tmp_path):
    conf = tmp_path / "cube.prototxt"
    conf.write_text(f'data: "{data}" shard {{ address: "list://127.0.0.1:1,127.0.0.1:2" }} shard {{ address: "h:1" }}')
    done = command("cube-server", "--shard", 0, "--conf", conf, "--check")
    assert (done.returncode, "expected --listen host:port beside it" in done.stderr) == (1, True)
    assert command("cube-server", "--shard", 0, "--conf", conf, "--listen", "127.0.0.1:0", "--check").returncode == 0


def test_names_that_are_no_versions_are_passed_over(command, data):
    (data / "t" / ".2@0.draft").mkdir()
    (data / "t" / "notes").mkdir()
    (data / "notes.txt").write_text("x")
    done = command("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr


def test_a_version_built_for_another_number_of_shards_is_passed_over(data, command):
    built(data, "t", Version(2), np.arange(9), np.ones((9, 2)), shards=3)
    done = command("cube-server", "--shard", 2, "--shards", 3, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr
    done = command("cube-server", "--shard", 1, "--shards", 2, "--data", data, "--listen", "h:1", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_none_is_misuse(command, value):
    assert command("cube-server", "--shard", 0, "--keep-versions", value).returncode == 2


def test_the_newest_versions_are_kept_open(data, server, command):
    for base in (2, 3):
        built(data, "t", Version(base), np.arange(9), np.ones((9, 2)), shards=2)
    address = server("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--keep-versions", 2)
    shown = json.loads(command("cube-ctl", "--json", "tables", "--server", address).stdout)
    assert [row["version"] for row in shown] == ["3@0", "2@0"]


def test_ctl_verifies_files(data, command):
    assert command("cube-ctl", "verify", data).returncode == 0
    path = data / "t" / "1@0" / "1-of-2.seg"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    done = command("cube-ctl", "verify", data)
    assert done.returncode == 1
    assert "1-of-2.seg block 0" in done.stderr
    assert command("cube-ctl", "verify", data.parent / "nowhere").returncode == 1


def test_ctl_verifies_every_file_and_says_of_each_what_it_found(data, command):
    built(data, "u", Version(1), np.arange(10), np.ones((10, 2)), engine="lmdb")
    built(data, "v", Version(1), np.arange(10), np.ones((10, 2)), engine="rocksdb")
    path = data / "t" / "1@0" / "0-of-2.seg"
    path.write_bytes(path.read_bytes()[:-1])
    (data / "t" / ".2@0.build").mkdir()
    (data / "t" / ".2@0.build" / "shard.seg").write_bytes(b"half")
    done = command("cube-ctl", "--json", "verify", data)
    shown = {Path(row["file"]).name: row for row in json.loads(done.stdout)}
    assert done.returncode == 1
    assert {name: row["ok"] for name, row in shown.items()} == {
        "0-of-2.seg": False, "1-of-2.seg": True, "0-of-1.lmdb": False, "0-of-1.rocksdb": True,
    }  # fmt: skip
    assert "truncated copy?" in shown["0-of-2.seg"]["found"]
    assert shown["0-of-1.lmdb"]["found"] == "no checksums to compare"


def test_build_says_what_it_wrote_and_refuses_to_write_it_again(tmp_path, command):
    export_rows.Rows(np.array([1, 2, 1], np.uint64), np.ones((3, 2), np.float32)).write(tmp_path / "rows")
    args = (tmp_path / "rows", "--table", "t", "--version", "5@0", "--shards", 2, "--out", tmp_path / "out")
    done = command("cube-build", *args)
    assert done.returncode == 0, done.stderr
    assert "1 duplicate keys replaced" in done.stdout
    again = command("cube-build", *args)
    assert again.returncode == 1
    assert "5@0: found an existing directory" in again.stderr
    assert "--version: found 'x', expected base@delta" in command("cube-build", *args[:4], "x").stderr


def test_checksums_are_compared_in_the_background_and_what_is_corrupt_is_refused(data, server, command):
    raw = bytearray((data / "t" / "1@0" / "0-of-2.seg").read_bytes())
    raw[5000] ^= 1
    (data / "t" / "1@0" / "0-of-2.seg").write_bytes(raw)
    addresses = [server("cube-server", "--shard", n, "--shards", 2, "--data", data) for n in (0, 1)]
    deadline = time.monotonic() + 60
    while (state := verified(command, addresses)) != ["corrupt", "yes"]:
        assert set(state) <= {"no", "running", "yes", "corrupt"}
        assert time.monotonic() < deadline, state
    done = command("cube-ctl", "lookup", "--cube", ",".join(addresses), "t", *range(100))
    assert done.returncode == 1
    assert "0-of-2.seg block 0 (byte 4096): found checksum" in done.stderr


def verified(command, addresses):
    shown = [json.loads(command("cube-ctl", "--json", "tables", "--server", a).stdout) for a in addresses]
    return [rows[0]["verified"] for rows in shown]


def test_a_server_that_verifies_first_does_not_open_its_port_over_corrupt_rows(data, command, server):
    raw = bytearray((data / "t" / "1@0" / "0-of-2.seg").read_bytes())
    raw[5000] ^= 1
    (data / "t" / "1@0" / "0-of-2.seg").write_bytes(raw)
    args = ("--shards", 2, "--data", data, "--listen", "127.0.0.1:0")
    done = command("cube-server", "--shard", 0, *args, "--verify", "first")
    assert done.returncode == 1
    assert "0-of-2.seg block 0" in done.stderr
    address = server("cube-server", "--shard", 1, *args[:4], "--verify", "first")
    assert json.loads(command("cube-ctl", "--json", "tables", "--server", address).stdout)[0]["verified"] == "yes"
    address = server("cube-server", "--shard", 1, *args[:4], "--verify", "off", "--in-memory")
    assert json.loads(command("cube-ctl", "--json", "tables", "--server", address).stdout)[0]["verified"] == "no"


@pytest.mark.parametrize("engine", ["segment", "rocksdb", "lmdb"])
@pytest.mark.parametrize("row_format", ["f32", "f16", "bf16", "i8"])
def test_every_engine_and_row_format_is_built_and_served(tmp_path, command, server, engine, row_format):
    keys, rows = np.arange(300, dtype=np.uint64), np.arange(600, dtype=np.float32).reshape(300, 2)
    export_rows.Rows(keys, rows).write(tmp_path / "rows")
    options = ("--engine", engine, "--format", row_format, "--default-row", "7", "--out", tmp_path / "cube")
    done = command("cube-build", tmp_path / "rows", "--table", "t", "--version", "1", *options)
    assert done.returncode == 0, done.stderr
    address = server("cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path / "cube")
    shown = json.loads(command("cube-ctl", "--json", "lookup", "--cube", address, "t", 5, 299, 300).stdout)
    assert [row["found"] for row in shown] == [True, True, False]
    assert [row["row"] for row in shown] == [[10, 11], [598, 599] if row_format != "bf16" else [600, 600], [7, 7]]
    (status,) = json.loads(command("cube-ctl", "--json", "tables", "--server", address).stdout)
    assert (status["rows"], status["format"]) == (300, row_format)
    assert status["bytes"] > 300 * 4


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--memory", "12", "found '12', expected a size such as 800M or 4G"),
        ("--default-row", "1,x", "--default-row: found '1,x', expected numbers"),
        ("--default-row", "1,2,3", "default row: found 3 elements, expected 2"),
        ("--memory", "5M", "memory: found 5 MiB, expected at least 512 MiB"),
    ],
)
def test_build_refuses_flags_that_make_no_sense(tmp_path, command, flag, value, message):
    export_rows.Rows(np.arange(3, dtype=np.uint64), np.ones((3, 2), np.float32)).write(tmp_path / "rows")
    done = command("cube-build", tmp_path / "rows", "--table", "t", "--version", "1", "--out", tmp_path, flag, value)
    assert done.returncode in (1, 2)
    assert message in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_stops_at_once_and_exits_0(data, number):
    args = ["--shard", "0", "--shards", "2", "--data", str(data), "--listen", "127.0.0.1:0"]
    with subprocess.Popen([BIN / "cube-server", *args], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("cube-server: shard 0 of 2 listening on 127.0.0.1:")
        assert "serves t 1@0 (" in line
        begin = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(timeout=60) == 0
        assert time.monotonic() - begin < 9  # SIGTERM's patience with calls in flight is ten


def test_the_second_server_on_a_port_is_refused(data, server, command):
    address = server("cube-server", "--shard", 0, "--shards", 2, "--data", data)
    done = command("cube-server", "--shard", 1, "--shards", 2, "--data", data, "--listen", address)
    assert done.returncode == 1
    assert f"listen: found {address}, which cannot be bound" in done.stderr
