"""Segments: what was written is what is read, and anything else is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN

from cube.errors import DataCorrupt
from cube.storage import index, segment
from cube.storage.segment import Segment
from cube.version import Version

u64 = st.integers(0, 2**64 - 1)


def written(path, keys, rows, **changes):
    facts = {"table": "t", "version": Version(7), "shard": 0, "shards": 1} | changes
    segment.write(path, keys=np.array(keys, np.uint64), rows=np.array(rows, np.float32), **facts)
    return path


def looked_up(opened, keys):
    rows = np.full((len(keys), opened.header.dim), np.nan, np.float32)
    found = np.empty(len(keys), np.bool_)
    absent = opened.lookup(np.array(keys, np.uint64), rows, found)
    assert absent == np.count_nonzero(~found)
    return rows, found


@given(st.dictionaries(u64, st.integers(-9, 9), max_size=60), st.lists(u64, max_size=60), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_lookup_agrees_with_a_dict(tmp_path_factory, stored, others, dim):
    path = tmp_path_factory.mktemp("segment") / "s.seg"
    rows = np.array([[v + d for d in range(dim)] for v in stored.values()], np.float32).reshape(-1, dim)
    opened = Segment(written(path, list(stored), rows))
    asked = [*others, *stored, *others, 0, 2**64 - 1]
    got, found = looked_up(opened, asked)
    assert found.tolist() == [key in stored for key in asked]
    for key, row in zip(asked, got, strict=True):
        assert row.tolist() == ([stored[key] + d for d in range(dim)] if key in stored else [0.0] * dim)


@pytest.mark.parametrize("count", [1, 2, 5, 1000, 200_000])
def test_all_keys_are_found_with_their_rows_and_strangers_are_not(tmp_path, count):
    rng = np.random.default_rng(count)
    keys = np.unique(rng.integers(0, 2**64, count, dtype=np.uint64))
    rng.shuffle(keys)
    rows = rng.standard_normal((keys.size, 3), dtype=np.float32)
    opened = Segment(written(tmp_path / "s.seg", keys, rows))
    got, found = looked_up(opened, keys)
    assert found.all()
    assert np.array_equal(got, rows)
    strangers = np.setdiff1d(rng.integers(0, 2**64, 10_000, dtype=np.uint64), keys)
    got, found = looked_up(opened, strangers)
    assert not found.any()
    assert not got.any()


def test_rows_keep_their_bits(tmp_path):
    rows = np.array([[np.nan, np.inf, -0.0, 1e-45]], np.float32)
    got, _ = looked_up(Segment(written(tmp_path / "s.seg", [5], rows)), [5])
    assert got.tobytes() == rows.tobytes()


def test_a_segment_without_keys_finds_nothing(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", [], np.empty((0, 4))))
    opened.verify()
    got, found = looked_up(opened, [0, 1, 2**64 - 1])
    assert not found.any()
    assert not got.any()


def test_the_index_costs_less_than_0_6_byte_a_key_and_empty_places_less_than_4_percent(tmp_path):
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    header = segment.write(tmp_path / "s.seg", "t", Version(1), 0, 1, keys, np.zeros((keys.size, 1), np.float32))
    assert 2 * header.buckets / keys.size < 0.6
    assert header.places / header.keys < 1.04


def test_every_flipped_byte_is_noticed_at_opening_or_by_verify(tmp_path):
    path = written(tmp_path / "s.seg", [5, 6, 7], [[1.0], [2.0], [3.0]])
    whole = path.read_bytes()
    checked_elsewhere = range(segment.PAGE + 4, segment.PAGE * 2)  # padding after the checksums: no reader looks at it
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 0x40
        path.write_bytes(broken)
        if at in checked_elsewhere:
            continue
        with pytest.raises(DataCorrupt, match=r"s\.seg"):
            Segment(path).verify()


def test_every_truncation_is_noticed_at_opening(tmp_path):
    path = written(tmp_path / "s.seg", [5, 6, 7], [[1.0], [2.0], [3.0]])
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataCorrupt, match=r"s\.seg"):
            Segment(path)


def test_checks_come_in_the_order_magic_version_checksum_length(tmp_path):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    whole = bytearray(path.read_bytes())
    stages = []
    for spoil in (
        lambda b: b.extend(b"x"),
        lambda b: b.__setitem__(20, 9),
        lambda b: b.__setitem__(8, 9),
        lambda b: b.__setitem__(0, 9),
    ):
        spoil(whole)
        path.write_bytes(whole)
        with pytest.raises(DataCorrupt) as raised:
            Segment(path)
        stages.append(raised.value.found)
    assert "bytes" in stages[0]
    assert "checksum" in stages[1]
    assert stages[2] == "format version 9"
    assert "at the start" in stages[3]


@pytest.mark.parametrize(
    "lie", [{"dim": 0}, {"places": 0}, {"places": 1 << 32}, {"keys": 99}, {"buckets": 1}, {"shard": 1}]
)
def test_a_header_that_lies_with_a_right_checksum_is_refused(tmp_path, lie):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    whole = path.read_bytes()
    header = segment._laid_out(Segment(path).header._replace(**lie))
    path.write_bytes(header.encode() + whole[segment.PAGE :])
    with pytest.raises(DataCorrupt, match="expected the ranges of FORMAT"):
        Segment(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataCorrupt, match=r"nowhere\.seg: found No such file"):
        Segment(tmp_path / "nowhere.seg")


def test_the_golden_file_of_version_1_reads_as_it_always_did():
    opened = Segment(GOLDEN / "segment-v1.seg")
    opened.verify()
    assert (opened.header.table, opened.header.version, opened.header.dim) == ("t", Version(7), 1)
    got, found = looked_up(opened, [5, 6])
    assert (got.tolist(), found.tolist()) == ([[1.0], [0.0]], [True, False])


def test_this_build_still_writes_the_golden_file(tmp_path):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    assert path.read_bytes() == (GOLDEN / "segment-v1.seg").read_bytes()


def test_the_example_in_format_md_is_the_golden_file():
    text = (GOLDEN.parent.parent / "cube" / "storage" / "FORMAT.md").read_text()
    raw = (GOLDEN / "segment-v1.seg").read_bytes()
    for start in range(0, 48, 16):
        line = raw[start : start + 16]
        assert f"{start:08x}  {line[:8].hex(' ')}  {line[8:].hex(' ')}" in text


def test_building_is_reproducible(tmp_path):
    keys = np.random.default_rng(3).integers(0, 2**64, 5000, dtype=np.uint64)
    one, two = (index.build(keys, np.zeros((5000, 1), np.uint32)) for _ in range(2))
    assert one[0] == two[0]
    assert np.array_equal(one[1], two[1])
