"""What every storage engine promises: one suite over all of them, and over one that a newcomer wrote in 20 lines."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
import pytest
import redis
import rocksdict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_servers import cli, redis_cluster, redis_process

import cube.storage.lmdb
from cube.errors import BadConfig, BadData, BadRequest, DataCorrupt, Unavailable, Unimplemented
from cube.rows import RowFormat
from cube.storage.engines import ENGINES, open_store
from cube.storage.index import partitions_of
from cube.storage.store import About, Capabilities, Store
from cube.version import Version

u64 = st.integers(0, 2**64 - 1)
few_u64 = st.sampled_from([0, 1, 2, 3, 255, 256, 2**63, 2**64 - 2, 2**64 - 1])  # so that keys come again
FORMATS, DIMS = list(RowFormat), [1, 3, 10, 16]
EDGES = [0, 1, 2**63, 2**64 - 1]


class DictStore(Store):
    """A newcomer's engine: all that `Store` asks for."""

    capabilities = Capabilities()

    def __init__(self, about, keys, raw):
        self.about, self._rows = about, dict(zip(keys.tolist(), raw, strict=True))

    def __len__(self):
        return len(self._rows)

    def read(self, keys, rows, found):
        default = np.frombuffer(self.about.default_row or bytes(self.about.row_bytes), np.uint8)
        for i, key in enumerate(keys.tolist()):
            found[i] = key in self._rows
            rows[i] = self._rows.get(key, default)
        return keys.size - np.count_nonzero(found)


class Kind(NamedTuple):
    """An engine, and how this suite opens what it writes."""

    name: str
    engine: str
    root: Path
    writable: bool = False
    durable: bool = True
    url: str = ""

    def place(self):
        """A name that no store has yet."""
        directory = self.root / str(next(_numbers))
        directory.mkdir()
        return directory / f"0-of-1{ENGINES[self.engine].suffix}"

    def writer(self, path, about, partitions=1):
        return ENGINES[self.engine].write(path, about, partitions, self.url)

    def written(self, about, keys, raw, partitions=1):
        """The place of a finished store of distinct keys and their encoded rows."""
        path, partition = self.place(), partitions_of(keys, partitions)
        writer = self.writer(path, about, partitions)
        try:
            for number in range(partitions):
                writer.add(writer.prepare(keys[partition == number], raw[partition == number]))
            writer.finish()
        finally:
            writer.close()
        return path

    @contextmanager
    def opened(self, path):
        store = open_store(path, self.writable)
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def store(self, about, keys, raw, partitions=1):
        if self.engine == "newcomer":
            yield DictStore(about, keys, raw)
        else:
            with self.opened(self.written(about, keys, raw, partitions)) as store:
                yield store


KINDS = {
    "segment": ("segment", False, True),
    "segment overlaid": ("segment", True, False),
    "rocksdb": ("rocksdb", False, True),
    "rocksdb writable": ("rocksdb", True, True),
    "lmdb": ("lmdb", False, True),
    "redis": ("redis", True, True),
    "redis cluster": ("redis", True, True),
}
WRITABLE = [name for name, (_, writable, _) in KINDS.items() if writable]
_numbers = itertools.count()


PATIENT = "?socket_timeout=60&socket_connect_timeout=60"  # a machine may stand still for some seconds


@pytest.fixture(scope="session")
def redis_url():
    with redis_process() as (port, _):
        yield f"redis://127.0.0.1:{port}{PATIENT}"


@pytest.fixture(scope="session")
def cluster_ports():
    with redis_cluster() as ports:
        yield ports


@pytest.fixture(scope="session")
def cluster_url(cluster_ports):
    return f"redis+cluster://127.0.0.1:{cluster_ports[0]}{PATIENT}"


def _kind(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    if request.param == "newcomer":
        return Kind("newcomer", "newcomer", root)
    urls = {"redis": "redis_url", "redis cluster": "cluster_url"}
    url = request.getfixturevalue(urls[request.param]) if request.param in urls else ""
    engine, writable, durable = KINDS[request.param]
    return Kind(request.param, engine, root, writable, durable, url)


kind = pytest.fixture(scope="module", params=[*KINDS, "newcomer"])(_kind)  # all that hold rows
stored_kind = pytest.fixture(scope="module", params=list(KINDS))(_kind)  # those with a place of their own
writable_kind = pytest.fixture(scope="module", params=WRITABLE)(_kind)
redis_kind = pytest.fixture(scope="module", params=["redis", "redis cluster"])(_kind)


def about_of(dim=3, row_format=RowFormat.F32, default_row=b""):
    return About("ad {click}*", Version(1763766000, 2), 0, 1, dim, row_format, default_row)


def some_rows(count, dim, seed=0):
    """Distinct keys, those at the edges among them, and rows: uint64[count], float32[count, dim]."""
    rng = np.random.default_rng(seed)
    keys = np.unique(np.concatenate([np.array(EDGES, np.uint64), rng.integers(0, 2**64, 2 * count, dtype=np.uint64)]))
    keys = np.concatenate([keys[[0, -1]], rng.permutation(keys[1:-1])[: count - 2]])
    return rng.permutation(keys), rng.standard_normal((count, dim), dtype=np.float32)


def raw_read(store, keys):
    """Rows as stored and marks, into buffers full of what was there before."""
    keys = np.array(keys, np.uint64)
    rows, found = np.full((keys.size, store.about.row_bytes), 0xAA, np.uint8), np.ones(keys.size, np.bool_)
    assert store.read(keys, rows, found) == np.count_nonzero(~found)
    return rows, found


def looked_up(store, keys):
    keys = np.array(keys, np.uint64)
    rows, found = np.full((keys.size, store.about.dim), np.nan, np.float32), np.ones(keys.size, np.bool_)
    assert store.lookup(keys, rows, found) == np.count_nonzero(~found)
    return rows, found


def scanned(store, batch=65536):
    """All rows of a store as key → bytes; none may come twice."""
    rows = {}
    for keys, raw in store.scan(batch):
        assert keys.dtype == np.uint64
        assert raw.shape == (keys.size, store.about.row_bytes)
        assert keys.size <= batch
        assert not rows.keys() & set(keys.tolist())
        rows |= zip(keys.tolist(), map(bytes, raw), strict=True)
    return rows


def decoded(row_format, raw):
    """The slow twin of decoding: float32[n, dim]."""
    if row_format is RowFormat.F32:
        return raw.view(np.float32)
    if row_format is RowFormat.F16:
        return raw.view(np.float16).astype(np.float32)
    if row_format is RowFormat.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    parameters = raw[:, :8].copy().view(np.float32)
    return raw[:, 8:].astype(np.float32) * parameters[:, :1] + parameters[:, 1:]


def pooled(rows, offsets, mean):
    """The slow twin of pooling: float32[bags, dim]."""
    out = np.zeros((len(offsets) - 1, rows.shape[1]), np.float32)
    for bag, (begin, end) in enumerate(itertools.pairwise(offsets)):
        for row in rows[begin:end]:
            out[bag] += row
        if mean and end > begin:
            out[bag] /= np.float32(end - begin)
    return out


class Sample(NamedTuple):
    """An open store, what is in it, and keys to ask for: present, absent, and some of both twice."""

    store: Store
    keys: np.ndarray
    raw: np.ndarray
    default: np.ndarray
    asked: np.ndarray

    def expected(self):
        """uint8[n, row_bytes] and bool[n] for `asked`."""
        rows = dict(zip(self.keys.tolist(), self.raw, strict=True))
        found = [key in rows for key in self.asked.tolist()]
        return np.array([rows.get(key, self.default) for key in self.asked.tolist()]), np.array(found)


@pytest.fixture(scope="module", params=[(f, d, f is not RowFormat.BF16) for f in FORMATS for d in DIMS], ids=str)
def sample(request, kind):
    row_format, dim, with_default = request.param
    keys, rows = some_rows(300, dim)
    raw = row_format.encode(rows)
    default = row_format.encode(np.linspace(-1, 2, dim, dtype=np.float32)[None])[0]
    about = about_of(dim, row_format, default.tobytes() if with_default else b"")
    strangers = some_rows(200, 1, seed=9)[0]
    asked = np.random.default_rng(1).permutation(np.concatenate([keys, strangers, keys[:50], strangers[:50]]))
    with kind.store(about, keys, raw) as store:
        yield Sample(store, keys, raw, default if with_default else np.zeros_like(default), asked)


def test_rows_are_read_as_they_were_written_and_absent_ones_are_the_default_row_or_zeros(sample):
    rows, found = raw_read(sample.store, sample.asked)
    expected, present = sample.expected()
    assert found.tolist() == present.tolist()
    assert np.array_equal(rows, expected)


def test_lookups_decode(sample):
    rows, found = looked_up(sample.store, sample.asked)
    expected, present = sample.expected()
    assert found.tolist() == present.tolist()
    assert rows.tobytes() == decoded(sample.store.about.row_format, expected).tobytes()


@pytest.mark.parametrize("mean", [False, True])
def test_bags_are_pooled_like_the_slow_twin_to_the_bit(sample, mean):
    store, size = sample.store, sample.asked.size
    expected, present = sample.expected()
    offsets = np.concatenate([[0, 0], np.sort(np.random.default_rng(2).integers(0, size, 120)), [size, size]])
    out, found = np.full((offsets.size - 1, store.about.dim), np.nan, np.float32), np.ones(size, np.bool_)
    absent = store.pooled(sample.asked, offsets, mean, out, found)
    assert absent == np.count_nonzero(~present)
    assert found.tolist() == present.tolist()
    assert out.tobytes() == pooled(decoded(store.about.row_format, expected), offsets, mean).tobytes()


def test_its_size_is_the_number_of_keys(sample):
    assert len(sample.store) == sample.keys.size


def test_a_scan_gives_exactly_what_was_stored(sample):
    if not sample.store.capabilities.scan:
        with pytest.raises(Unimplemented, match="cannot scan"):
            list(sample.store.scan())
        return
    truth = dict(zip(sample.keys.tolist(), map(bytes, sample.raw), strict=True))
    assert scanned(sample.store) == truth
    assert scanned(sample.store, batch=7) == truth


@given(st.dictionaries(u64, st.integers(-9, 9), max_size=60), st.lists(u64, max_size=60))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_lookup_agrees_with_a_dict(kind, stored, others):
    rows = np.array([[v, v + 1, v + 2] for v in stored.values()], np.float32).reshape(-1, 3)
    with kind.store(about_of(), np.array(list(stored), np.uint64), RowFormat.F32.encode(rows)) as store:
        asked = [*others, *stored, *others, *EDGES]
        got, found = looked_up(store, asked)
        assert found.tolist() == [key in stored for key in asked]
        assert got.tolist() == [[stored[k] + d for d in range(3)] if k in stored else [0.0] * 3 for k in asked]
        assert len(store) == len(stored)


@pytest.mark.parametrize("count", [0, 2])
def test_no_keys_no_rows(kind, count):
    keys, rows = some_rows(2, 3)
    with kind.store(about_of(), keys[:count], RowFormat.F32.encode(rows[:count])) as store:
        assert raw_read(store, [])[0].shape == (0, 12)
        out, found = np.full((2, 3), np.nan, np.float32), np.empty(0, np.bool_)
        assert store.pooled(np.empty(0, np.uint64), np.zeros(3, np.int64), False, out, found) == 0
        assert not out.any()
        assert looked_up(store, [0, 7, 2**64 - 1, 7])[1].tolist() == [count == 2, False, count == 2, False]
        assert len(store) == count
        if store.capabilities.scan:
            assert len(scanned(store)) == count


def test_a_hundred_thousand_keys_half_of_them_absent(kind):
    keys, rows = some_rows(50_000, 4)
    strangers = np.setdiff1d(some_rows(50_100, 1, seed=5)[0], keys)[:50_000]
    order = np.random.default_rng(4).permutation(100_000)
    with kind.store(about_of(4), keys, RowFormat.F32.encode(rows)) as store:
        got, found = looked_up(store, np.concatenate([keys, strangers])[order])
    assert np.array_equal(found, (order < keys.size))
    assert np.array_equal(got, np.concatenate([rows, np.zeros((50_000, 4), np.float32)])[order])


def test_partitions_make_one_store(stored_kind):
    keys, rows = some_rows(5000, 3)
    with stored_kind.store(about_of(), keys, RowFormat.F32.encode(rows), partitions=4) as store:
        got, found = looked_up(store, keys)
        assert found.all()
        assert np.array_equal(got, rows)
        assert len(store) == len(scanned(store)) == keys.size


def test_four_threads_at_once_read_what_one_reads(kind):
    keys, rows = some_rows(2000, 3)
    with kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
        agree = []

        def read():
            for start in range(0, 2000, 100):
                got, found = looked_up(store, keys[start : start + 100])
                agree.append(found.all() and np.array_equal(got, rows[start : start + 100]))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert agree == [True] * 80


def test_reopening_gives_the_same_facts_and_rows(stored_kind):
    keys, rows = some_rows(100, 3)
    about = about_of(default_row=np.ones(3, np.float32).tobytes())
    path = stored_kind.written(about, keys, RowFormat.F32.encode(rows))
    with stored_kind.opened(path) as first:
        before = raw_read(first, [*keys, 5])[0]
        facts = first.about
    with stored_kind.opened(path) as second:
        assert second.about == facts == about
        assert np.array_equal(raw_read(second, [*keys, 5])[0], before)


def test_a_store_opened_twice_is_closed_once_at_a_time(stored_kind):
    keys, rows = some_rows(10, 3)
    path = stored_kind.written(about_of(), keys, RowFormat.F32.encode(rows))
    with stored_kind._replace(writable=False).opened(path) as kept:
        with stored_kind._replace(writable=False).opened(path) as closed:
            assert looked_up(closed, keys)[1].all()
        assert looked_up(kept, keys)[1].all()


def test_what_is_not_finished_cannot_be_opened(stored_kind):
    keys, rows = some_rows(10, 3)
    path = stored_kind.place()
    writer = stored_kind.writer(path, about_of())
    writer.add(writer.prepare(keys, RowFormat.F32.encode(rows)))
    read_only = stored_kind._replace(writable=False)
    with pytest.raises(DataCorrupt, match=path.name), read_only.opened(path):
        pass
    writer.close()
    with pytest.raises(DataCorrupt, match=path.name), read_only.opened(path):
        pass


@pytest.mark.parametrize("there", ["nothing", "an empty file", "another file"])
def test_what_is_no_store_is_refused_naming_it(stored_kind, there):
    path = stored_kind.place()
    if there != "nothing":
        path.write_bytes(b"" if there == "an empty file" else os.urandom(20_000))
    with pytest.raises(DataCorrupt, match=path.name), stored_kind.opened(path):
        pass


# How to put something in place of what a store keeps under a name; None removes it.


def _put_rocksdb(path, name, value):
    db = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    if value is None:
        db.delete(name)
    else:
        db[name] = value
    db.close()


def _put_lmdb(path, name, value):
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as writing:
        if value is None:
            writing.delete(name)
        else:
            writing.put(name, value)


def _put_redis(path, name, value):
    place = json.loads(path.read_text())
    kind = redis.RedisCluster if "+cluster" in place["url"] else redis.Redis
    with kind.from_url(place["url"].replace("+cluster", "")) as client:
        if name.endswith(b"about"):
            name = f"{{{place['prefix']}/00}}about"
        else:
            name = next(n for n in client.scan_iter(f"{{{place['prefix']}/*", count=10_000) if n.endswith(b"}" + name))
        if value is None:
            client.delete(name)
        else:
            client.set(name, value)


PUT = {"rocksdb": _put_rocksdb, "lmdb": _put_lmdb, "redis": _put_redis}
FACTS = b"\xff" * 8 + b"about"


@pytest.mark.parametrize("facts", [None, b"", b"{", b"[1]", b"\xff\xfe", about_of(dim=0).encode(), b"longer" * 9999])
def test_missing_or_garbled_facts_are_refused_naming_the_store(stored_kind, facts):
    if stored_kind.engine not in PUT:
        pytest.skip("its header has a checksum; test_segment.py flips every byte")
    keys, rows = some_rows(10, 3)
    path = stored_kind.written(about_of(), keys, RowFormat.F32.encode(rows))
    PUT[stored_kind.engine](path, FACTS, facts)
    with pytest.raises(DataCorrupt, match=path.name), stored_kind.opened(path):
        pass


@pytest.mark.parametrize("width", [0, 11, 13])
def test_a_stored_row_of_another_width_is_refused_naming_the_store(stored_kind, width):
    if stored_kind.engine not in PUT:
        pytest.skip("its rows have one width")
    keys, rows = np.array([1, 2, 3], np.uint64), np.zeros((3, 3), np.float32)
    path = stored_kind.written(about_of(), keys, RowFormat.F32.encode(rows))
    PUT[stored_kind.engine](path, (2).to_bytes(8, "big"), bytes(width))
    with stored_kind.opened(path) as store:
        assert looked_up(store, [1, 3, 4])[1].tolist() == [True, True, False]
        for asked in ([1, 2, 3], [1, 2, 4]):
            with pytest.raises(DataCorrupt, match=rf"{path.name}.* found a row of {width} bytes, expected the 12 "):
                looked_up(store, asked)
        with pytest.raises(DataCorrupt, match=path.name):
            scanned(store)


changes = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(few_u64, st.integers(-9, 9)), max_size=8)), min_size=1, max_size=8
)


@given(st.dictionaries(few_u64, st.integers(-9, 9)), changes)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_changes_agree_with_a_dict(writable_kind, stored, history):
    model = {key: [value, 0.5] for key, value in stored.items()}
    keys, rows = np.array(list(model), np.uint64), np.array(list(model.values()), np.float32).reshape(-1, 2)

    def agrees():
        asked = [*EDGES, 2, 3, 255, 256, 2**64 - 2, 1, 5]
        got, found = looked_up(store, asked)
        assert found.tolist() == [key in model for key in asked]
        assert got.tolist() == [model.get(key, [0.0, 0.0]) for key in asked]
        assert len(store) == len(model)
        assert scanned(store) == {key: np.array(row, np.float32).tobytes() for key, row in model.items()}

    path = writable_kind.written(about_of(2), keys, RowFormat.F32.encode(rows))
    with writable_kind.opened(path) as store:
        assert store.capabilities.writable
        for deleting, batch in history:
            keys = np.array([key for key, _ in batch], np.uint64)
            if deleting:
                store.delete(keys)
                model = {key: row for key, row in model.items() if key not in keys.tolist()}
            else:
                store.upsert(keys, np.array([[v, -v] for _, v in batch], np.float32).reshape(-1, 2))
                model |= {key: [v, -v] for key, v in batch}
            agrees()
    if writable_kind.durable:
        with writable_kind.opened(path) as store:
            agrees()


def test_many_changes_at_once_in_every_row_format(writable_kind):
    for row_format in RowFormat:
        keys, rows = some_rows(20_000, 3)
        raw, later = row_format.encode(rows), row_format.encode(rows + 1)
        with writable_kind.store(about_of(3, row_format), keys[:10_000], raw[:10_000]) as store:
            store.upsert(keys[5000:], (rows + 1)[5000:])
            store.delete(keys[::2])
            got, found = raw_read(store, keys)
            assert found.tolist() == [False, True] * 10_000
            assert np.array_equal(got[1:5000:2], raw[1:5000:2])
            assert np.array_equal(got[5001::2], later[5001::2])
            assert len(store) == 10_000


def test_an_upsert_of_another_shape_is_refused_and_changes_nothing(writable_kind):
    keys, rows = some_rows(4, 3)
    with writable_kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
        for wrong in (rows[:3], rows[:, :2], rows.reshape(-1)):
            with pytest.raises(BadData, match="rows of shape"):
                store.upsert(keys, wrong)
        assert np.array_equal(looked_up(store, keys)[0], rows)


def test_what_cannot_be_written_to_refuses(kind):
    keys, rows = some_rows(4, 3)
    with kind._replace(writable=False).store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
        assert not store.capabilities.writable
        with pytest.raises(Unimplemented, match="cannot upsert"):
            store.upsert(keys, rows + 1)
        with pytest.raises(Unimplemented, match="cannot delete"):
            store.delete(keys)
        assert np.array_equal(looked_up(store, keys)[0], rows)


def test_verify_reads_all_and_stops_when_told_to(kind):
    keys, rows = some_rows(1000, 3)
    with kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
        if not store.capabilities.verify:
            with pytest.raises(Unimplemented, match="cannot verify"):
                store.verify()
            return

        def stop(_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.verify(stop)
        assert store.checked == "no"
        read = []
        store.verify(read.append)
        assert sum(read) >= raw_bytes(rows)
        assert store.checked == "yes"


def raw_bytes(rows):
    return len(rows) * 8 + rows.nbytes


# Engines as a whole


def test_a_suffix_that_no_engine_has_is_refused():
    with pytest.raises(
        BadData, match=r"x\.txt: found suffix '\.txt', expected \.seg or \.rocksdb or \.lmdb or \.redis"
    ):
        open_store(Path("x.txt"))


@pytest.mark.parametrize(("engine", "package"), [("rocksdb", "rocksdict"), ("lmdb", "lmdb"), ("redis", "redis")])
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, tmp_path, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"cube.storage.{engine}", raising=False)
    expected = rf"no package '{package}', expected it installed: pip install 'cube-serving\[{engine}\]'"
    with pytest.raises(BadConfig, match=expected):
        open_store(tmp_path / f"x.{engine}")


def test_a_row_read_as_the_engine_stores_it_is_found_in_any_other(tmp_path_factory, redis_url):
    """The answer does not depend on the engine, nor on what a store was built from."""
    keys, rows = some_rows(500, 5)
    source = Kind("segment", "segment", tmp_path_factory.mktemp("stores"))
    for engine in ENGINES:
        kind = source._replace(engine=engine, url=redis_url if engine == "redis" else "")
        with source.store(about_of(5), keys, RowFormat.F32.encode(rows)) as store:
            batches = [np.concatenate(parts) for parts in zip(*store.scan(100), strict=True)]
        with kind.store(about_of(5), *batches) as store:
            assert np.array_equal(looked_up(store, keys)[0], rows)
        source = kind


# RocksDB


def test_rocksdb_notices_every_flipped_byte_of_its_rows_at_opening_or_by_verify(tmp_path_factory):
    """Or it is one of a Bloom filter, which RocksDB ignores once it is damaged, without a word: no answer is wrong."""
    kind = Kind("rocksdb", "rocksdb", tmp_path_factory.mktemp("stores"))
    keys, rows = some_rows(20, 2)
    path, raw = kind.written(about_of(2), keys, RowFormat.F32.encode(rows)), RowFormat.F32.encode(rows)
    flips = noticed = 0
    for file in path.glob("*.sst"):
        whole = file.read_bytes()
        in_rows = {at for row in raw for at in range(whole.find(bytes(row)), whole.find(bytes(row)) + 8) if at >= 0}
        for at in sorted({*range(0, len(whole), 7), *in_rows}):
            broken = bytearray(whole)
            broken[at] ^= 0x40
            file.write_bytes(broken)
            flips += 1
            try:
                with kind.opened(path) as store:
                    store.verify()
                    got, found = looked_up(store, keys)
            except DataCorrupt:
                noticed += 1
            else:
                assert at not in in_rows
                assert found.all()
                assert np.array_equal(got, rows)
        file.write_bytes(whole)
    assert noticed > 0.9 * flips


def test_rocksdb_notices_every_cut_file_at_opening(tmp_path_factory):
    kind = Kind("rocksdb", "rocksdb", tmp_path_factory.mktemp("stores"))
    keys, rows = some_rows(20, 2)
    path = kind.written(about_of(2), keys, RowFormat.F32.encode(rows))
    for file in path.glob("*.sst"):
        whole = file.read_bytes()
        for size in range(0, len(whole), 41):
            file.write_bytes(whole[:size])
            with pytest.raises(DataCorrupt, match=path.name), kind.opened(path):
                pass
        file.write_bytes(whole)


def test_a_rocksdb_that_is_written_to_is_not_opened_for_writing_again(tmp_path_factory):
    kind = Kind("rocksdb", "rocksdb", tmp_path_factory.mktemp("stores"), writable=True)
    keys, rows = some_rows(20, 2)
    path = kind.written(about_of(2), keys, RowFormat.F32.encode(rows))
    with kind.opened(path) as store:
        with pytest.raises(DataCorrupt, match="open for writing nowhere else"), kind.opened(path):
            pass
        with kind._replace(writable=False).opened(path) as reader:
            store.delete(keys)
            assert looked_up(reader, keys)[1].all()
            assert (len(store), len(reader)) == (0, 20)


# LMDB


def test_an_lmdb_file_that_is_cut_is_refused_instead_of_killing_the_process(tmp_path_factory):
    kind = Kind("lmdb", "lmdb", tmp_path_factory.mktemp("stores"))
    keys, rows = some_rows(500, 2)
    path = kind.written(about_of(2), keys, RowFormat.F32.encode(rows))
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 1024), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataCorrupt, match=path.name), kind.opened(path):
            pass


def test_an_lmdb_map_grows_as_rows_come(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(cube.storage.lmdb, "_FIRST_MAP_BYTES", 1 << 16)
    kind = Kind("lmdb", "lmdb", tmp_path_factory.mktemp("stores"))
    keys, rows = some_rows(20_000, 16)
    with kind.store(about_of(16), keys, RowFormat.F32.encode(rows), partitions=3) as store:
        assert np.array_equal(looked_up(store, keys)[0], rows)


# Redis


def _redis_kind(root, port, user="", cluster=False):
    scheme = "redis+cluster" if cluster else "redis"
    return Kind("redis", "redis", root, writable=True, url=f"{scheme}://{user}127.0.0.1:{port}/0")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_gone_or_silent_is_unavailable_soon_and_its_password_stays_secret(tmp_path, how):
    with redis_process("--requirepass", "s3cret") as (port, process):
        kind = _redis_kind(tmp_path, port, ":s3cret@")
        if how == signal.SIGSTOP:  # the test below waits for the default one
            kind = kind._replace(url=f"{kind.url}?socket_timeout=1")
        keys, rows = some_rows(10, 3)
        path = kind.written(about_of(), keys, RowFormat.F32.encode(rows))
        with kind.opened(path) as store:
            assert looked_up(store, keys)[1].all()
            os.kill(process.pid, how)
            for action in (
                lambda: looked_up(store, keys),
                lambda: store.upsert(keys, rows),
                lambda: store.delete(keys),
                lambda: list(store.scan()),
                lambda: len(store),
                lambda: open_store(path),
                lambda: kind.writer(path, about_of()),
            ):
                begin = time.monotonic()
                with pytest.raises(Unavailable, match=f"redis at redis://127.0.0.1:{port}/0: ") as raised:
                    action()
                assert time.monotonic() - begin < 50
                assert "s3cret" not in str(raised.value) + repr(store) + str(store.__dict__)


def test_after_a_server_was_away_its_rows_are_there_again(tmp_path):
    with redis_process() as (port, process):
        kind = _redis_kind(tmp_path, port)
        keys, rows = some_rows(10, 3)
        with kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(Unavailable):
                looked_up(store, keys[:5])
            os.kill(process.pid, signal.SIGCONT)
            got, found = looked_up(store, keys)  # not the answer to the question before
            assert found.all()
            assert np.array_equal(got, rows)


def test_a_node_that_is_gone_makes_a_cluster_unavailable_soon(tmp_path):
    with redis_cluster() as ports:
        kind = _redis_kind(tmp_path, ports[0], cluster=True)
        keys, rows = some_rows(500, 3)
        with kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
            cli(ports[1], "shutdown", "nosave")
            for _ in range(3):
                begin = time.monotonic()
                with pytest.raises(Unavailable, match=rf"redis at redis\+cluster://127.0.0.1:{ports[0]}/0: "):
                    looked_up(store, keys)
                assert time.monotonic() - begin < 50


def test_rows_are_found_while_the_slots_of_a_cluster_move(tmp_path):
    with redis_cluster() as ports:
        kind = _redis_kind(tmp_path, ports[0], cluster=True)
        keys, rows = some_rows(2000, 3)
        path = kind.written(about_of(), keys, RowFormat.F32.encode(rows))
        ids = [cli(port, "cluster", "myid").strip() for port in ports]
        with kind.opened(path) as store:
            with redis.Redis(port=ports[0]) as source, redis.Redis(port=ports[1]) as target:
                name = next(n for n in source.scan_iter("{*", count=1000) if n[-9:-8] == b"}")
                names = list(source.scan_iter(name[:-8] + b"*", count=1000))  # of one bucket
                slot = source.execute_command("CLUSTER KEYSLOT", name)
                assert len(names) == source.execute_command("CLUSTER COUNTKEYSINSLOT", slot)
                migrate = ("MIGRATE", "127.0.0.1", ports[1], "", 0, 2000, "KEYS")
                target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
                source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
                assert source.execute_command(*migrate, *names[:10]) == b"OK"
                truth = dict(zip(keys.tolist(), rows.tolist(), strict=True))
                for some in (keys, keys[:3], np.arange(500, dtype=np.uint64)):
                    got, found = looked_up(store, some)
                    assert found.tolist() == [key in truth for key in some.tolist()]
                    assert got.tolist() == [truth.get(key, [0.0] * 3) for key in some.tolist()]
                assert source.execute_command(*migrate, *names[10:]) == b"OK"
                for node in (source, target):
                    node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
            for _ in range(2):  # it has moved: redirected at first
                assert looked_up(store, keys)[1].all()
            store.upsert(keys, rows + 1)
            assert np.array_equal(looked_up(store, keys)[0], rows + 1)
            assert len(store) == keys.size


def test_a_writer_closed_before_it_is_finished_takes_its_rows_along(redis_kind):
    keys, rows = some_rows(3000, 3)
    kind = redis.RedisCluster if "cluster" in redis_kind.name else redis.Redis
    with kind.from_url(redis_kind.url.replace("+cluster", "")) as client:

        def names():
            return set(client.scan_iter(b"{gone/*", count=10_000))

        writer = redis_kind.writer(redis_kind.place(), about_of()._replace(table="gone"))
        writer.add(writer.prepare(keys, RowFormat.F32.encode(rows)))
        assert len(names()) == 3000
        writer.close()
        assert not names()


def test_stores_on_one_server_do_not_see_each_other(redis_kind):
    keys, rows = some_rows(100, 3)
    with (
        redis_kind.store(about_of(), keys[:50], RowFormat.F32.encode(rows[:50])) as one,
        redis_kind.store(about_of(), keys[50:], RowFormat.F32.encode(rows[50:])) as two,
    ):
        one.delete(keys)
        assert (len(one), len(two), len(scanned(two))) == (0, 50, 50)
        assert looked_up(two, keys)[1].tolist() == [False] * 50 + [True] * 50


def test_writers_of_one_redis_store_keep_its_size_right(redis_kind):
    keys, rows = some_rows(4000, 3)
    path = redis_kind.written(about_of(), keys[:0], RowFormat.F32.encode(rows[:0]))
    with redis_kind.opened(path) as one, redis_kind.opened(path) as two:
        threads = [threading.Thread(target=store.upsert, args=(keys, rows)) for store in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(one), len(two)) == (4000, 4000)


@pytest.mark.parametrize(
    "url",
    ["", "http://127.0.0.1", "127.0.0.1:6379", "redis://", "redis://u:s3/cret@h:1", "redis://u:s3cret@h:s3cret",
     "redis+cluster://u:s3?cret@h", "redis://u:s3#cret@h", "redis://u:s3cret@h:1?socket_timeout=s3cret"],
)  # fmt: skip
def test_what_is_no_url_of_redis_is_refused_and_not_repeated(tmp_path, url):
    with pytest.raises(BadConfig, match="redis") as raised:
        ENGINES["redis"].write(tmp_path / "x.redis", about_of(), 1, url)
    assert "cret" not in str(raised.value)


def test_a_wrong_password_is_told_without_repeating_it(tmp_path):
    with redis_process("--requirepass", "right") as (port, _):
        with pytest.raises(Unavailable, match=f"redis at redis://127.0.0.1:{port}/0: ") as raised:
            _redis_kind(tmp_path, port, "user:wr0ng@").writer(tmp_path / "x.redis", about_of())
        assert "wr0ng" not in str(raised.value)


def test_a_unix_socket_is_a_server_too(tmp_path):
    with redis_process("--unixsocket", str(tmp_path / "s")):
        keys, rows = some_rows(100, 3)
        with Kind("redis", "redis", tmp_path, url=f"unix://{tmp_path}/s").store(
            about_of(), keys, RowFormat.F32.encode(rows)
        ) as store:
            assert np.array_equal(looked_up(store, keys)[0], rows)


def test_a_redis_file_with_what_no_build_wrote_is_refused(redis_kind):
    keys, rows = some_rows(10, 3)
    path = redis_kind.written(about_of(), keys, RowFormat.F32.encode(rows))
    whole = json.loads(path.read_text())
    for broken in (whole | {"more": 1}, whole | {"prefix": 5}, {"url": whole["url"]}, whole | {"about": [1, 2]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataCorrupt, match=path.name):
            open_store(path)
    other = about_of()._replace(table="another")
    path.write_text(json.dumps(whole | {"about": json.loads(other.encode())}))
    with pytest.raises(DataCorrupt, match="facts of another table"):
        open_store(path)


def test_bags_that_do_not_fit_the_keys_are_refused(stored_kind):
    keys, rows = np.array([1, 2, 3], np.uint64), np.zeros((3, 3), np.float32)
    with stored_kind.store(about_of(), keys, RowFormat.F32.encode(rows)) as store:
        for offsets in ([0, 2], [0, 4], [1, 3], [0, 3, 2, 3], []):
            with pytest.raises(BadRequest, match="offsets: found int64 offsets"):
                store.pooled(
                    keys,
                    np.array(offsets, np.int64),
                    False,
                    np.empty((len(offsets), 3), np.float32),
                    np.empty(3, np.bool_),
                )
