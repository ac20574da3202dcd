"""Changes over a segment: as a dict would have them, seen wholly or not at all, snapshots untouched."""

import threading

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from stores import looked_up, segment_of

from cube.errors import BadData
from cube.rows import RowFormat
from cube.storage.overlay import OverlaidSegment

KEYS = st.sampled_from([*range(30), 2**64 - 1, 2**63])
STORED = {0: 1.0, 1: 2.0, 2: 3.0, 2**64 - 1: 4.0}


class Changes(RuleBasedStateMachine):
    """Upserts, deletes and snapshots in any order against a dict."""

    snapshots = Bundle("snapshots")

    @property
    def tmp_path(self):
        return Changes.directory / f"{id(self)}.seg"

    def __init__(self):
        super().__init__()
        self.tmp_path.unlink(missing_ok=True)
        self.store = OverlaidSegment(
            segment_of(self.tmp_path, list(STORED), [[v, -v] for v in STORED.values()], partitions=2)
        )
        self.truth = dict(STORED)

    @rule(changes=st.lists(st.tuples(KEYS, st.integers(-99, 99)), max_size=12))
    def upsert(self, changes):
        keys, values = [k for k, _ in changes], [float(v) for _, v in changes]
        self.store.upsert(np.array(keys, np.uint64), np.array([[v, -v] for v in values], np.float32).reshape(-1, 2))
        self.truth |= dict(zip(keys, values, strict=True))

    @rule(keys=st.lists(KEYS, max_size=12))
    def delete(self, keys):
        self.store.delete(np.array(keys, np.uint64))
        for key in keys:
            self.truth.pop(key, None)

    @rule(target=snapshots)
    def snapshot(self):
        return self.store.snapshot(), dict(self.truth)

    @rule(taken=snapshots, keys=st.lists(KEYS, max_size=5))
    def change_a_snapshot(self, taken, keys):
        store, truth = taken
        store.upsert(np.array(keys, np.uint64), np.full((len(keys), 2), 7, np.float32))
        truth |= dict.fromkeys(keys, 7.0)

    @rule(taken=snapshots)
    def a_snapshot_is_as_it_was(self, taken):
        agree(*taken)

    @invariant()
    def agrees(self):
        agree(self.store, self.truth)


def agree(store, truth):
    asked = [*range(30), 2**64 - 1, 2**63, 31]
    rows, found = looked_up(store, asked)
    assert found.tolist() == [key in truth for key in asked]
    assert rows[:, 0].tolist() == [truth.get(key, 0.0) for key in asked]
    assert len(store) == len(truth)
    there = {
        int(key): float(row[:4].view(np.float32)[0])
        for keys, raw in store.scan(7)
        for key, row in zip(keys, raw, strict=True)
    }
    assert there == truth


@pytest.fixture(scope="module", autouse=True)
def _directory(tmp_path_factory):
    Changes.directory = tmp_path_factory.mktemp("overlays")


TestChanges = Changes.TestCase


@pytest.mark.parametrize("row_format", RowFormat)
def test_a_hundred_thousand_changes_in_every_row_format(tmp_path, row_format):
    rng = np.random.default_rng(0)
    keys, rows = np.arange(100_000, dtype=np.uint64), rng.standard_normal((100_000, 5), dtype=np.float32)
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", keys, rows, row_format=row_format))
    changed = rng.permutation(150_000)[:100_000].astype(np.uint64)
    new = rng.standard_normal((changed.size, 5), dtype=np.float32)
    for part in range(0, changed.size, 30_000):
        store.upsert(changed[part : part + 30_000], new[part : part + 30_000])
    gone = changed[::5]
    store.delete(gone)
    raw = np.empty((changed.size, row_format.row_bytes(5)), np.uint8)
    found = np.empty(changed.size, np.bool_)
    store.read(changed, raw, found)
    assert np.array_equal(found, ~np.isin(changed, gone))
    assert np.array_equal(raw[found], row_format.encode(new)[found])
    assert not raw[~found].any()
    assert store.changed == changed.size
    assert len(store) == np.union1d(keys, changed).size - gone.size
    offsets, pooled = np.array([0, 0, 7, changed.size]), np.empty((3, 5), np.float32)
    one_by_one, _ = looked_up(store, changed)
    store.pooled(changed, offsets, False, pooled, found)
    assert np.array_equal(pooled[1], sum(one_by_one[:7], np.zeros(5, np.float32)))


def test_deleted_keys_read_the_default_row(tmp_path):
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", [1, 2], [[1.0], [2.0]], default_row=[0.5]))
    store.delete(np.array([1], np.uint64))
    rows, found = looked_up(store, [1, 2, 3])
    assert (rows[:, 0].tolist(), found.tolist()) == ([0.5, 2.0, 0.5], [False, True, False])


def test_rows_laid_over_a_segment_without_keys(tmp_path):
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", [], np.empty((0, 2))))
    store.upsert(np.array([0, 7], np.uint64), np.array([[1, 2], [3, 4]], np.float32))
    rows, found = looked_up(store, [7, 0, 1])
    assert (rows.tolist(), found.tolist()) == ([[3, 4], [1, 2], [0, 0]], [True, True, False])


def test_what_nothing_leads_to_any_more_is_left_behind(tmp_path):
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", [1], [[1.0]]))
    for turn in range(200):
        store.upsert(np.arange(500, dtype=np.uint64), np.full((500, 1), turn, np.float32))
    assert store.changed == 500
    assert store.overlay_bytes < 100_000


def test_rows_of_another_width_are_refused_and_nothing_changes(tmp_path):
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", [1], [[1.0, 2.0]]))
    with pytest.raises(BadData, match=r"table 't': found rows of shape \(1, 3\), expected \(1, 2\)"):
        store.upsert(np.array([1], np.uint64), np.zeros((1, 3), np.float32))
    assert looked_up(store, [1])[0].tolist() == [[1.0, 2.0]]


def test_lookups_see_a_batch_of_changes_wholly_or_not_at_all(tmp_path):
    keys = np.arange(3000, dtype=np.uint64)
    store = OverlaidSegment(segment_of(tmp_path / "s.seg", keys, np.zeros((3000, 1))))
    stop, mixed = threading.Event(), []

    def read():
        while not stop.is_set():
            rows, found = looked_up(store, keys)
            if not found.all() or np.unique(rows).size != 1:
                mixed.append(rows)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(1, 300):
        store.upsert(keys, np.full((3000, 1), turn, np.float32))
    stop.set()
    for reader in readers:
        reader.join()
    assert not mixed
