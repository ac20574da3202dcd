"""The lookup service itself: formats, pooling, scans, limits. Over a socket where that could make a difference."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import segment_of

from cube.errors import BadRequest, DeadlineExceeded, FailedPrecondition, NotServed
from cube.pb import cube_pb2 as pb
from cube.rows import RowFormat
from cube.rpc.calls import Call
from cube.rpc.channel import Channel
from cube.rpc.listener import Listener
from cube.service import LOOKUP, SCAN, CubeService
from cube.table import Table
from cube.version import Version

KEYS = np.random.default_rng(1).integers(0, 2**64, 300, dtype=np.uint64)
ROWS = np.random.default_rng(2).standard_normal((300, 4), dtype=np.float32)
BAGS = st.lists(st.lists(st.integers(0, 399), max_size=5), max_size=8)


def service_of(folder, row_format=RowFormat.F32, **options):
    """A service of table `t`, version 7, with KEYS and ROWS."""
    store = segment_of(folder / "0-of-1.seg", KEYS, ROWS, row_format)
    return CubeService({"t": Table("t", {Version(7): store})}, 0, 1, **options), store


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return service_of(tmp_path_factory.mktemp("service"))[0]


def answer(service, call=None, **asked):
    """The reply to one table's part of a request."""
    asked.setdefault("table", "t")
    request = pb.LookupRequest(tables=[pb.TableKeys(**asked)]).SerializeToString()
    made = service.lookup(request, call or Call(LOOKUP))
    if not isinstance(made, (bytes, list)):
        made = asyncio.run(_result(made))
    reply = pb.LookupReply.FromString(b"".join(map(bytes, made)))
    assert len(reply.tables) == 1
    return reply.tables[0]


async def _result(waiting):
    return await waiting


def offsets_of(bags):
    return np.cumsum([0, *map(len, bags)]).astype("<u8").tobytes()


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_rows_come_as_they_are_stored_on_request(tmp_path, row_format):
    service, store = service_of(tmp_path, row_format)
    asked = np.concatenate([KEYS[:50], [np.uint64(3)], KEYS[:5]])
    told = answer(service, keys=asked.tobytes(), format=pb.STORED)
    raw, found = np.empty((asked.size, store.about.row_bytes), np.uint8), np.empty(asked.size, np.bool_)
    store.read(asked, raw, found)
    assert told.rows == raw.tobytes()
    assert told.found == found.tobytes()
    assert (told.row_format, told.row_bytes, told.dim) == (row_format.text, store.about.row_bytes, 4)
    floats = answer(service, keys=asked.tobytes())
    assert (floats.row_format, floats.row_bytes) == ("f32", 16)


@given(BAGS)
def test_pooled_rows_are_the_sums_and_means_of_the_bags(service, bags):
    """Places over 299 are keys that are not there."""
    every = np.concatenate([KEYS, np.arange(100, dtype=np.uint64)])
    rows = np.concatenate([ROWS, np.zeros((100, 4), np.float32)])
    places = np.array([place for bag in bags for place in bag], np.int64)
    for pooling in (pb.SUM, pb.MEAN):
        told = answer(service, keys=every[places].tobytes(), pooling=pooling, offsets=offsets_of(bags))
        expected = np.zeros((len(bags), 4), np.float32)
        for number, bag in enumerate(bags):
            for place in bag:
                expected[number] += rows[place]
            if pooling == pb.MEAN and bag:
                expected[number] /= np.float32(len(bag))
        assert told.rows == expected.tobytes()
        assert np.frombuffer(told.found, np.bool_).tolist() == (places < 300).tolist()
        assert told.absent == np.count_nonzero(places >= 300)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pooling": pb.SUM}, "table 't' offsets: found int64 offsets"),
        ({"pooling": pb.SUM, "offsets": b"123"}, "table 't' offsets: found 3 bytes, expected a multiple of 8"),
        ({"pooling": pb.SUM, "offsets": np.array([0, 3], "<u8").tobytes()}, "never fall, from 0 to 2"),
        ({"pooling": pb.SUM, "offsets": np.array([0, 2, 1, 2], "<u8").tobytes()}, "never fall"),
        ({"pooling": pb.SUM, "offsets": np.array([0, 2**64 - 1, 2], "<u8").tobytes()}, "never fall"),
        ({"pooling": 9, "offsets": bytes(8)}, r"pooling: found 9, expected NONE \(0\), SUM"),
        (
            {"pooling": pb.SUM, "format": pb.STORED, "offsets": np.array([0, 2], "<u8").tobytes()},
            "STORED, with pooling",
        ),
        ({"format": 7}, r"format: found 7, expected FLOATS \(0\)"),
        ({"offsets": bytes(16)}, "offsets: found 16 bytes, expected none without pooling"),
        ({"keys": bytes(15)}, "keys: found 15 bytes, expected a multiple of 8"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(service, asked, message):
    with pytest.raises(BadRequest, match=message):
        answer(service, **({"keys": KEYS[:2].tobytes()} | asked))


@pytest.mark.parametrize("said", [(1, 1, 0), (0, 2, 0), (0, 1, 2)])
def test_a_lookup_meant_for_another_server_is_refused(service, said):
    shard, shards, rule = said
    asked = [pb.TableKeys(table="t", keys=KEYS[:3].tobytes())]
    meant = pb.LookupRequest(tables=asked, shard=shard, shards=shards, shard_rule=rule)
    with pytest.raises(FailedPrecondition, match=r"shard: found .*, expected one for 0 of 1, rule 1"):
        service.lookup(meant.SerializeToString(), Call(LOOKUP))
    right = pb.LookupRequest(tables=asked, shard=0, shards=1, shard_rule=1)
    assert service.lookup(right.SerializeToString(), Call(LOOKUP))


def test_tables_of_a_call_are_counted(service):
    many = pb.LookupRequest(tables=[pb.TableKeys(table="t") for _ in range(1025)])
    with pytest.raises(BadRequest, match="tables: found 1025 in one call, expected at most 1024"):
        service.lookup(many.SerializeToString(), Call(LOOKUP))


def test_bags_and_bytes_of_rows_count_as_keys_do(tmp_path):
    service, _ = service_of(tmp_path, max_keys=100_000)
    bags = np.zeros(100_001, "<u8")
    with pytest.raises(BadRequest, match="offsets: found 100001 keys, expected at most 100000"):
        answer(service, keys=b"", pooling=pb.SUM, offsets=bags.tobytes())
    waiting = service.lookup(
        pb.LookupRequest(
            tables=[pb.TableKeys(table="t", pooling=pb.SUM, offsets=bags[:30_000].tobytes())]
        ).SerializeToString(),
        Call(LOOKUP),
    )
    assert asyncio.iscoroutine(waiting)  # it runs in a thread
    asyncio.run(_result(waiting))


def test_rows_of_more_bytes_than_clients_take_are_refused_before_they_are_made(tmp_path):
    wide = segment_of(tmp_path / "0-of-1.seg", [1, 2], np.ones((2, 1000)))
    service = CubeService({"t": Table("t", {Version(7): wide})}, 0, 1)
    with pytest.raises(BadRequest, match="keys: found 400,000,000 bytes of rows in one call, expected at most 268,435"):
        answer(service, keys=bytes(8 * 100_000))
    asked = pb.LookupRequest(tables=[pb.TableKeys(table="t", keys=bytes(8 * 1_000))]).SerializeToString()
    waiting = service.lookup(asked, Call(LOOKUP))
    assert asyncio.iscoroutine(waiting)  # 4 MB are no work for the loop
    asyncio.run(_result(waiting))


def test_keys_are_counted_over_all_tables_of_a_call(tmp_path):
    service, _ = service_of(tmp_path, max_keys=10)
    parts = [pb.TableKeys(table="t", keys=KEYS[:6].tobytes()) for _ in range(2)]
    with pytest.raises(BadRequest, match="keys: found 12 keys or bags in one call"):
        service.lookup(pb.LookupRequest(tables=parts).SerializeToString(), Call(LOOKUP))


@pytest.mark.parametrize("keys", [10, 30_000])
def test_nothing_is_looked_up_after_the_deadline(service, keys):
    before = service.tables["t"].keys_found
    late = Call(LOOKUP, deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        answer(service, late, keys=KEYS[np.zeros(keys, np.int64)].tobytes())
    assert service.tables["t"].keys_found == before


def test_a_meter_is_told_of_every_answer_here_and_in_threads(tmp_path):
    told = []
    service, _ = service_of(tmp_path, meter=lambda keys, seconds: told.append((keys, seconds)))
    answer(service, keys=KEYS[:7].tobytes())
    answer(service, keys=np.resize(KEYS, 30_000).tobytes())
    assert [keys for keys, _ in told] == [7, 30_000]
    assert all(0 < seconds < 60 for _, seconds in told)
    assert service.lookups == 2


@pytest.mark.parametrize("gives_up", [False, True], ids=["waits", "gives up"])
def test_a_store_is_held_as_long_as_a_thread_reads_it(tmp_path, gives_up):
    """Also where the caller has gone: nobody can stop the thread."""
    service, store = service_of(tmp_path)
    table, events = service.tables["t"], []
    begun, may_end = threading.Event(), threading.Event()
    lookup = store.lookup

    def slow(*args):
        begun.set()
        assert may_end.wait(10)
        events.append("read")
        return lookup(*args)

    store.lookup = slow
    table.hold = lambda store: events.append("held")
    table.release = lambda store: events.append("released")

    async def work():
        request = pb.LookupRequest(tables=[pb.TableKeys(table="t", keys=np.resize(KEYS, 30_000).tobytes())])
        task = asyncio.ensure_future(service.lookup(request.SerializeToString(), Call(LOOKUP)))
        await asyncio.to_thread(begun.wait, 60)
        if gives_up:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert events.count("held") > events.count("released")
        may_end.set()
        end = time.monotonic() + 60
        while events.count("held") > events.count("released") and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert events.count("held") == events.count("released")
        assert events[-1] == "released"
        assert "read" in events
        if not gives_up:
            await task

    asyncio.run(work())


async def scanned(service, **asked):
    """Messages of a scan over a real socket."""
    listener = Listener(service.handlers(), None)
    address = await listener.start("127.0.0.1:0")
    try:
        async with Channel(address) as channel:
            request = pb.ScanRequest(**asked).SerializeToString()
            stream = await channel.stream(SCAN, request, 60)
            return [pb.ScanReply.FromString(bytes(message)) async for message in stream]
    finally:
        await listener.drain(1)


@pytest.mark.parametrize("row_format", [RowFormat.F32, RowFormat.I8])
def test_a_scan_gives_every_row_once(tmp_path, row_format):
    service, store = service_of(tmp_path, row_format)
    head, *batches = asyncio.run(scanned(service, table="t", batch_rows=64))
    assert (head.total, head.dim, head.row_format, head.row_bytes) == (
        300, 4, row_format.text, store.about.row_bytes,
    )  # fmt: skip
    assert (head.version.base, head.version.delta, head.keys) == (7, 0, b"")
    assert max(len(batch.keys) // 8 for batch in batches) <= 64
    keys = np.frombuffer(b"".join(batch.keys for batch in batches), "<u8")
    rows = np.frombuffer(b"".join(batch.rows for batch in batches), np.uint8).reshape(keys.size, -1)
    assert sorted(keys.tolist()) == sorted(KEYS.tolist())
    raw, found = np.empty_like(rows), np.empty(keys.size, np.bool_)
    store.read(keys, raw, found)
    assert found.all()
    assert np.array_equal(raw, rows)


def test_scans_of_what_is_not_there_are_refused(service):
    with pytest.raises(NotServed, match="table 'x'"):
        asyncio.run(scanned(service, table="x"))
    with pytest.raises(NotServed, match="version 9@0"):
        asyncio.run(scanned(service, table="t", version=pb.Version(base=9)))
    with pytest.raises(BadRequest, match="batch_rows: found 70000, expected at most 65536"):
        asyncio.run(scanned(service, table="t", batch_rows=70_000))


def test_facts_name_the_program_its_rule_and_the_current_version(service):
    facts = service.facts()
    assert facts.program.startswith("cube-server 0.")
    assert (facts.shard_rule, facts.workers, facts.shards) == ("mix", 1, 1)
    assert facts.tables[0].current.base == 7
    assert facts.uptime_s >= 0
