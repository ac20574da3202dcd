"""Segments: what was written is what is read, and anything else is noticed."""

import os
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from stores import looked_up, segment_of

from cube.errors import DataCorrupt
from cube.keys import ShardRule
from cube.rows import RowFormat
from cube.storage import index, segment
from cube.storage.segment import Segment, SegmentWriter
from cube.storage.store import About
from cube.version import Version

u64 = st.integers(0, 2**64 - 1)


def written(path, keys, rows, **facts):
    """A segment of these rows; how it is opened is the test's business."""
    segment_of(path, keys, rows, **facts)
    return path


def flipped(path, bits):
    """The file with each of its bytes changed in turn."""
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ bits]), at)
            yield at
            os.pwrite(file.fileno(), bytes([byte]), at)


@given(
    st.dictionaries(u64, st.integers(-9, 9), max_size=60),
    st.lists(u64, max_size=60),
    st.integers(1, 9),
    st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_lookup_agrees_with_a_dict(tmp_path_factory, stored, others, dim, partitions):
    path = tmp_path_factory.mktemp("segment") / "s.seg"
    rows = np.array([[v + d for d in range(dim)] for v in stored.values()], np.float32).reshape(-1, dim)
    opened = Segment(written(path, list(stored), rows, partitions=partitions))
    asked = [*others, *stored, *others, 0, 2**64 - 1]
    got, found = looked_up(opened, asked)
    assert found.tolist() == [key in stored for key in asked]
    for key, row in zip(asked, got, strict=True):
        assert row.tolist() == ([stored[key] + d for d in range(dim)] if key in stored else [0.0] * dim)


@pytest.mark.parametrize(("count", "partitions"), [(1, 1), (2, 3), (5, 1), (1000, 1), (1000, 9), (200_000, 3)])
def test_all_keys_are_found_with_their_rows_and_strangers_are_not(tmp_path, count, partitions):
    rng = np.random.default_rng(count)
    keys = np.unique(rng.integers(0, 2**64, count, dtype=np.uint64))
    rng.shuffle(keys)
    rows = rng.standard_normal((keys.size, 3), dtype=np.float32)
    opened = Segment(written(tmp_path / "s.seg", keys, rows, partitions=partitions))
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
    header = Segment(written(tmp_path / "s.seg", keys, np.zeros((keys.size, 1)), partitions=3)).header
    assert (2 * header.buckets + 32 * header.partitions) / keys.size < 0.6
    assert header.places / header.keys < 1.04


@pytest.mark.parametrize(
    ("row_format", "dim", "stride"),
    [
        ("F32", 16, 72),
        ("F32", 10, 48),
        ("F16", 16, 40),
        ("BF16", 10, 32),
        ("I8", 16, 32),
        ("I8", 10, 32),
        ("I8", 1, 24),
    ],
)
def test_a_place_is_key_and_row_in_multiples_of_8_bytes(tmp_path, row_format, dim, stride):
    rows, facts = np.ones((3, dim)), {"row_format": RowFormat[row_format]}
    assert Segment(written(tmp_path / "s.seg", [1, 2, 3], rows, **facts)).header.stride == stride


@pytest.mark.parametrize(
    "facts", [{}, {"row_format": RowFormat.I8, "default_row": [0.5], "partitions": 3}], ids=["f32", "i8"]
)
def test_every_flipped_byte_is_noticed_at_opening_or_by_verify(tmp_path, facts):
    path = written(tmp_path / "s.seg", [5, 6, 7], [[1.0], [2.0], [3.0]], **facts)
    for _ in flipped(path, 0x40):
        with pytest.raises(DataCorrupt, match=r"s\.seg"):
            Segment(path).verify()


def test_no_flipped_byte_crashes_a_lookup(tmp_path):
    path = written(tmp_path / "s.seg", [5, 6, 7], [[1.0], [2.0], [3.0]], partitions=2, default_row=[9.0])
    for _ in flipped(path, 0xFF):
        try:
            opened = Segment(path)
        except DataCorrupt:
            continue
        looked_up(opened, [5, 6, 7, 8])


def test_what_is_found_corrupt_is_not_served_any_more(tmp_path):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    raw = bytearray(path.read_bytes())
    raw[segment.PAGE + 8] ^= 1
    path.write_bytes(raw)
    opened = Segment(path)
    assert opened.checked == "no"
    looked_up(opened, [5])
    with pytest.raises(DataCorrupt, match=r"s\.seg block 0 \(byte 4096\): found checksum"):
        opened.verify()
    assert opened.checked == "corrupt"
    for ask in (lambda: looked_up(opened, [5]), lambda: list(opened.scan())):
        with pytest.raises(DataCorrupt, match="block 0"):
            ask()


def test_a_segment_in_memory_answers_as_the_mapped_one_and_does_not_need_the_file_any_more(tmp_path):
    keys = np.arange(5000, dtype=np.uint64)
    path = written(tmp_path / "s.seg", keys, np.arange(10000.0).reshape(5000, 2), partitions=3, default_row=[7, 8])
    opened = Segment(path)
    before = looked_up(opened, range(4990, 5010))
    opened.load()
    os.truncate(path, 0)  # a mapped page would be SIGBUS now
    after = looked_up(opened, range(4990, 5010))
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    opened.verify()
    assert sum(len(keys) for keys, _ in opened.scan()) == 5000


def test_verification_can_be_stopped_and_is_then_not_done(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", [5], [[1.0]]))
    with pytest.raises(KeyboardInterrupt):
        opened.verify(lambda n: (_ for _ in ()).throw(KeyboardInterrupt))
    assert opened.checked == "no"
    opened.verify()
    assert opened.checked == "yes"


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


@pytest.mark.parametrize("lie", [{"keys": 99}, {"partitions": 0}])
def test_a_header_that_lies_with_a_right_checksum_is_refused(tmp_path, lie):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    header = Segment(path).header._replace(**lie)
    path.write_bytes(header.encode() + path.read_bytes()[segment.PAGE :])
    with pytest.raises(DataCorrupt, match="expected the ranges of FORMAT"):
        Segment(path)


@pytest.mark.parametrize("lie", [{"dim": 0}, {"shard": 1}])
def test_facts_that_lie_with_a_right_checksum_are_refused(tmp_path, lie):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    header = Segment(path).header
    header = header._replace(about=header.about._replace(**lie))
    path.write_bytes(header.encode() + path.read_bytes()[segment.PAGE :])
    with pytest.raises(DataCorrupt, match="expected the ranges of FORMAT"):
        Segment(path)


def test_the_shard_rule_is_in_the_header_at_the_place_the_format_says(tmp_path):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    header, rows = Segment(path).header, path.read_bytes()[segment.PAGE :]
    assert header.about.shard_rule is ShardRule.MIX
    modulo = header._replace(about=header.about._replace(shard_rule=ShardRule.MODULO)).encode()
    changed = [at for at, (a, b) in enumerate(zip(header.encode(), modulo, strict=True)) if a != b]
    assert (changed[0], modulo[56:60]) == (56, b"\2\0\0\0")
    assert set(changed[1:]) <= set(range(4092, 4096))
    path.write_bytes(modulo + rows)
    opened = Segment(path)
    opened.verify()
    assert opened.about.shard_rule is ShardRule.MODULO


@pytest.mark.parametrize(("at", "what"), [(56, "shard rule 3"), (60, "index rule 3")])
def test_rules_that_this_build_does_not_know_are_refused(tmp_path, at, what):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    raw = bytearray(path.read_bytes())
    raw[at] = 3
    raw[4092:4096] = zlib.crc32(raw[:4092]).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(DataCorrupt, match=rf"s\.seg: found {what}"):
        Segment(path)


def test_facts_of_other_engines_say_the_rule_too_and_older_ones_mean_mix():
    about = About("t", Version(7), 1, 3, 2, RowFormat.F16, b"", ShardRule.MODULO)
    assert About.decode(about.encode(), "here") == about
    older = b'["t",[7,0],1,3,2,2,""]'
    assert About.decode(older, "here") == about._replace(shard_rule=ShardRule.MIX)
    with pytest.raises(DataCorrupt, match="here: found Invalid enum value 3"):
        About.decode(b'["t",[7,0],1,3,2,2,"",3]', "here")


@pytest.mark.parametrize("lie", [{"pilots_offset": 8192 * 9}, {"stride": 24}, {"places": 1 << 40}, {"buckets": 9999}])
def test_offsets_that_do_not_fit_are_refused(tmp_path, lie):
    path = written(tmp_path / "s.seg", [5], [[1.0]])
    header = Segment(path).header._replace(**lie)
    path.write_bytes(header.encode() + path.read_bytes()[segment.PAGE :])
    with pytest.raises(DataCorrupt, match="expected the layout of FORMAT"):
        Segment(path)


@pytest.mark.parametrize("at", [0, 8, 16, 20], ids=["places_start", "pilots_start", "places", "buckets"])
def test_partitions_that_lie_with_a_right_checksum_are_refused(tmp_path, at):
    path = written(tmp_path / "s.seg", [5, 6], [[1.0], [2.0]], partitions=2)
    header, raw = Segment(path).header, bytearray(path.read_bytes())
    raw[header.partitions_offset + 32 + at] += 1
    facts = bytes(raw[header.partitions_offset : header.partitions_offset + 64])
    path.write_bytes(header._replace(partitions_crc=zlib.crc32(facts)).encode() + raw[segment.PAGE :])
    with pytest.raises(DataCorrupt, match="expected the layout of FORMAT"):
        Segment(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataCorrupt, match=r"nowhere\.seg: found No such file"):
        Segment(tmp_path / "nowhere.seg")


def test_version_1_which_was_never_released_is_refused_with_the_way_out():
    with pytest.raises(
        DataCorrupt, match="format version 1, expected 2, which this build reads; build the table again"
    ):
        Segment(GOLDEN / "segment-v1.seg")


GOLDEN_FACTS = {"row_format": RowFormat.F16, "default_row": [0.5, -0.5], "partitions": 2}
GOLDEN_KEYS, GOLDEN_ROWS = [5, 6, 2**64 - 1], [[1.0, 2.0], [-3.0, 0.25], [0.0, 65504.0]]


def test_the_golden_file_of_version_2_reads_as_it_always_did():
    opened = Segment(GOLDEN / "segment-v2.seg")
    opened.verify()
    assert opened.about == About("t", Version(7), 0, 1, 2, RowFormat.F16, bytes.fromhex("003800b8"))
    got, found = looked_up(opened, [5, 7, 2**64 - 1])
    assert (got.tolist(), found.tolist()) == ([[1.0, 2.0], [0.5, -0.5], [0.0, 65504.0]], [True, False, True])


def test_this_build_still_writes_the_golden_file(tmp_path):
    path = written(tmp_path / "s.seg", GOLDEN_KEYS, GOLDEN_ROWS, **GOLDEN_FACTS)
    assert path.read_bytes() == (GOLDEN / "segment-v2.seg").read_bytes()


def test_the_example_in_format_md_is_the_golden_file():
    text = (GOLDEN.parent.parent / "cube" / "storage" / "FORMAT.md").read_text()
    raw = (GOLDEN / "segment-v2.seg").read_bytes()
    shown = [line for line in text.split("\n") if line.startswith("    0000")]
    assert len(shown) >= 10
    for line in shown:
        at, rest = int(line[4:12], 16), line[14:].split("   ")[0]
        assert raw[at : at + 16].hex() == rest.replace(" ", ""), line


def test_building_is_reproducible():
    keys = np.random.default_rng(3).integers(0, 2**64, 5000, dtype=np.uint64)
    one, two = (index.build(keys, np.zeros((5000, 4), np.uint8), 16) for _ in range(2))
    assert np.array_equal(one.block, two.block)
    assert np.array_equal(one.pilots, two.pilots)


def test_ten_million_keys_in_one_lookup(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", range(1000), np.arange(1000.0).reshape(-1, 1)))
    keys = np.arange(10_000_000, dtype=np.uint64) % np.uint64(2000)
    rows, found = looked_up(opened, keys)
    assert np.count_nonzero(found) == 5_000_000
    assert np.array_equal(rows[:, 0], np.where(found, keys, 0))


def test_buffers_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", [5], [[1.0]]))
    keys, rows, found = np.zeros(3, np.uint64), np.zeros((3, 1), np.float32), np.zeros(3, np.bool_)
    for wrong in (
        (keys, rows[:2], found),
        (keys, rows, found[:2]),
        (keys.view(np.int64), rows, found),
        (keys, np.zeros((3, 2), np.float32)[:, :1], found),
    ):
        with pytest.raises(ValueError, match="buffer"):
            opened.lookup(*wrong)


def test_a_partition_without_places_is_refused(tmp_path):
    path = written(tmp_path / "s.seg", [], np.empty((0, 1)))
    header, raw = Segment(path).header, bytearray(path.read_bytes())
    raw[header.partitions_offset + 16] = 0
    facts = bytes(raw[header.partitions_offset : header.partitions_offset + 32])
    lie = segment._laid_out(header._replace(places=0, partitions_crc=zlib.crc32(facts)), False)
    moved = raw[header.pilots_offset :]
    path.write_bytes((lie.encode() + moved).ljust(lie.file_bytes, b"\0")[: lie.file_bytes])
    with pytest.raises(DataCorrupt, match="expected the layout of FORMAT"):
        Segment(path)


def test_every_small_table_has_its_pilots():
    rng, rows = np.random.default_rng(0), np.zeros((300, 4), np.uint8)
    for count in [*range(1, 60), 99, 300]:
        for _ in range(120 if count < 60 else 20):
            keys = rng.integers(0, 2**64, count, dtype=np.uint64)
            assert index.build(keys, rows[:count], 16).keys == count


def test_buffers_of_another_width_are_refused(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", [5], [[1.0, 2.0]]))
    keys, found, offsets = np.zeros(1, np.uint64), np.zeros(1, np.bool_), np.array([0, 1])
    for ask in (
        lambda: opened.lookup(keys, np.zeros((1, 6), np.float32), found),
        lambda: opened.lookup(keys, np.zeros((1, 2), np.float64), found),
        lambda: opened.read(keys, np.zeros((1, 7), np.uint8), found),
        lambda: opened.pooled(keys, offsets, False, np.zeros((1, 3), np.float32), found),
        lambda: opened.pooled(keys, offsets, False, np.zeros((2, 2), np.float32), found),
    ):
        with pytest.raises(ValueError, match=r"a buffer: found .*, expected"):
            ask()


def test_keys_need_not_lie_side_by_side(tmp_path):
    opened = Segment(written(tmp_path / "s.seg", [5, 6], [[1.0], [2.0]]))
    keys, rows, found = np.array([5, 0, 6, 0], np.uint64)[::2], np.empty((2, 1), np.float32), np.empty(2, np.bool_)
    assert opened.lookup(keys, rows, found) == 0
    assert rows.tolist() == [[1], [2]]


def test_a_segment_is_brought_into_memory_while_it_is_looked_up(tmp_path):
    keys = np.arange(20_000, dtype=np.uint64)
    opened = Segment(written(tmp_path / "s.seg", keys, np.arange(20_000.0).reshape(-1, 1)))
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            rows, found = looked_up(opened, keys)
            if not found.all() or not np.array_equal(rows[:, 0], keys):
                wrong.append(rows)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        opened.load()
    stop.set()
    reader.join()
    assert not wrong


def test_a_partition_is_laid_out_again_when_a_multiplier_has_no_pilots_for_it(monkeypatch):
    tried = []

    def failing_twice(keys, places, *rest):
        tried.append(rest[3])
        return len(tried) > 2 and find(keys, places, *rest)

    find = index._find_pilots
    monkeypatch.setattr(index, "_find_pilots", failing_twice)
    built = index.build(np.arange(9, dtype=np.uint64), np.zeros((9, 8), np.uint8), 16)
    assert tried[0] != tried[1]
    assert built.pilots.size == 2 * 9


def test_a_writer_that_is_not_told_of_all_partitions_does_not_finish(tmp_path):
    writer = SegmentWriter(tmp_path / "s.seg", About("t", Version(1), 0, 1, 1, RowFormat.F32), 2)
    writer.add(writer.prepare(np.empty(0, np.uint64), np.empty((0, 4), np.uint8)))
    with pytest.raises(ValueError, match="1 partitions written, 2 announced"):
        writer.finish()
    writer.close()
    with pytest.raises(DataCorrupt, match="at the start"):
        Segment(tmp_path / "s.seg")
