"""cube-ctl as an operator types it, against real servers."""

import contextlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import processes_that_name
from stores import built

from cube.keys import ShardRule
from cube.version import Version
from trainer_tools.demo import started

KEYS = np.arange(100)


@contextlib.contextmanager
def running(data):
    """Both shards, the second with two replicas, over a table of one version: the cube as a text."""
    built(data, "t", Version(1), KEYS, np.ones((100, 2)), shards=2)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        start = ("cube-server", "--shards", 2, "--data", data, "--shard")
        found = threads.map(lambda shard: stack.enter_context(started(*start, shard)), (0, 1, 1))
        yield "{},{}|{}".format(*found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("ctl") / "cube-data"


@pytest.fixture(scope="module")
def cube(data):
    """For tests that leave its servers as they were."""
    with running(data) as cube:
        yield cube


@pytest.fixture
def own(tmp_path):
    """Data and cube of a test that changes them."""
    with running(tmp_path / "cube-data") as cube:
        yield tmp_path / "cube-data", cube


@pytest.fixture
def ctl(command):
    """Run cube-ctl on a cube; returns its exit status and what it printed as JSON, or its errors."""

    def run(cube, verb, *args):
        done = command("cube-ctl", "--json", verb, "--cube", cube, *args)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    return run


def test_status_has_a_line_for_each_server(ctl, cube, command):
    before = ctl(cube, "status")[1]
    ctl(cube, "lookup", "t", 5, 6, 1000)
    code, rows = ctl(cube, "status")
    assert code == 0
    assert [(row["shard"], row["state"], row["workers"], row["shards"]) for row in rows] == [
        (0, "up", 1, 2), (1, "up", 1, 2), (1, "up", 1, 2),
    ]  # fmt: skip
    assert sum(row["keys"] for row in rows) == sum(row["keys"] for row in before) + 3
    assert sum(row["absent"] for row in rows) == sum(row["absent"] for row in before) + 1
    people = command("cube-ctl", "status", "--cube", cube).stdout.splitlines()
    assert people[0].split()[:3] == ["server", "shard", "state"]
    assert len(people) == 4
    one = json.loads(command("cube-ctl", "--json", "status", "--server", rows[1]["server"]).stdout)
    assert [(row["server"], row["shard"]) for row in one] == [(rows[1]["server"], 1)]


def test_status_names_servers_that_are_down_or_of_another_shard(command, cube):
    one = cube.split("|")[0].split(",")[1]
    done = command("cube-ctl", "--json", "status", "--cube", f"{one}|127.0.0.1:1,{one}")
    rows = json.loads(done.stdout)
    assert done.returncode == 1
    assert [row["state"] for row in rows] == ["up", "down", "up"]
    assert rows[0]["problem"] == "it serves shard 1, where shard 0 was expected"
    assert "cannot connect" in rows[1]["problem"]
    assert not rows[2]["problem"]


def test_lookup_shows_rows_found_and_not(ctl, cube):
    code, rows = ctl(cube, "lookup", "t", 5, 6, 1000)
    assert code == 0
    assert [(r["key"], r["found"], r["row"], r["version"]) for r in rows] == [
        (5, True, [1, 1], "1@0"), (6, True, [1, 1], "1@0"), (1000, False, [0, 0], "1@0"),
    ]  # fmt: skip
    code, errors = ctl(cube, "lookup", "x", 5)
    assert (code, "table 'x': not served here, which serves t" in errors) == (1, True)
    code, errors = ctl(cube, "lookup", "t", 2**64)
    assert (code, "keys: found" in errors) == (1, True)
    code, errors = ctl(cube, "lookup", "t", 5, "--version", "9@0")
    assert (code, "version 9@0: not served here, which serves 1@0" in errors) == (1, True)


def test_a_version_is_loaded_switched_to_and_the_old_one_unloaded(ctl, own):
    data, cube = own
    built(data, "t", Version(2), KEYS, np.full((100, 2), 7), shards=2)
    code, rows = ctl(cube, "load", "t", "2@0")
    assert (code, [row["load"] for row in rows]) == (0, ["done"] * 3)
    code, rows = ctl(cube, "tables")
    assert code == 0
    assert [(row["version"], row["current"], row["servers"], row["rows"], row["dim"]) for row in rows] == [
        ("2@0", "", "3 of 3", 100, 2), ("1@0", "yes", "3 of 3", 100, 2),
    ]  # fmt: skip
    assert ctl(cube, "lookup", "t", 5)[1][0]["row"] == [1, 1]
    assert ctl(cube, "unload", "t", "1@0")[0] == 1
    assert ctl(cube, "switch", "t", "2@0")[0] == 0
    assert ctl(cube, "lookup", "t", 5)[1][0]["row"] == [7, 7]
    assert ctl(cube, "unload", "t", "1@0")[0] == 0
    assert [row["version"] for row in ctl(cube, "tables")[1]] == ["2@0"]


def test_nobody_switches_where_one_server_lacks_the_version(ctl, own, command):
    data, cube = own
    built(data, "t", Version(2), KEYS, np.full((100, 2), 7), shards=2)
    address = cube.split(",")[0]
    assert command("cube-ctl", "load", "--server", address, "t", "2@0").returncode == 0
    code, errors = ctl(cube, "switch", "t", "2@0")
    assert code == 1
    assert re.search(r"found no version 2@0 of table 't', expected a server that has it loaded; nothing was", errors)
    assert [row["current"] for row in ctl(cube, "tables")[1]] == ["", "yes"]


def test_what_cannot_be_loaded_is_told_by_each_server(ctl, cube, data):
    code, rows = ctl(cube, "load", "t", "5@0")
    assert code == 1
    assert [row["load"] for row in rows] == ["failed"] * 3
    assert all("5@0" in row["problem"] for row in rows)
    shutil.copytree(data / "t" / "1@0", data / "t" / "6@0")
    code, rows = ctl(cube, "load", "t", "6@0")
    assert code == 1
    assert all("expected" in row["problem"] for row in rows)
    shutil.rmtree(data / "t" / "6@0")
    assert ctl(cube, "lookup", "t", 5)[0] == 0


def test_drain_ends_servers_and_asks_before_it_ends_all(ctl, own, command):
    data, cube = own
    code, errors = ctl(cube, "drain")
    assert (code, "drain: found no server, expected --server HOST:PORT, or --all" in errors) == (1, True)
    replica = cube.rpartition("|")[2]
    assert command("cube-ctl", "drain", "--server", replica).returncode == 0
    states = [row["state"] for row in ctl(cube, "status")[1]]
    assert states == ["up", "up", "down"]
    assert ctl(cube, "lookup", "t", *range(50))[0] == 0
    assert ctl(cube, "drain", "--all")[0] == 1  # one is gone already
    assert [row["state"] for row in ctl(cube, "status")[1]] == ["down"] * 3
    end = time.monotonic() + 60
    while (left := processes_that_name(data)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize("options", [(), ("--rate", 50)], ids=["closed loop", "open loop"])
def test_bench_times_lookups_of_keys_that_are_there(ctl, cube, options):
    before = ctl(cube, "status")[1]
    code, (row,) = ctl(cube, "bench", "t", "--keys", 20, "--seconds", 1, *options)
    assert code == 0
    assert row["calls/s"] > 0
    assert row["keys/s"] >= 19 * row["calls/s"]
    assert 0 < row["p50 ms"] <= row["p99 ms"] <= row["p99.9 ms"]
    assert row["failed"] == 0
    rows = ctl(cube, "status")[1]
    assert sum(row["keys"] for row in rows) > sum(row["keys"] for row in before)
    assert sum(row["absent"] for row in rows) == sum(row["absent"] for row in before)


def test_bench_needs_servers_and_a_table(ctl, cube, command, data):
    assert "table 'x'" in ctl(cube, "bench", "x")[1]
    assert "expected servers" in command("cube-ctl", "bench", "--cube", data, "t").stderr


def test_the_ancestors_file_says_where_to_look(ctl, cube, data, tmp_path, server, command):
    built(tmp_path / "own", "u", Version(1), KEYS, np.ones((100, 2)), shards=1, shard_rule=ShardRule.MODULO)
    start = ("cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path / "own", "--shard-rule", "modulo")
    host, port = server(*start).split(":")
    entry = {"dup": 1, "timeout": 2000, "retry": 1, "backup_request": 0, "type": "ipport"}
    node = {"ip": host, "port": int(port)}
    conf = tmp_path / "cube.conf"
    conf.write_text(json.dumps([{"dict_name": "u", "shard": 1, "nodes": [node]} | entry]))
    assert [(row["shard"], row["state"]) for row in ctl(conf, "status")[1]] == [(0, "up")]
    assert ctl(conf, "tables")[1][0]["table"] == "u"
    assert [row["found"] for row in ctl(conf, "lookup", "u", 5, 1000)[1]] == [True, False]
    assert ctl(conf, "bench", "u", "--keys", 5, "--seconds", 1)[0] == 0
    assert "found 'x', expected one of u" in ctl(conf, "bench", "x")[1]


def test_a_token_is_shown_to_servers_that_ask_for_it(tmp_path, cube, data, server, command):
    token = tmp_path / "token"
    token.write_text("open-sesame\n")
    token.chmod(0o600)
    address = server("cube-server", "--shards", 2, "--shard", 0, "--data", data, "--token-file", token)
    refused = command("cube-ctl", "status", "--server", address)
    assert refused.returncode == 1
    assert "token" in refused.stdout
    assert command("cube-ctl", "status", "--server", address, "--token-file", token).returncode == 0
    token.write_text("wrong")
    assert command("cube-ctl", "status", "--server", address, "--token-file", token).returncode == 1
