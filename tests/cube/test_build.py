"""Rows → published segments: complete or not at all, the last of a repeated key wins."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from cube import build
from cube.client import LocalCube
from cube.errors import BadData
from cube.publish import publishing
from cube.version import Version


def rows_of(keys, dim=2):
    keys = np.array(keys, np.uint64)
    return build.Rows(keys, np.arange(keys.size * dim, dtype=np.float32).reshape(-1, dim))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_answer_does_not_depend_on_how_many_shards_there_are(tmp_path, shards):
    rows = rows_of(np.random.default_rng(1).integers(0, 2**64, 999, dtype=np.uint64))
    built = build.build(rows, tmp_path, "t", Version(1), shards)
    assert sum(built.keys_by_shard) == 999
    assert len(built.keys_by_shard) == shards
    got = LocalCube(tmp_path).rows("t", Version(1), np.concatenate([rows.keys, rows.keys + np.uint64(1)]))
    assert np.array_equal(got.rows[:999], rows.rows)
    assert not got.found[999:].any()


def test_the_last_row_of_a_repeated_key_wins_and_is_counted(tmp_path):
    built = build.build(rows_of([7, 8, 7, 9, 7]), tmp_path, "t", Version(1), 2)
    assert built.duplicates == 2
    assert LocalCube(tmp_path).rows("t", None, np.array([7, 8], np.uint64)).rows.tolist() == [[8, 9], [2, 3]]


def test_two_builders_of_one_version_do_not_touch_each_other_and_one_wins(tmp_path):
    place = tmp_path / "t" / "1@0"
    late = publishing(place)
    (late.__enter__() / "content").write_text("late")
    with publishing(place) as early:
        (early / "content").write_text("early")
    with pytest.raises(BadData, match="1@0: found an existing directory"):
        late.__exit__(None, None, None)
    assert (place / "content").read_text() == "early"
    assert [p.name for p in place.parent.iterdir()] == ["1@0"]


def test_no_rows_at_all_make_a_table_that_finds_nothing(tmp_path):
    build.build(rows_of([]), tmp_path, "t", Version(1), 2)
    assert not LocalCube(tmp_path).rows("t", None, np.array([0], np.uint64)).found.any()


def test_a_published_version_is_never_written_again(tmp_path):
    build.build(rows_of([1]), tmp_path, "t", Version(1), 1)
    with pytest.raises(BadData, match=r"t/1@0: found an existing directory"):
        build.build(rows_of([2]), tmp_path, "t", Version(1), 1)


@pytest.mark.parametrize("name", ["", ".t", "a/b", "x" * 129])
def test_a_table_name_that_is_no_directory_name_is_refused(tmp_path, name):
    with pytest.raises(BadData, match="table name"):
        build.build(rows_of([1]), tmp_path, name, Version(1), 1)


@pytest.mark.parametrize("shards", [0, -1, 65536])
def test_a_shard_count_out_of_range_is_refused(tmp_path, shards):
    with pytest.raises(BadData, match=f"shards: found {shards}, expected 1 to 65535"):
        build.build(rows_of([1]), tmp_path, "t", Version(1), shards)


@pytest.mark.parametrize(
    ("keys", "rows", "message"),
    [
        (np.zeros(2, np.int64), np.zeros((2, 1), np.float32), "keys.npy: found int64 with shape"),
        (np.zeros(2, np.uint64), np.zeros((2, 1)), "rows.npy: found float64"),
        (np.zeros(2, np.uint64), np.zeros(2, np.float32), "rows.npy: found float32 with shape"),
        (np.zeros(2, np.uint64), np.zeros((3, 1), np.float32), "2 keys and 3 rows"),
        (np.zeros(2, np.uint64), np.zeros((2, 0), np.float32), "rows of 0 elements"),
        (np.array([{}, {}]), np.zeros((2, 1), np.float32), "keys.npy"),
    ],
)
def test_arrays_that_are_not_rows_are_refused_by_name(tmp_path, keys, rows, message):
    np.save(tmp_path / "keys.npy", keys, allow_pickle=True)
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(BadData, match=message):
        build.read_rows(tmp_path)


def test_missing_and_garbled_array_files_are_refused_by_name(tmp_path):
    with pytest.raises(BadData, match=r"keys\.npy: found no such file"):
        build.read_rows(tmp_path)
    (tmp_path / "keys.npy").write_bytes(b"nonsense")
    with pytest.raises(BadData, match=r"keys\.npy"):
        build.read_rows(tmp_path)


class FailAt:
    """Replaces functions so that the n-th call of any of them fails, once; `fired` says whether it came to that."""

    def __init__(self, monkeypatch, n):
        self._left, self.fired = n, False
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "open")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real):
        def call(*args, **kwargs):
            self._left -= 1
            if self._left == -1:
                self.fired = True
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call


def test_readers_see_no_version_or_a_whole_one_wherever_a_build_fails(tmp_path):
    for n in itertools.count():
        data = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            files = FailAt(patch, n)
            try:
                build.build(rows_of([1, 2, 3]), data, "t", Version(1), 2)
            except OSError:
                assert files.fired
        visible = [p.name for p in (data / "t").glob("*")] if data.exists() else []
        if "1@0" in visible:
            assert LocalCube(data).rows("t", None, np.array([1, 2, 3], np.uint64)).found.all()
        else:
            assert all(name.startswith(".") for name in visible)
            build.build(rows_of([1, 2, 3]), data, "t", Version(1), 2)  # and the next try succeeds
        if not files.fired:
            break
    assert n > 5  # every call has now failed once


@pytest.mark.parametrize("can_exchange", [True, False], ids=["one step", "three steps"])
def test_replacing_leaves_the_old_or_the_new_wherever_it_fails(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("cube.publish._RENAME_EXCHANGE", 1 << 20)  # a flag no file system has
    for n in itertools.count():
        place = tmp_path / str(n) / "place"
        with publishing(place) as draft:
            (draft / "content").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            files = FailAt(patch, n)
            try:
                with publishing(place, replace=True) as draft:
                    (draft / "content").write_text("new")
            except OSError:
                assert files.fired
        assert (place / "content").read_text() in ("old", "new")
        if not files.fired:
            break
