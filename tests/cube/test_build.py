"""Rows → published stores: complete or not at all, the last of a repeated key wins, memory bounded, resumable."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from places import BIN, ROOT
from stores import Arrays, built

from cube import build, cli
from cube.client import LocalCube
from cube.errors import BadConfig, BadData
from cube.keys import ShardRule
from cube.publish import publishing
from cube.rows import RowFormat
from cube.sources import open_source
from cube.storage import segment
from cube.storage.engines import ENGINES, open_store
from cube.table import open_tables
from cube.version import Version


def rows_of(keys, dim=2):
    keys = np.array(keys, np.uint64)
    return keys, np.arange(keys.size * dim, dtype=np.float32).reshape(-1, dim)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_answer_does_not_depend_on_how_many_shards_there_are(tmp_path, shards):
    keys, rows = rows_of(np.random.default_rng(1).integers(0, 2**64, 999, dtype=np.uint64))
    done = built(tmp_path, "t", Version(1), keys, rows, shards)
    assert sum(done.keys_by_shard) == 999
    assert len(done.keys_by_shard) == shards
    got = LocalCube(tmp_path).rows("t", Version(1), np.concatenate([keys, keys + np.uint64(1)]))
    assert np.array_equal(got.rows[:999], rows)
    assert not got.found[999:].any()


def test_the_last_row_of_a_repeated_key_wins_and_is_counted(tmp_path):
    done = built(tmp_path, "t", Version(1), *rows_of([7, 8, 7, 9, 7]), shards=2)
    assert done.duplicates == 2
    assert LocalCube(tmp_path).rows("t", None, np.array([7, 8], np.uint64)).rows.tolist() == [[8, 9], [2, 3]]


@pytest.fixture
def in_small_steps(monkeypatch):
    """Runs of about 1,000 rows and bins of about 700, as if memory were that small."""
    sizes = {1: 1000, 2: 700}
    monkeypatch.setattr(build, "_rows_in_memory", lambda options, row_bytes, spare: sizes[spare])


@pytest.mark.parametrize("row_format", RowFormat)
@pytest.mark.parametrize("workers", [1, 3])
def test_many_runs_and_bins_are_as_one(tmp_path, in_small_steps, row_format, workers):
    rng = np.random.default_rng(2)
    keys, rows = rng.integers(0, 9000, 20_000).astype(np.uint64), rng.standard_normal((20_000, 3)).astype(np.float32)
    keys[::7] = 5  # a key in every run
    told = []
    options = build.Options(shards=2, row_format=row_format, workers=workers)
    done = build.build(Arrays(keys, rows), tmp_path, "t", Version(1), options, lambda *step: told.append(step))
    last = {int(key): i for i, key in enumerate(keys)}
    assert (sum(done.keys_by_shard), done.duplicates) == (len(last), 20_000 - len(last))
    for stage in ("reading", "building"):
        steps = [(rows, of) for told_of, rows, of in told if told_of == stage]
        assert len(steps) > 10
        assert sum(rows for rows, _ in steps) == steps[0][1] <= 20_000
    cube = LocalCube(tmp_path)
    asked = np.arange(9100, dtype=np.uint64)
    got = cube.rows("t", None, asked)
    assert got.found.tolist() == [int(key) in last for key in asked]
    truth = np.array([rows[last.get(int(key), 0)] for key in asked[got.found]])
    bound = {RowFormat.F32: 0, RowFormat.F16: 0.002, RowFormat.BF16: 0.02, RowFormat.I8: 0.02}[row_format]
    assert np.abs(got.rows[got.found] - truth).max() <= bound
    assert segment.Segment(tmp_path / "t" / "1@0" / "0-of-2.seg").header.partitions > 1


def test_rows_that_are_not_finite_are_kept_and_counted_or_refused(tmp_path):
    keys, rows = rows_of([1, 2, 3])
    rows[1, 0], rows[2, 1] = np.nan, np.inf
    assert built(tmp_path, "t", Version(1), keys, rows).not_finite == 2
    assert np.isnan(LocalCube(tmp_path).rows("t", None, keys).rows[1, 0])
    assert built(tmp_path, "t", Version(2), keys, rows, row_format=RowFormat.I8).not_finite == 2
    with pytest.raises(BadData, match=r"key 2: found \[nan, 3.0\], expected finite elements: --reject-nan"):
        built(tmp_path, "t", Version(3), keys, rows, reject_not_finite=True)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["1@0", "2@0"]


def test_a_number_that_the_row_format_cannot_hold_is_refused_with_its_key(tmp_path):
    keys, rows = rows_of([1, 2, 3])
    rows[1, 0] = 70_000
    with pytest.raises(BadData, match=r"key 2: found 70000\.0, expected a number within the range of f16"):
        built(tmp_path, "t", Version(1), keys, rows, row_format=RowFormat.F16)


def test_absent_keys_read_the_default_row(tmp_path):
    built(tmp_path, "t", Version(1), *rows_of([1, 2]), default_row=(0.5, -1.0), row_format=RowFormat.BF16)
    got = LocalCube(tmp_path).rows("t", None, np.array([1, 9], np.uint64))
    assert (got.rows.tolist(), got.found.tolist()) == ([[0, 1], [0.5, -1.0]], [True, False])
    with pytest.raises(BadData, match="default row: found 3 elements, expected 2"):
        built(tmp_path, "t", Version(2), *rows_of([1, 2]), default_row=(0.5, -1.0, 1))


def test_two_publishers_of_one_place_do_not_touch_each_other_and_one_wins(tmp_path):
    place = tmp_path / "t" / "1@0"
    late = publishing(place)
    (late.__enter__() / "content").write_text("late")
    with publishing(place) as early:
        (early / "content").write_text("early")
    with pytest.raises(BadData, match="1@0: found an existing directory"):
        late.__exit__(None, None, None)
    assert (place / "content").read_text() == "early"
    assert [p.name for p in place.parent.iterdir()] == ["1@0"]


def test_a_second_build_of_the_same_version_at_the_same_time_is_refused(tmp_path):
    class Nested(Arrays):
        def batches(self, start, most):
            with pytest.raises(BadData, match="found another build of it under way"):
                built(tmp_path, "t", Version(1), self.keys, self.rows)
            yield from super().batches(start, most)

    build.build(Nested(*rows_of([1])), tmp_path, "t", Version(1))
    assert LocalCube(tmp_path).rows("t", None, np.array([1], np.uint64)).found.all()


def test_no_rows_at_all_make_a_table_that_finds_nothing(tmp_path):
    built(tmp_path, "t", Version(1), *rows_of([]), shards=2)
    assert not LocalCube(tmp_path).rows("t", None, np.array([0], np.uint64)).found.any()


def test_a_published_version_is_never_written_again(tmp_path):
    built(tmp_path, "t", Version(1), *rows_of([1]))
    with pytest.raises(BadData, match=r"t/1@0: found an existing directory"):
        built(tmp_path, "t", Version(1), *rows_of([2]))
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["1@0"]


@pytest.mark.parametrize("name", ["", ".t", "a/b", "x" * 129])
def test_a_table_name_that_is_no_directory_name_is_refused(tmp_path, name):
    with pytest.raises(BadData, match="table name"):
        built(tmp_path, name, Version(1), *rows_of([1]))


@pytest.mark.parametrize("shards", [0, -1, 65536])
def test_a_shard_count_out_of_range_is_refused(tmp_path, shards):
    with pytest.raises(BadData, match=f"shards: found {shards}, expected 1 to 65535"):
        built(tmp_path, "t", Version(1), *rows_of([1]), shards=shards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 1 << 20}, "memory: found 1 MiB, expected at least 512 MiB"),
        ({"engine": "sqlite"}, "engine: found 'sqlite'"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, options, message):
    with pytest.raises(BadConfig, match=message):
        built(tmp_path, "t", Version(1), *rows_of([1]), **options)


def test_rows_without_elements_are_refused(tmp_path):
    with pytest.raises(BadData, match="rows of 0 elements"):
        built(tmp_path, "t", Version(1), np.empty(0), np.empty((0, 0)))


class FailAt:
    """Replaces functions so that the n-th call of any of them does something else; `fired` says if it came to that."""

    def __init__(self, monkeypatch, n, instead):
        self._left, self._instead, self.fired = n, instead, False
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "open"), (Path, "write_bytes")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real):
        def call(*args, **kwargs):
            self.count()
            result = real(*args, **kwargs)
            return _File(result, self) if real.__name__ == "open" else result

        return call

    def count(self):
        self._left -= 1
        if self._left == -1:
            self.fired = True
            self._instead()


class _File:
    """An open file whose writes count."""

    def __init__(self, file, failing):
        self._file, self._failing = file, failing

    def write(self, data):
        self._failing.count()
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def disk_full():
    raise OSError(28, "No space left on device")


def test_readers_see_no_version_or_a_whole_one_wherever_the_disk_is_full(tmp_path):
    for n in itertools.count():
        data = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            files = FailAt(patch, n, disk_full)
            try:
                built(data, "t", Version(1), *rows_of([1, 2, 3]), shards=2)
            except OSError:
                assert files.fired
        see_all_or_nothing(data)
        if not files.fired:
            break
    assert n > 30  # every call has now failed once


def test_readers_see_no_version_or_a_whole_one_wherever_a_build_is_killed(tmp_path, monkeypatch, in_small_steps):
    keys = np.arange(2500, dtype=np.uint64) % np.uint64(2000)
    for n in itertools.count():
        data = tmp_path / str(n)
        child = os.fork()
        if child == 0:  # dies in the middle, or says by its status that it came to an end
            FailAt(monkeypatch, n, lambda: os._exit(9))
            built(data, "t", Version(1), *rows_of(keys), shards=2, workers=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        see_all_or_nothing(data, keys)
        if status == 0:
            break
        shutil.rmtree(data)
    assert n > 60


def see_all_or_nothing(data, keys=(1, 2, 3)):
    """And in either case the same build, asked for again, ends well."""
    visible = [p.name for p in (data / "t").glob("*") if not p.name.startswith(".")] if data.exists() else []
    assert visible in ([], ["1@0"])
    if not visible:
        built(data, "t", Version(1), *rows_of(keys), shards=2, workers=1)
    found = LocalCube(data).rows("t", None, np.array(keys, np.uint64))
    assert found.found.all()
    last = {int(key): i for i, key in enumerate(keys)}
    assert found.rows[:, 0].tolist() == [2.0 * last[int(key)] for key in keys]


def test_a_build_goes_on_where_it_was_killed_and_is_the_same_as_if_it_had_not_been(tmp_path, in_small_steps):
    keys, rows = rows_of(np.random.default_rng(4).integers(0, 5000, 9000))
    built(tmp_path / "whole", "t", Version(1), keys, rows, shards=3)

    read_from = []

    class Dying(Arrays):
        def __init__(self, left):
            super().__init__(keys, rows)
            self._left = left

        def batches(self, start, most):
            read_from.append(start.at)
            for batch in super().batches(start, most):
                self._left -= 1
                if self._left < 0:
                    raise OSError(5, "Input/output error")
                yield batch

    for left in (3, 3):
        with pytest.raises(OSError, match="Input/output error"):
            build.build(Dying(left), tmp_path / "parts", "t", Version(1), build.Options(shards=3))
    done = build.build(Dying(99), tmp_path / "parts", "t", Version(1), build.Options(shards=3))
    assert read_from[0] == 0 < read_from[1] < read_from[2]
    assert done.duplicates == 9000 - np.unique(keys).size
    for shard in range(3):
        name = f"t/1@0/{shard}-of-3.seg"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_build_of_other_rows_or_options_does_not_go_on_from_what_is_there(tmp_path, in_small_steps):
    keys, rows = rows_of(range(3000))

    def dying(start, most):
        yield next(Arrays.batches(source, start, most))
        raise OSError(5, "Input/output error")

    source = Arrays(keys, rows)
    source.batches = dying
    with pytest.raises(OSError, match="Input/output"):
        build.build(source, tmp_path, "t", Version(1))
    with pytest.raises(
        BadConfig, match=r"1@0\.build: found what another build .*\(other row_format\), expected .* or --restart"
    ):
        built(tmp_path, "t", Version(1), keys, rows, row_format=RowFormat.I8)
    done = built(tmp_path, "t", Version(1), keys, rows, row_format=RowFormat.I8, restart=True)
    assert done.keys_by_shard == [3000]
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["1@0"]


def test_a_build_by_one_shard_rule_does_not_go_on_from_one_by_another(tmp_path, in_small_steps):
    keys, rows = rows_of(range(3000))

    class Dying(Arrays):
        def batches(self, start, most):
            yield next(super().batches(start, most))
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        build.build(Dying(keys, rows), tmp_path, "t", Version(1), build.Options(shards=3))
    with pytest.raises(BadConfig, match=r"1@0\.build: found what another build .*\(other shard_rule\)"):
        built(tmp_path, "t", Version(1), keys, rows, shards=3, shard_rule=ShardRule.MODULO)
    done = built(tmp_path, "t", Version(1), keys, rows, shards=3, shard_rule=ShardRule.MODULO, restart=True)
    assert done.keys_by_shard == [1000, 1000, 1000]


@pytest.mark.parametrize("engine", ["segment", "lmdb", "rocksdb"])
def test_a_shard_by_modulo_holds_exactly_the_keys_with_that_remainder(tmp_path, in_small_steps, engine):
    keys, rows = rows_of(np.random.default_rng(5).integers(0, 2**64, 5000, dtype=np.uint64))
    built(tmp_path, "t", Version(1), keys, rows, shards=3, engine=engine, shard_rule=ShardRule.MODULO)
    for shard in range(3):
        store = open_store(tmp_path / "t" / "1@0" / f"{shard}-of-3{ENGINES[engine].suffix}")
        there = np.concatenate([keys for keys, _ in store.scan()])
        assert sorted(there.tolist()) == sorted(key for key in keys.tolist() if key % 3 == shard)
        assert store.about.shard_rule is ShardRule.MODULO
        if store.capabilities.verify:
            store.verify()
        store.close()
    got = LocalCube(tmp_path).rows("t", None, np.concatenate([keys, keys + np.uint64(1)]))
    assert np.array_equal(got.rows[:5000], rows)
    assert got.found[:5000].all()
    assert not got.found[5000:].any()


def test_files_of_another_shard_rule_than_the_configuration_says_are_not_served(tmp_path):
    keys, rows = rows_of(range(100))
    for rule in ShardRule:
        data = tmp_path / rule.text
        built(data, "t", Version(1), keys, rows, shards=2, shard_rule=rule)
        (other,) = set(ShardRule) - {rule}
        assert open_tables(data, 1, 2, rule=rule).keys() == open_tables(data, 1, 2).keys() == {"t"}
        message = rf"1-of-2\.seg: found shard rule {rule.text}, expected {other.text}, as .* shard_rule of the config"
        with pytest.raises(BadConfig, match=message):
            open_tables(data, 1, 2, rule=other)


@pytest.mark.parametrize(("table", "version"), [("u", Version(1)), ("t", Version(2))])
def test_two_shard_rules_under_one_directory_are_not_served(tmp_path, table, version):
    keys, rows = rows_of(range(100))
    built(tmp_path, "t", Version(1), keys, rows, shards=2)
    built(tmp_path, table, version, keys, rows, shards=2, shard_rule=ShardRule.MODULO)
    for rule in (None, *ShardRule):
        with pytest.raises(
            BadConfig, match=r"0-of-2\.seg: found shard rule (mix|modulo), expected (mix|modulo), as in"
        ):
            open_tables(tmp_path, 0, 2, rule=rule)


def test_the_command_builds_by_the_rule_it_is_told(tmp_path, capsys):
    keys, rows = rows_of(range(90))
    np.save(tmp_path / "keys.npy", keys)
    np.save(tmp_path / "rows.npy", rows)
    command = [str(tmp_path), "--table", "t", "--out", str(tmp_path / "data"), "--shards", "3", "--workers", "1"]
    assert cli.build([*command, "--version", "1@0", "--shard-rule", "modulo"]) == 0
    assert "30, 30, 30 rows by shard" in capsys.readouterr().out
    assert cli.build([*command, "--version", "2@0"]) == 0
    rules = {v: open_store(tmp_path / "data" / "t" / v / "0-of-3.seg").about.shard_rule for v in ("1@0", "2@0")}
    assert rules == {"1@0": ShardRule.MODULO, "2@0": ShardRule.MIX}


def test_after_a_crash_of_the_machine_a_build_begins_anew(tmp_path, in_small_steps, monkeypatch):
    work = tmp_path / "t" / ".1@0.build"
    work.mkdir(parents=True)
    (work / "run-000000").write_bytes(b"what was not forced to disk")
    (work / "plan.json").write_bytes(b"")
    assert built(tmp_path, "t", Version(1), *rows_of([1])).keys_by_shard == [1]


def test_a_kill_between_publishing_and_clearing_up_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    def killed(work):
        (work / "plan.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_clear", killed)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, "t", Version(1), *rows_of([1, 2, 3]))
    shutil.rmtree(tmp_path / "t" / "1@0")
    assert built(tmp_path, "t", Version(1), *rows_of([1, 2, 3])).keys_by_shard == [3]
    assert LocalCube(tmp_path).rows("t", None, np.array([1, 2, 3], np.uint64)).found.all()


def test_a_finished_shard_whose_file_is_gone_is_built_again(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(build, "publish", failing)
        with pytest.raises(OSError, match="Input/output"):
            built(tmp_path, "t", Version(1), *rows_of([1, 2, 3]), shards=2)
    (tmp_path / "t" / ".1@0.build" / "out" / "0-of-2.seg").unlink()
    built(tmp_path, "t", Version(1), *rows_of([1, 2, 3]), shards=2)
    assert LocalCube(tmp_path).rows("t", None, np.array([1, 2, 3], np.uint64)).found.all()


def test_what_was_read_outlives_a_source_that_fails(tmp_path, in_small_steps):
    keys, rows = rows_of(range(5000))
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows" / "keys.npy", keys)
    np.save(tmp_path / "rows" / "rows.npy", rows)
    source = open_source([str(tmp_path / "rows")])
    whole, batches = source.batches, []

    def failing(start, most):
        batches.append(start.at)
        for batch in whole(start, most):
            if batch.cursor.at > 3500 and len(batches) == 1:
                raise BadData("rows.npy", "connection reset", "more rows")
            yield batch

    source.batches = failing
    with pytest.raises(BadData, match="connection reset"):
        build.build(source, tmp_path, "t", Version(1))
    assert build.build(source, tmp_path, "t", Version(1)).keys_by_shard == [5000]
    assert batches[0] == 0 < batches[1]


def test_a_build_goes_on_with_other_memory_and_workers_but_not_with_other_columns(
    tmp_path, in_small_steps, monkeypatch
):
    keys, rows = rows_of(range(3000))

    class Dying(Arrays):
        def batches(self, start, most):
            yield next(super().batches(start, most))
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        build.build(Dying(keys, rows), tmp_path, "t", Version(1), build.Options(workers=1))
    other = Arrays(keys, rows)
    other.read_as = "other, columns"
    with pytest.raises(BadConfig, match=r"\(other read_as\)"):
        build.build(other, tmp_path, "t", Version(1))
    monkeypatch.setattr(build, "_rows_in_memory", lambda options, row_bytes, spare: 5000)
    assert built(tmp_path, "t", Version(1), keys, rows, workers=3).keys_by_shard == [3000]
    header = segment.Segment(tmp_path / "t" / "1@0" / "0-of-1.seg").header
    assert header.partitions == 5  # as the first build had planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_format": RowFormat.F16, "default_row": (70000.0, 0.0)}, "found 70000.0, expected a number within"),
        ({"engine": "redis"}, "url: found none, expected one of the server"),
        ({"url": "redis://user:secret@host"}, "url: found one, expected none: segment has no server"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(tmp_path, options, message):
    class Unread(Arrays):
        def batches(self, start, most):
            raise AssertionError("read")

    with pytest.raises((BadData, BadConfig), match=message) as raised:
        build.build(Unread(*rows_of([1])), tmp_path, "t", Version(1), build.Options(**options))
    assert "secret" not in str(raised.value)


def test_ctrl_c_stops_a_build_and_the_next_one_goes_on(tmp_path):
    np.save(tmp_path / "keys.npy", np.arange(3_000_000, dtype=np.uint64))
    np.save(tmp_path / "rows.npy", np.zeros((3_000_000, 8), np.float32))
    line = [str(BIN / "cube-build"), str(tmp_path), "--table", "t", "--version", "1", "--out", str(tmp_path / "cube")]
    child = subprocess.Popen([*line, "--memory", "512M"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "cube" / "t" / ".1@0.build"
    while not (work / "run-000001").exists():
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(2)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.strip().split("\n")[-1]) == (130, "cube-build: interrupted")
    done = subprocess.run([*line, "--memory", "512M"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "3,000,000 rows by shard" in done.stdout, done.stderr


def test_memory_stays_within_what_a_build_is_given(tmp_path):
    """3 M rows of 256 bytes, 816 MB to read, in a process that may take 512 MiB."""
    np.save(tmp_path / "keys.npy", np.random.default_rng(0).permutation(3_000_000).astype(np.uint64))
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (3_000_000, 64))
    rows[::1000] = 1
    del rows
    code = (
        "import sys, cube.cli; code = cube.cli.build(sys.argv[1:])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) // 1024); sys.exit(code)"
    )
    line = [sys.executable, "-c", code, str(tmp_path), "--table", "t", "--version", "1", "--memory", "512M"]
    done = subprocess.run(
        [*line, "--out", str(tmp_path / "cube")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert 100 < int(done.stdout.split()[-1]) < 512


@pytest.mark.parametrize("can_exchange", [True, False], ids=["one step", "three steps"])
def test_replacing_leaves_the_old_or_the_new_wherever_it_fails(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("cube.publish._RENAME_EXCHANGE", 1 << 20)  # a flag no file system has
    for n in itertools.count():
        place = tmp_path / str(n) / "place"
        with publishing(place) as draft:
            (draft / "content").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            files = FailAt(patch, n, disk_full)
            try:
                with publishing(place, replace=True) as draft:
                    (draft / "content").write_text("new")
            except OSError:
                assert files.fired
        assert (place / "content").read_text() in ("old", "new")
        if not files.fired:
            break
