"""Versions come and go while a server runs: in one table, in one process, in several that must agree."""

import contextlib
import os
import queue
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from cube_process import CONTROL, cube_process
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from stores import built, looked_up, segment_of

from cube.errors import DataCorrupt, NotServed
from cube.pb import cube_pb2 as pb
from cube.storage.segment import Segment
from cube.storage.store import Capabilities, Store
from cube.table import Table, Verification
from cube.version import Version

LOOKUP = "/cube_serving.cube.Cube/Lookup"
ROWS = 100


# ---- one table ----


class FakeStore(Store):
    """Knows whether it is closed."""

    def __init__(self, base):
        self.about = SimpleNamespace(version=Version(base))
        self.closings = 0

    def read(self, keys, rows, found):
        raise NotImplementedError

    def __len__(self):
        return 0

    def close(self):
        self.closings += 1


class Leases(RuleBasedStateMachine):
    """Versions are added, switched to and removed while lookups begin and end."""

    def __init__(self):
        super().__init__()
        self.open, self.gone, self.reading = {1: FakeStore(1)}, [], []
        self.table, self.current = Table("t", {Version(1): self.open[1]}), 1

    @rule(base=st.integers(1, 5))
    def add(self, base):
        if base in self.open:
            with pytest.raises(ValueError, match="found it open"):
                self.table.add(FakeStore(base))
        else:
            self.open[base] = FakeStore(base)
            self.table.add(self.open[base])

    @rule(base=st.integers(1, 5))
    def switch(self, base):
        if base in self.open:
            self.table.switch(Version(base))
            self.current = base
        else:
            with pytest.raises(NotServed):
                self.table.switch(Version(base))

    @rule(base=st.integers(1, 5))
    def remove(self, base):
        if base == self.current:
            with pytest.raises(ValueError, match="found the current one"):
                self.table.remove(Version(base))
        elif base in self.open:
            self.table.remove(Version(base))
            self.gone.append(self.open.pop(base))
        else:
            with pytest.raises(NotServed):
                self.table.remove(Version(base))

    @rule(pick=st.integers(0, 99))
    def lookup_begins(self, pick):
        store = self.table.store(Version(sorted(self.open)[pick % len(self.open)]))
        self.table.hold(store)
        self.reading.append(store)

    @precondition(lambda self: self.reading)
    @rule(pick=st.integers(0, 99))
    def lookup_ends(self, pick):
        self.table.release(self.reading.pop(pick % len(self.reading)))

    @invariant()
    def what_is_read_is_open(self):
        assert self.table.store(None) is self.open[self.current]
        assert self.table.newest == Version(max(self.open))
        assert self.table.stores == [self.open[base] for base in sorted(self.open, reverse=True)]
        for store in (*self.open.values(), *self.gone):
            assert store.closings == (store in self.gone and store not in self.reading)


TestLeases = Leases.TestCase


def mappings(pid, file=".seg"):
    """How often a process has files mapped whose paths end so."""
    with open(f"/proc/{pid}/maps") as lines:
        return sum(line.rstrip("\n").removesuffix(" (deleted)").endswith(file) for line in lines)


@pytest.mark.parametrize("corrupt", [False, True])
def test_a_closed_segment_is_not_mapped_and_refuses_lookups(tmp_path, corrupt):
    path = tmp_path / f"{corrupt}.seg"
    segment_of(path, range(ROWS), np.ones((ROWS, 2))).close()
    if corrupt:
        damaged = bytearray(path.read_bytes())
        damaged[4096 + 16] ^= 1
        path.write_bytes(damaged)
    store = Segment(path)
    assert mappings("self", path.name) == 1
    begun = store.scan(10)
    next(begun)
    reports = []
    verification = Verification([store], lambda *found: reports.append(found))
    verification.start()
    verification._thread.join()
    assert [error is not None for _, error in reports] == [corrupt]
    store.close()
    store.close()
    assert sum(len(keys) for keys, _ in begun) == ROWS - 10  # what has begun ends
    assert mappings("self", path.name) == 0
    keys = np.zeros(1, np.uint64)
    for read in (
        lambda: looked_up(store, keys),
        lambda: store.read(keys, np.empty((1, 8), np.uint8), np.empty(1, np.bool_)),
        lambda: store.pooled(keys, np.array([0, 1]), False, np.empty((1, 2), np.float32), np.empty(1, np.bool_)),
        lambda: next(store.scan()),
    ):
        with pytest.raises(DataCorrupt if corrupt else NotServed):
            read()
    for read in (store.load, store.verify):
        with pytest.raises(NotServed, match=r"table 't' version 7@0, which is closed"):
            read()


class SlowToVerify(FakeStore):
    """Verifies until it is stopped."""

    def __init__(self, base):
        super().__init__(base)
        self.about.table = "t"
        self.capabilities = Capabilities(verify=True)
        self.begun = threading.Event()

    def verify(self, progress):
        while True:
            progress(1)
            self.begun.set()
            time.sleep(0.001)


def test_a_verification_is_done_with_a_store_that_is_wanted_no_more():
    stores = [SlowToVerify(base) for base in range(1, 4)]
    reports = queue.Queue()
    verification = Verification(stores, lambda *found: reports.put(found))
    verification.drop(stores[1])  # before its turn
    verification.start()
    assert stores[0].begun.wait(60)
    verification.drop(stores[0])
    assert reports.get(timeout=60) == (stores[0], None)
    assert reports.get(timeout=60) == (stores[1], None)
    assert stores[2].begun.wait(60)
    verification.stop()
    assert not stores[1].begun.is_set()
    assert reports.empty()


# ---- servers ----


@pytest.fixture
def data(tmp_path):
    """Table t: version 7 to be served, and 8, which `provide` puts beside it."""
    for base in (7, 8):
        built(tmp_path / "all", "t", Version(base), range(ROWS), np.full((ROWS, 2), base))
    provide(tmp_path, 7)
    return tmp_path / "data"


def provide(tmp_path, base):
    shutil.copytree(tmp_path / "all" / "t" / f"{base}@0", tmp_path / "data" / "t" / f"{base}@0")


@contextlib.contextmanager
def refused(code, text=""):
    with pytest.raises(grpc.RpcError, match=text) as caught:
        yield
    assert caught.value.code() is code


def versions(status):
    (table,) = status.tables
    return [v.version.base for v in table.versions], table.current.base


def everywhere(server, connections=16):
    """What the workers serve, (versions, current) as text; a set where they do not agree."""
    seen = {str(versions(server.status())) for _ in range(connections)}
    return seen.pop() if len(seen) == 1 else seen


def of(base):
    return pb.VersionRequest(table="t", version=pb.Version(base=base))


def row_on(call, base=None):
    """The version that a lookup reads."""
    asked = pb.TableKeys(table="t", keys=bytes(8))
    if base is not None:
        asked.version.base = base
    (rows,) = call(LOOKUP, pb.LookupRequest(tables=[asked]), pb.LookupReply).tables
    assert np.frombuffer(rows.rows, "<f4").tolist() == [rows.version.base] * 2
    return rows.version.base


def row_of(server, base=None):
    with server.calling() as call:
        return row_on(call, base)


def outcome(call, path, request, timeout_s):
    """Code and details of a call."""
    try:
        call(path, request, pb.StatusReply, timeout_s)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_versions_are_loaded_switched_and_unloaded_everywhere(data, tmp_path, workers):
    with cube_process(data, "--workers", workers) as server:
        assert row_of(server) == 7
        provide(tmp_path, 8)
        built(data, "t", Version(20), range(ROWS), np.zeros((ROWS, 2)), shards=2)
        (data / "t" / "21@0").mkdir()
        (data / "t" / "21@0" / "0-of-1.seg").write_bytes((data / "t" / "7@0" / "0-of-1.seg").read_bytes()[:5000])
        assert versions(server.control("Load", "t", 8)) == ([8, 7], 7)
        assert everywhere(server) == "([8, 7], 7)"
        assert row_of(server) == 7  # lookups do not notice
        assert row_of(server, 8) == 8
        assert versions(server.control("Load", "t", 8)) == ([8, 7], 7)  # as often as one likes
        assert versions(server.control("Switch", "t", 8)) == ([8, 7], 8)
        assert everywhere(server) == "([8, 7], 8)"
        assert {row_of(server) for _ in range(8)} == {8}
        assert row_of(server, 7) == 7
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "found the current one"):
            server.control("Unload", "t", 8)
        assert versions(server.control("Unload", "t", 7)) == ([8], 8)
        assert everywhere(server) == "([8], 8)"
        with refused(grpc.StatusCode.NOT_FOUND, "version 7@0: not served here"):
            server.control("Switch", "t", 7)
        with refused(grpc.StatusCode.NOT_FOUND, "table 'u'"):
            server.control("Load", "u", 8)
        with refused(grpc.StatusCode.NOT_FOUND, "version 10@0 under"):
            server.control("Load", "t", 10)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "0-of-1.seg"):  # built for other shards
            server.control("Load", "t", 20)
        with refused(grpc.StatusCode.DATA_LOSS, "5000 bytes"):  # a copy that was cut off
            server.control("Load", "t", 21)
        with server.calling() as call:
            code, details = outcome(call, f"{CONTROL}/Load", pb.VersionRequest(table="t"), 20)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "table 't' version: found none, expected base and delta"
        assert everywhere(server) == "([8], 8)"
        server.wait_for("table t 8@0 verified", 1)
        assert not server.log("Traceback")
        for text in ("t 7@0 opened", "t 8@0 loaded", "t 8@0 is current now", "t 7@0 unloaded"):
            assert server.log(text)
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["first", "background"])
def test_a_version_that_one_worker_finds_corrupt_is_served_by_none(data, tmp_path, verify):
    provide(tmp_path, 8)
    sound = data / "t" / "8@0" / "0-of-1.seg"
    bytes_of = bytearray(sound.read_bytes())
    bytes_of[4096 + 16] ^= 1  # in a row: only checksums tell, and only worker 0 compares them
    shutil.move(data / "t" / "8@0", tmp_path / "8")
    with cube_process(data, "--workers", 2, "--verify", verify) as server:
        shutil.move(tmp_path / "8", data / "t" / "8@0")
        sound.unlink()
        sound.write_bytes(bytes_of)
        if verify == "first":
            with refused(grpc.StatusCode.DATA_LOSS, "block 0"):
                server.control("Load", "t", 8)
            assert everywhere(server) == "([7], 7)"
            bytes_of[4096 + 16] ^= 1
            sound.unlink()
            sound.write_bytes(bytes_of)
            server.control("Load", "t", 8)
            assert everywhere(server) == "([8, 7], 7)"
            assert {v.verified for _ in range(8) for v in server.status().tables[0].versions} == {"yes"}
        else:
            server.control("Load", "t", 8)
            server.wait_for("table t 8@0 is corrupt")
            end = time.monotonic() + 60
            while {server.status().tables[0].versions[0].verified for _ in range(8)} != {"corrupt"}:
                assert time.monotonic() < end
            for _ in range(8):
                with refused(grpc.StatusCode.DATA_LOSS, "block 0"):
                    row_of(server, 8)
            assert row_of(server) == 7


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_unloaded_is_not_mapped_any_more(data, tmp_path, workers):
    provide(tmp_path, 8)
    with cube_process(data, "--workers", workers, "--keep-versions", 1) as server:
        for base in (7, 8, 7, 8):
            server.control("Load", "t", base)
            server.control("Switch", "t", base)
            server.control("Unload", "t", 15 - base)
        end = time.monotonic() + 60
        while {mappings(pid) for pid in server.workers or [server.process.pid]} != {1}:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert row_of(server) == 8
        assert not server.log("Traceback")


@pytest.mark.slow
def test_a_name_as_long_as_a_request_makes_no_worker_deaf(data, tmp_path):
    with cube_process(data, "--workers", 2) as server:
        for verb in ("Load", "Switch", "Unload"):
            with refused(grpc.StatusCode.NOT_FOUND, "not served here"):
                server.control(verb, "\x01" * 30_000, 7)
        provide(tmp_path, 8)
        server.control("Load", "t", 8)
        assert everywhere(server) == "([8, 7], 7)"
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


@contextlib.contextmanager
def half_done_load(server):
    """A future of a Load that waits for a worker which is stopped; a connection to another; the worker's process id."""
    stopped = server.workers[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as stack:
            while True:  # until a connection reaches the other one
                call = stack.enter_context(server.calling())
                if outcome(call, "/cube_serving.cube.Cube/Status", pb.StatusRequest(), 0.5)[0] is grpc.StatusCode.OK:
                    break
            yield call.begin(f"{CONTROL}/Load", of(8), pb.StatusReply), call, stopped
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)


@pytest.mark.slow
def test_a_second_command_is_refused_at_once_and_a_caller_who_goes_away_does_not_stop_the_first(data, tmp_path):
    with cube_process(data, "--workers", 2) as server:
        provide(tmp_path, 8)
        with half_done_load(server) as (load, call, _):
            for verb in ("Load", "Switch", "Unload"):
                code, details = outcome(call, f"{CONTROL}/{verb}", of(7), 60)
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "another command is being carried out" in details
            assert row_on(call) == 7  # lookups go on
            assert not load.done()
            load.cancel()
        end = time.monotonic() + 60
        while everywhere(server) != "([8, 7], 7)":
            assert time.monotonic() < end
        server.control("Switch", "t", 8)
        assert not server.log("Traceback")
        assert not server.log("never retrieved")


@pytest.mark.slow
def test_a_worker_that_dies_meanwhile_fails_the_command(data, tmp_path):
    with cube_process(data, "--workers", 2) as server:
        provide(tmp_path, 8)
        with half_done_load(server) as (load, _, stopped):
            os.kill(stopped, signal.SIGKILL)
            with refused(grpc.StatusCode.UNAVAILABLE, "ended meanwhile"):
                load.result()
        code, log = server.end()
        assert code == 1  # as whenever a worker dies
        assert "was ended by SIGKILL; stopping" in log
        assert "Traceback" not in log
        assert "t 8@0 loaded" not in log


@pytest.mark.slow
def test_a_machine_that_stood_still_meanwhile_fails_nothing(data, tmp_path):
    with cube_process(data, "--workers", 2) as server:
        provide(tmp_path, 8)
        with half_done_load(server) as (load, _, _):
            everybody = [*server.workers, server.process.pid]
            for pid in everybody:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(10.5)
            for pid in everybody:
                os.kill(pid, signal.SIGCONT)
            assert versions(load.result()) == ([8, 7], 7)
        assert everywhere(server) == "([8, 7], 7)"


@pytest.mark.slow
def test_a_worker_that_says_nothing_is_killed_and_the_command_is_over(data, tmp_path):
    with cube_process(data, "--workers", 2) as server:
        provide(tmp_path, 8)
        with half_done_load(server) as (load, call, stopped):
            assert row_on(call) == 7
            with refused(grpc.StatusCode.UNAVAILABLE, "ended meanwhile"):
                load.result()
        code, log = server.end()
        assert code == 1
        assert f"(process {stopped}) has said nothing for 10 s: killed" in log
        assert "t 8@0 loaded" not in log
