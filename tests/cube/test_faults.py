"""A cube of real servers that die, hang, come back and are asked nonsense, and what its callers see of that."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from places import BIN
from ports import reserved_port
from stores import built

from cube.client import Ask, RemoteCube, split
from cube.errors import BadRequest, NotServed, ServingError, ShardUnavailable
from cube.keys import ShardRule
from cube.pb import cube_pb2 as pb
from cube.rpc.channel import Channel, tls_context
from cube.rpc.listener import Listener
from cube.rpc.routing import Options
from cube.rpc.tls import Tls
from cube.service import LOOKUP, CubeService
from cube.table import open_tables
from cube.version import Version

KEYS = np.random.default_rng(5).integers(0, 2**64, 2_000, dtype=np.uint64)
ROWS = np.random.default_rng(6).standard_normal((2_000, 8), dtype=np.float32)
LOAD_S = 2.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("cube")
    built(data, "t", Version(1), KEYS, ROWS, shards=2)
    return data


class Cluster:
    """Two shards of two replicas, each a process that can be killed, stopped and started again at its address."""

    def __init__(self, data):
        self._data = data
        self._processes = {}  # by address
        self._held = contextlib.ExitStack()  # nobody else listens where one was killed
        self.addresses = [[self._held.enter_context(reserved_port()) for _ in range(2)] for _ in range(2)]
        self.start()

    @property
    def targets(self):
        return ["list://" + ",".join(replicas) for replicas in self.addresses]

    def start(self):
        """Whatever does not run."""
        begun = {}
        for shard, replicas in enumerate(self.addresses):
            for address in replicas:
                if address not in self._processes or self._processes[address].poll() is not None:
                    command = [BIN / "cube-server", "--data", self._data, "--shards", "2", "--shard", str(shard)]
                    begun[address] = subprocess.Popen(
                        [*command, "--listen", address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                    )
        self._processes |= begun
        for address, process in begun.items():
            assert f"listening on {address}," in process.stdout.readline()

    def signal(self, address, number):
        self._processes[address].send_signal(number)

    def kill(self, address):
        self.signal(address, signal.SIGKILL)
        self._processes[address].wait()
        self._processes[address].stdout.close()

    def resident(self, address):
        """Bytes of memory."""
        fields = Path(f"/proc/{self._processes[address].pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self):
        for process in self._processes.values():
            process.kill()
            process.wait()
            process.stdout.close()
        self._held.close()


@pytest.fixture(scope="module")
def cluster(data):
    """For tests that leave it as it was."""
    cluster = Cluster(data)
    yield cluster
    cluster.close()


@pytest.fixture
def breakable(cluster):
    """The same for tests that kill: whatever is dead is started again."""
    yield cluster
    cluster.start()


async def load(cube, seconds, least=0, timeout_s=60.0, callers=4):
    """Calls for some seconds, and until so many were right; every answer compared. Returns the errors."""
    rng, end = np.random.default_rng(0), time.monotonic() + seconds
    right, errors = 0, []

    async def caller():
        nonlocal right
        while time.monotonic() < end or right + len(errors) < least:
            asked = rng.integers(0, len(KEYS), 50)
            try:
                rows = await cube.gather("t", Version(1), KEYS[asked], timeout_s)
            except ServingError as error:
                errors.append(error)
                await asyncio.sleep(0.01)
                continue
            assert rows.found.all()
            assert np.array_equal(rows.rows, ROWS[asked])
            right += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return errors


def under(cluster, work, **options):
    async def run():
        async with RemoteCube(cluster.targets, options=Options(**options)) as cube:
            await cube.open({"t": (Version(1), 8)}, wait_s=60)
            return await work(cube)

    return asyncio.run(run())


def test_killing_one_of_two_replicas_of_each_shard_fails_no_call(breakable):
    async def work(cube):
        running = asyncio.ensure_future(load(cube, LOAD_S, least=500))
        await asyncio.sleep(LOAD_S / 4)
        breakable.kill(breakable.addresses[0][0])
        await asyncio.sleep(LOAD_S / 4)
        breakable.kill(breakable.addresses[1][1])
        return await running

    errors = under(breakable, work)
    assert errors == []


@pytest.mark.alone  # half of each call's time has to be enough for the other replica
def test_a_replica_that_hangs_costs_no_call(cluster):
    async def work(cube):
        running = asyncio.ensure_future(load(cube, 4.0, least=100, timeout_s=8.0))
        await asyncio.sleep(0.5)
        cluster.signal(cluster.addresses[0][0], signal.SIGSTOP)
        return await running

    try:
        errors = under(cluster, work)
    finally:
        cluster.signal(cluster.addresses[0][0], signal.SIGCONT)
    assert errors == []


def test_a_dead_shard_is_unavailable_in_time_and_the_others_rows_are_there(breakable):
    async def work(cube):
        for address in breakable.addresses[1]:
            breakable.kill(address)
        begin = time.monotonic()
        with pytest.raises(ShardUnavailable, match="cube shard 1: no answer"):
            await cube.gather("t", Version(1), KEYS, 100.0)
        assert time.monotonic() - begin < 50  # nothing waits for the deadline
        return await cube.lookup([Ask("t", KEYS, Version(1)), Ask("t", KEYS[:10])], 100.0, partial=True)

    answer = under(breakable, work)
    here, there = split(KEYS, 2, ShardRule.MIX)
    assert list(answer.unavailable) == [1]
    assert answer.unavailable[1].shard == 1
    whole = answer.tables[0]
    assert np.array_equal(whole.rows[here], ROWS[here])
    assert whole.found[here].all()
    assert not whole.found[there].any()
    assert not whole.rows[there].any()
    assert np.flatnonzero(whole.unavailable).tolist() == there.tolist()
    few = answer.tables[1]
    assert np.flatnonzero(few.unavailable).tolist() == sorted(set(range(10)) & set(there.tolist()))


def test_servers_that_come_back_are_found_again_by_a_running_client(breakable):
    async def work(cube):
        await load(cube, 0.3)
        for address in (address for replicas in breakable.addresses for address in replicas):
            breakable.kill(address)
        with pytest.raises(ShardUnavailable):
            await cube.gather("t", Version(1), KEYS, 0.5)
        await asyncio.to_thread(breakable.start)
        while True:
            with contextlib.suppress(ShardUnavailable):
                await cube.gather("t", Version(1), KEYS, 1.0)
                break
            await asyncio.sleep(0.1)
        return await load(cube, 0.5, least=20)

    errors = under(breakable, work)
    assert errors == []


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (pb.TableKeys(table="t", keys=bytes(8 * 10_000_000)), BadRequest),
        (pb.TableKeys(table="t", keys=bytes(7)), BadRequest),
        (pb.TableKeys(table="nowhere", keys=bytes(8)), NotServed),
        (pb.TableKeys(table="t", keys=bytes(8), version=pb.Version(base=9)), NotServed),
    ],
    ids=["10 M keys", "7 bytes", "unknown table", "unknown version"],
)
def test_nonsense_is_refused_and_nobody_else_notices(cluster, asked, kind):
    async def work(cube):
        async with Channel(cluster.addresses[0][0]) as channel:
            running = asyncio.ensure_future(load(cube, 0.5, least=20))
            with pytest.raises((kind, ServingError)) as caught:
                await channel.call(LOOKUP, pb.LookupRequest(tables=[asked]).SerializeToString(), 60)
            assert caught.type is kind or "message of 80000" in str(caught.value)
            empty = pb.LookupRequest(tables=[pb.TableKeys(table="t")]).SerializeToString()
            assert not pb.LookupReply.FromString(bytes(await channel.call(LOOKUP, empty, 10))).tables[0].rows
            return await running

    errors = under(cluster, work)
    assert errors == []


def test_an_expired_certificate_is_refused_by_the_client(data, tmp_path):
    authority = Authority(tmp_path)
    past = datetime.now(UTC) - timedelta(days=2)
    certificate, key = authority.issue("old", not_before=past, not_after=past + timedelta(days=1))

    async def run():
        store = CubeService(open_tables(data, 0, 2), 0, 2)
        listener = Listener(store.handlers(), None, tls=Tls(str(certificate), str(key)))
        address = await listener.start("127.0.0.1:0")
        try:
            async with RemoteCube([address], tls=tls_context(str(authority.roots))) as cube:
                await cube.open({"t": (Version(1), 8)}, wait_s=2)
        finally:
            await listener.drain(1)

    with pytest.raises(ShardUnavailable, match="certificate has expired"):
        asyncio.run(run())


def test_memory_stays_where_it_is_under_load(cluster):
    every = [address for replicas in cluster.addresses for address in replicas]

    def resident():
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return [*map(cluster.resident, every), own]

    async def work(cube):
        await load(cube, 2.0, callers=16)
        before = resident()
        await load(cube, 4.0, callers=16)
        return before, resident()

    before, after = under(cluster, work)
    assert all(b - a < 16 << 20 for a, b in zip(before, after, strict=True)), (before, after)


def test_unknown_tables_and_versions_are_named_by_the_client(cluster):
    async def work(cube):
        with pytest.raises(NotServed, match="table 'nowhere': not served here, which serves t"):
            await cube.gather("nowhere", None, KEYS[:3], 60)
        with pytest.raises(NotServed, match="table 't' version 9@0: not served here, which serves 1@0"):
            await cube.gather("t", Version(9), KEYS[:3], 60)
        rows = await cube.gather("t", None, KEYS[:0], 60)
        assert rows.rows.shape == (0, 8)

    under(cluster, work)
