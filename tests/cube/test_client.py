"""Asking a cube: the same answers from files, from one server, from several; typed errors where there is no answer."""

import asyncio
import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import built

from cube.client import Ask, BlockingCube, LocalCube, RemoteCube, split, unique
from cube.errors import (
    BadConfig,
    BadRequest,
    DataCorrupt,
    DeadlineExceeded,
    NotServed,
    ShardUnavailable,
    Unavailable,
)
from cube.keys import ShardRule, shards_of
from cube.pb import cube_pb2 as pb
from cube.rpc.channel import Channel
from cube.rpc.routing import Options, Policy
from cube.service import LOOKUP, STATUS
from cube.version import Version
from trainer_tools.demo import started

u64 = st.integers(0, 2**64 - 1)
KEYS = np.random.default_rng(5).integers(0, 2**64, 500, dtype=np.uint64)
ROWS = np.random.default_rng(6).standard_normal((500, 3), dtype=np.float32)
TABLES = {"t": (Version(2), 3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two versions of one table in two shards; version 2 has ROWS, version 1 has -ROWS."""
    data = tmp_path_factory.mktemp("cube")
    built(data, "t", Version(1), KEYS, -ROWS, shards=2)
    built(data, "t", Version(2), KEYS, ROWS, shards=2)
    return data


@pytest.fixture(scope="module")
def shards(data):
    """Addresses of two running servers."""
    with contextlib.ExitStack() as processes:
        serve = ("cube-server", "--shards", 2, "--data", data, "--shard")
        yield [processes.enter_context(started(*serve, shard)) for shard in range(2)]


def with_cube(endpoints, work):
    async def run():
        cube = RemoteCube(endpoints)
        try:
            return await work(cube)
        finally:
            await cube.close()

    return asyncio.run(run())


@given(st.lists(u64, max_size=60), st.integers(1, 5), st.sampled_from(ShardRule))
def test_split_gives_each_shard_its_keys_and_unique_puts_every_key_back(keys, shards, rule):
    asked = np.array(keys + keys[::2], np.uint64)
    distinct, place = unique(asked)
    assert distinct.tolist() == list(dict.fromkeys(asked.tolist()))
    assert distinct[place].tolist() == asked.tolist()
    parts = split(distinct, shards, rule)
    assert len(parts) == shards
    assert sorted(np.concatenate(parts).tolist()) == list(range(distinct.size))
    for shard, part in enumerate(parts):
        assert (shards_of(distinct[part], shards, rule) == shard).all()
        assert (np.diff(part) > 0).all()


def test_servers_and_files_answer_alike(data, shards):
    rng = np.random.default_rng(0)
    local = LocalCube(data)
    for count in (0, 1, 26, 4000):
        asked = np.concatenate([rng.choice(KEYS, count), rng.integers(0, 2**64, count // 3, dtype=np.uint64)])
        for version in (Version(1), Version(2)):

            async def ask(cube, version=version, asked=asked):
                await cube.open({"t": (version, 3)}, wait_s=60)
                return await cube.gather("t", version, asked, timeout_s=5)

            remote, here = with_cube(shards, ask), local.rows("t", version, asked)
            assert np.array_equal(remote.rows, here.rows)
            assert np.array_equal(remote.found, here.found)
            assert remote.rows.shape == (asked.size, 3)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"nowhere": (Version(2), 3)}, "found tables t, expected table 'nowhere', which the model reads"),
        ({"t": (Version(3), 3)}, "table 't': found versions 2@0, 1@0, expected 3@0"),
        ({"t": (Version(2), 4)}, "table 't': found rows of 3 elements, expected 4"),
    ],
)
def test_a_table_version_or_width_the_cube_lacks_is_refused_at_opening(data, shards, tables, message):
    with pytest.raises(BadConfig, match=message):
        with_cube(shards, lambda cube: cube.open(tables, wait_s=60))
    with pytest.raises(BadConfig, match=message):
        asyncio.run(LocalCube(data).open(tables, wait_s=60))


def test_a_table_whose_absent_keys_do_not_read_zeros_is_refused(tmp_path, server):
    built(tmp_path, "t", Version(2), KEYS, ROWS, default_row=(1.0, 2.0, 3.0))
    address = server("cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path)

    async def opened(make):
        cube = make()
        try:
            await cube.open(TABLES, wait_s=60)
        finally:
            await cube.close()

    for make in (lambda: LocalCube(tmp_path), lambda: RemoteCube([address])):
        with pytest.raises(BadConfig, match="table 't': found a default row for absent keys, expected zeros"):
            asyncio.run(opened(make))


def test_the_shard_count_of_files_is_that_of_the_newest_version(tmp_path):
    built(tmp_path, "t", Version(1), KEYS, -ROWS, shards=2)
    built(tmp_path, "t", Version(2), KEYS, ROWS, shards=4)
    assert np.array_equal(LocalCube(tmp_path).rows("t", None, KEYS).rows, ROWS)


def test_shards_listed_in_the_wrong_order_are_refused(shards):
    with pytest.raises(BadConfig, match="found shard 1 of 2, expected shard 0 of 2"):
        with_cube(shards[::-1], lambda cube: cube.open(TABLES, wait_s=60))


def test_a_missing_shard_of_a_list_is_refused(shards):
    with pytest.raises(BadConfig, match="found shard 0 of 2, expected shard 0 of 1"):
        with_cube(shards[:1], lambda cube: cube.open(TABLES, wait_s=60))


def test_a_shard_that_nobody_serves_is_unavailable_and_named():
    with pytest.raises(ShardUnavailable, match=r"cube shard 0: no answer from 127\.0\.0\.1:1 "):
        with_cube(["127.0.0.1:1"], lambda cube: cube.open(TABLES, wait_s=0.3))


def test_a_shard_that_dies_is_unavailable_and_the_others_still_answer(data):
    with started("cube-server", "--shard", 0, "--shards", 2, "--data", data) as one:

        async def ask(cube):
            await cube.open(TABLES, wait_s=60)
            dying.close()
            with pytest.raises(ShardUnavailable, match="cube shard 1"):
                await cube.gather("t", Version(2), KEYS, timeout_s=5)
            mine = KEYS[split(KEYS, 2, ShardRule.MIX)[0]]
            return await cube.gather("t", Version(2), mine, timeout_s=5)

        with contextlib.ExitStack() as dying:
            other = dying.enter_context(started("cube-server", "--shard", 1, "--shards", 2, "--data", data))
            assert with_cube([one, other], ask).found.all()


def ask_raw(endpoint, message):
    async def run():
        async with Channel(endpoint) as channel:
            return pb.LookupReply.FromString(await channel.call(LOOKUP, message, timeout_s=5))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        (
            pb.TableKeys(table="t", keys=b"1234567"),
            BadRequest,
            "table 't' keys: found 7 bytes, expected a multiple of 8",
        ),
        (pb.TableKeys(table="x", keys=b""), NotServed, "table 'x': not served here, which serves t"),
        (
            pb.TableKeys(table="t", version=pb.Version(base=9)),
            NotServed,
            "version 9@0: not served here, which serves 2@0",
        ),
    ],
)
def test_a_bad_lookup_is_refused_by_name_and_the_server_lives_on(shards, asked, kind, message):
    with pytest.raises(kind, match=message):
        ask_raw(shards[0], pb.LookupRequest(tables=[asked]).SerializeToString())
    good = pb.TableKeys(table="t", keys=KEYS.tobytes())
    assert ask_raw(shards[0], pb.LookupRequest(tables=[good]).SerializeToString()).tables[0].dim == 3


def test_bytes_that_are_no_message_are_refused(shards):
    with pytest.raises(BadRequest, match=r"message: found 3 bytes that do not parse, expected a cube_serving\.cube"):
        ask_raw(shards[0], b"\xff\xff\xff")


def test_too_many_keys_are_refused(data, server):
    endpoint = server("cube-server", "--shard", 0, "--shards", 2, "--data", data, "--max-keys", 10)
    with pytest.raises(BadRequest, match="found 11 keys, expected at most 10 in one call"):
        ask_raw(endpoint, pb.LookupRequest(tables=[pb.TableKeys(table="t", keys=bytes(88))]).SerializeToString())


def test_several_tables_come_in_one_call_in_the_order_asked(data, shards):
    asked = [
        pb.TableKeys(table="t", version=pb.Version(base=1), keys=KEYS.tobytes()),
        pb.TableKeys(table="t", keys=b""),
        pb.TableKeys(table="t", keys=KEYS[:9].tobytes()),
    ]
    reply = ask_raw(shards[0], pb.LookupRequest(tables=asked).SerializeToString())
    assert [(t.version.base, len(t.found)) for t in reply.tables] == [(1, 500), (2, 0), (2, 9)]
    found = np.frombuffer(reply.tables[0].found, np.bool_)
    rows = np.frombuffer(reply.tables[0].rows, np.float32).reshape(-1, 3)
    assert np.array_equal(rows[found], -ROWS[found])
    assert reply.tables[0].absent == np.count_nonzero(~found) > 0


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_several_tables_and_versions_are_one_lookup(data, shards, cache_bytes):
    local, rng = LocalCube(data), np.random.default_rng(3)

    async def work():
        async with RemoteCube(shards, cache_bytes=cache_bytes) as cube:
            answers = []
            for _ in range(30):  # the same hot keys again and again, so that the cache has some
                asked = KEYS[rng.zipf(1.3, 60) % 500]
                asks = [Ask("t", asked, Version(1)), Ask("t", asked[:0]), Ask("t", asked ^ np.uint64(1), Version(2))]
                answers.append((asks, await cube.lookup([*asks, asks[0]], 60)))
            calls = [balancer.counters.calls for balancer in cube.balancers]
            return answers, calls, cube.cache_stats

    answers, calls, stats = asyncio.run(work())
    for asks, (tables, unavailable) in answers:
        assert unavailable == {}
        for ask, table in zip([*asks, asks[0]], tables, strict=True):
            here = local.rows(ask.table, ask.version, ask.keys)
            assert np.array_equal(table.rows, here.rows)
            assert np.array_equal(table.found, here.found)
            assert table.version == here.version
            assert table.unavailable is None
            table.rows[:] = 0  # the caller's own
    assert max(calls) <= 35  # one for each lookup, and a status now and then
    assert (stats is not None and stats.hits > 500 and stats.negative_hits > 0) if cache_bytes else stats is None


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12), st.booleans())
def test_answers_are_the_same_with_a_cache_and_without(asks, many_versions):
    """In memory, against shards that are dicts of their own; places over 20 are keys that are not there."""

    async def ask(cube):
        cube._balancers = [FakeShard(shard) for shard in range(2)]
        versions = [Version(1), Version(2)] if many_versions else [Version(2)]
        answers = []
        for turn, places in enumerate(asks):
            keys = np.array(places, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            version = versions[turn % len(versions)]
            answers.append((await cube.lookup([Ask("t", keys, version)], 60)).tables[0])
        return answers

    async def work():
        return await ask(RemoteCube(["x:1", "x:2"], cache_bytes=1 << 20)), await ask(RemoteCube(["x:1", "x:2"]))

    for cached, plain, places in zip(*asyncio.run(work()), asks, strict=True):
        assert np.array_equal(cached.rows, plain.rows)
        assert np.array_equal(cached.found, plain.found)
        assert plain.found.tolist() == [place <= 20 for place in places]


class FakeShard:
    """What a Balancer is to a RemoteCube: one shard of table t, versions 1 and 2, keys 0 to 20 times a constant."""

    def __init__(self, shard):
        keys = np.arange(21, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.shard, self.keys = shard, set(keys[shards_of(keys, 2) == shard].tolist())

    async def call(self, path, message, timeout_s, wait_for_ready=False, *, metadata=(), key=None):
        if path == STATUS:
            versions = [pb.TableVersion(version=pb.Version(base=base), dim=2) for base in (2, 1)]
            table = pb.TableStatus(table="t", versions=versions, current=pb.Version(base=2))
            return pb.StatusReply(shard=self.shard, shards=2, shard_rule="mix", tables=[table]).SerializeToString()
        reply = pb.LookupReply()
        for asked in pb.LookupRequest.FromString(message).tables:
            keys = np.frombuffer(asked.keys, "<u8").tolist()
            assert (shards_of(np.array(keys, np.uint64), 2) == self.shard).all()
            found = [key in self.keys for key in keys]
            base = asked.version.base
            rows = [[k % 1000 + base, 1] if here else [0, 0] for k, here in zip(keys, found, strict=True)]
            reply.tables.add(
                version=asked.version,
                dim=2,
                rows=np.array(rows, np.float32).tobytes(),
                found=bytes(found),
                absent=found.count(False),
            )
        return reply.SerializeToString()

    async def close(self):
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.ClearField("rows"),
        lambda table: setattr(table, "dim", 3),
        lambda table: setattr(table, "found", b"\x02" * len(table.found)),
        lambda table: setattr(table, "found", table.found + b"\x01"),
        lambda table: setattr(table.version, "base", 9),
    ],
)
def test_an_answer_to_another_question_is_not_believed(change):
    class Liar(FakeShard):
        async def call(self, path, *args, **options):
            told = await super().call(path, *args, **options)
            if path == STATUS:
                return told
            reply = pb.LookupReply.FromString(told)
            change(reply.tables[0])
            return reply.SerializeToString()

    async def work():
        cube = RemoteCube(["x:1", "x:2"])
        cube._balancers = [Liar(shard) for shard in range(2)]
        await cube.gather("t", Version(2), np.arange(9, dtype=np.uint64), 60)

    with pytest.raises(DataCorrupt, match=r"cube shard [01] of x:[12] reply: found"):
        asyncio.run(work())


def test_threads_ask_through_a_blocking_cube(data, shards):
    local = LocalCube(data)
    with BlockingCube(lambda: RemoteCube(shards)) as cube, ThreadPoolExecutor(8) as threads:
        cube.open({"t": (Version(2), 3)}, wait_s=60)
        parts = [KEYS[start : start + 50] for start in range(0, 450, 7)]
        for part, rows in zip(parts, threads.map(lambda part: cube.gather("t", None, part, 60), parts), strict=True):
            assert np.array_equal(rows.rows, local.rows("t", Version(2), part).rows)
        with pytest.raises(NotServed):
            cube.lookup([Ask("nowhere", KEYS)], 5)
    cube.close()
    with pytest.raises(Unavailable, match="the cube is closed"):
        cube.gather("t", None, KEYS, 60)
    with pytest.raises(BadConfig, match="row cache: found 1 bytes"):
        BlockingCube(lambda: RemoteCube(shards, cache_bytes=1))


def test_a_client_follows_what_operators_load_switch_and_unload(tmp_path):
    """Under load, with no version named, while the versions change as fast as they can: no call fails or mixes."""
    for base in (1, 2, 3):
        built(tmp_path / "data", "t", Version(base), KEYS, ROWS * base, shards=2)
    held = [(tmp_path / "data" / "t" / f"{base}@0") for base in (2, 3)]
    for path in held:
        path.rename(tmp_path / path.name)

    async def work(addresses):
        async with RemoteCube(addresses) as cube, contextlib.AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(Channel(address)) for address in addresses]

            async def tell(verb, base):
                request = pb.VersionRequest(table="t", version=pb.Version(base=base)).SerializeToString()
                path = f"/cube_serving.cube.CubeControl/{verb}"
                await asyncio.gather(*(channel.call(path, request, 30) for channel in channels))

            seen, over = set(), False

            async def load():
                while not over:
                    rows = await cube.gather("t", None, KEYS, 60)
                    assert rows.found.all()
                    assert np.array_equal(rows.rows, ROWS * rows.version.base)
                    seen.add(rows.version.base)

            callers = [asyncio.ensure_future(load()) for _ in range(4)]
            for path, base in zip(held, (2, 3), strict=True):
                (tmp_path / path.name).rename(path)
                await tell("Load", base)
                pinned = await cube.gather("t", Version(base), KEYS, 60)  # the client had not heard of it
                assert np.array_equal(pinned.rows, ROWS * base)
                await tell("Switch", base)
                await tell("Unload", base - 1)
                while base not in seen:
                    await asyncio.sleep(0.01)
            over = True
            await asyncio.gather(*callers)
            assert (await cube.gather("t", None, KEYS, 60)).version == Version(3)
            with pytest.raises(NotServed, match="version 1@0: not served here, which serves 3@0"):
                await cube.gather("t", Version(1), KEYS, 60)
            return seen

    with contextlib.ExitStack() as processes:
        serve = ("cube-server", "--shards", 2, "--data", tmp_path / "data", "--shard")
        addresses = [processes.enter_context(started(*serve, shard)) for shard in range(2)]
        assert asyncio.run(work(addresses)) == {1, 2, 3}


def test_a_server_of_another_shard_among_the_replicas_is_never_believed(shards):
    zero, one = shards

    async def work():
        async with RemoteCube([f"list://{zero},{one}", one]) as cube:
            while True:  # `open` asks one of them only
                with contextlib.suppress(BadConfig):
                    await cube.open(TABLES, wait_s=60)
                    break
            for _ in range(40):  # the other replica is asked, and this one left out
                assert (await cube.gather("t", Version(2), KEYS, 60)).found.all()

    asyncio.run(work())


def test_who_has_less_time_does_not_wait_for_who_has_more():
    """Nobody answers there: a listening socket that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        async def work():
            async with RemoteCube([address]) as cube:
                patient = asyncio.ensure_future(cube.gather("t", None, KEYS, 100))
                await asyncio.sleep(0.05)
                began = time.monotonic()
                with pytest.raises((DeadlineExceeded, ShardUnavailable)):
                    await cube.gather("t", None, KEYS, 0.2)
                assert time.monotonic() - began < 50
                patient.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await patient

        asyncio.run(work())


def test_a_first_lookup_needs_only_the_shards_that_are_there(shards):
    async def work():
        async with RemoteCube([shards[0], "127.0.0.1:1"]) as cube:
            return await cube.lookup([Ask("t", KEYS)], 60, partial=True)

    answer = asyncio.run(work())
    assert list(answer.unavailable) == [1]
    here = split(KEYS, 2, ShardRule.MIX)[0]
    assert np.array_equal(answer.tables[0].rows[here], ROWS[here])
    assert answer.tables[0].found.sum() == here.size


def test_the_same_keys_go_to_the_same_replica_by_consistent_hash(data):
    serve = ("cube-server", "--shard", 0, "--shards", 2, "--data", data)
    with started(*serve) as one, started(*serve) as two:

        async def work():
            async with RemoteCube(
                [f"list://{one},{two}", "127.0.0.1:1"], options=Options(policy=Policy.CONSISTENT_HASH)
            ) as cube:
                mine, used = KEYS[split(KEYS, 2, ShardRule.MIX)[0]], []
                for start in range(0, 200, 10):
                    counts = []
                    for _ in range(5):
                        before = {r.target: r.calls for r in cube.balancers[0].status_of()}
                        await cube.gather("t", Version(2), mine[start : start + 10], 60)
                        counts += [r.target for r in cube.balancers[0].status_of() if r.calls > before.get(r.target, 0)]
                    used.append(set(counts))
                return used

        used = asyncio.run(work())
    assert sum(len(replicas) > 1 for replicas in used) <= 1  # the first one asked what they serve, too
    assert set().union(*used) == {one, two}
