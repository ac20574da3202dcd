"""Every format gives the rows that were written, from any cursor; whatever is not as it should be is BadData."""

import builtins
import contextlib
import io
import itertools
import json
import os
import struct
import sys
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cube import sources
from cube.errors import BadConfig, BadData
from cube.sources import Cursor, open_source

BEGIN = Cursor(0, 0)
SYNC = bytes(range(16))


def table(n, dim, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 2**64, n, dtype=np.uint64), random.standard_normal((n, dim)).astype(np.float32)


# Writers: a table as the bytes of files


def npy(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def npy_pair(keys, rows):
    return {"t/keys.npy": npy(keys), "t/rows.npy": npy(rows)}


def arrow_table(keys, lists, name="row"):
    return pa.table({"text": pa.array(["x"] * len(keys)), name: lists, "key": pa.array(keys)})


def fixed(rows):
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def lists(rows, kind=pa.ListArray):
    offsets = np.arange(len(rows) + 1) * rows.shape[1]
    return kind.from_arrays(pa.array(offsets, pa.int32() if kind is pa.ListArray else pa.int64()), rows.ravel())


def columns(keys, rows):
    return pa.table({"key": keys, "n": pa.array(keys), **{f"e{j}": rows[:, j].copy() for j in range(rows.shape[1])}})


def parquet(content, **options):
    out = io.BytesIO()
    pq.write_table(content, out, row_group_size=3, **options)
    return out.getvalue()


def ipc(content, new, **options):
    out = io.BytesIO()
    with new(out, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=3)
    return out.getvalue()


def tensors(**arrays):
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def sequence(records, hadoop=False, every=2):
    """records: (key, value as bytes). Written by hand after the format's description; a sync mark `every` records."""
    name = b'"org.apache.hadoop.io.BytesWritable'
    out = [b"SEQ\x06", name, name, b"\0", b"\0", b"\0\0\0\0", SYNC]
    for i, (key, value) in enumerate(records):
        if every and i % every == every - 1:
            out += [b"\xff\xff\xff\xff", SYNC]
        key = int(key).to_bytes(8, "little")
        if hadoop:
            key, value = b"\0\0\0\x08" + key, struct.pack(">I", len(value)) + value
        out += [struct.pack(">II", len(key) + len(value), len(key)), key, value]
    return b"".join(out)


def records(keys, rows):
    return [(key, row.astype("<f4").tobytes()) for key, row in zip(keys, rows, strict=True)]


FORMATS = {
    "npy": npy_pair,
    "parquet": lambda k, r: {"t.parquet": parquet(arrow_table(k, fixed(r)))},
    "parquet-lists": lambda k, r: {"t.parquet": parquet(arrow_table(k, lists(r)), compression="zstd")},
    "parquet-columns": lambda k, r: {"t.parquet": parquet(columns(k, r))},
    "arrow": lambda k, r: {"t.arrow": ipc(arrow_table(k, fixed(r)), pa.ipc.new_file)},
    "arrow-lists": lambda k, r: {"t.feather": ipc(arrow_table(k, lists(r)), pa.ipc.new_file, compression="lz4")},
    "arrow-stream": lambda k, r: {"t.arrows": ipc(arrow_table(k, lists(r, pa.LargeListArray)), pa.ipc.new_stream)},
    "safetensors": lambda k, r: {"t.safetensors": tensors(rows=r, keys=k)},
    "sequence": lambda k, r: {"part-0": sequence(records(k, r))},
    "sequence-hadoop": lambda k, r: {"part-0": sequence(records(k, r), hadoop=True, every=1)},
}
SINGLE = [name for name in FORMATS if name != "npy"]
every_format = pytest.mark.parametrize("form", FORMATS)


def remember(files, root="memory://rows"):
    """Put files into fsspec's file system in memory, alone."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    for name, content in files.items():
        memory.pipe_file(f"{root}/{name}", content)
    return root


def save(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def read(source, start=BEGIN, most=1000):
    batches = list(source.batches(start, most))
    assert all(0 < len(b.keys) == len(b.rows) <= most for b in batches)
    assert all(b.rows.flags.c_contiguous and b.rows.flags.writeable and b.keys.flags.writeable for b in batches)
    keys = np.concatenate([np.empty(0, np.uint64), *(b.keys for b in batches)])
    rows = np.concatenate([np.empty((0, source.dim), np.float32), *(b.rows for b in batches)])
    assert (keys.dtype, rows.dtype) == (np.uint64, np.float32)
    return keys, rows, [b.cursor for b in batches]


def same(found, keys, rows):
    none = not len(found[0]) == len(keys) > 0  # then the width may not be known
    return np.array_equal(found[0], keys) and (none or np.array_equal(found[1], rows))


def counted(batches):
    """Batches with the number of rows up to the end of each. A file in memory has one position: first read them all."""
    batches = list(batches)
    return zip(batches, itertools.accumulate(len(b.keys) for b in batches), strict=True)


def read_all(*paths, most=1000, **options):
    return read(open_source(paths, **options), most=most)


# What is read is what was written


@every_format
@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 25), st.sampled_from([64, 100, 1 << 20]))
@settings(max_examples=25)
def test_rows_come_back_whole_and_from_every_cursor(form, n, dim, most, chunk):
    keys, rows = table(n, dim, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_READ", chunk)
        source = open_source([remember(FORMATS[form](keys, rows))])
        assert (source.dim, source.most_rows >= n) == (dim, True) if n else source.dim in (0, dim)
        assert same(read(source, most=most), keys, rows)
        for batch, passed in counted(source.batches(BEGIN, most)):
            assert same(read(source, batch.cursor, most + 1), keys[passed:], rows[passed:])


@every_format
def test_local_files_and_urls_of_them_are_read(form, tmp_path):
    keys, rows = table(100, 3)
    path = save(tmp_path, FORMATS[form](keys, rows))
    assert same(read_all(path, most=7), keys, rows)
    assert same(read_all(f"file://{path}", most=7), keys, rows)


@pytest.mark.parametrize("form", ["npy", "parquet", "arrow", "safetensors"])
def test_formats_that_say_how_many_rows_there_are_are_believed_exactly(form):
    assert open_source([remember(FORMATS[form](*table(10, 2)))]).most_rows == 10


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "write",
    [
        npy_pair,
        lambda k, r: {"t": parquet(arrow_table(k, fixed(r)))},
        lambda k, r: {"t": parquet(columns(k, r))},
        lambda k, r: {"t": ipc(arrow_table(k, lists(r)), pa.ipc.new_stream)},
        lambda k, r: {"t": tensors(key=k, row=r)},
    ],
    ids=["npy", "parquet", "columns", "arrow", "safetensors"],
)
def test_signed_keys_are_the_same_bits_and_elements_become_float32(write, kind):
    keys, rows = table(9, 3)
    rows = rows.astype(kind)
    rows[0, 0], rows[1, 1] = np.inf, -np.inf  # no overflow: they are what they were
    found = read_all(remember(write(keys.view(np.int64), rows)))
    assert same(found, keys, rows.astype(np.float32))


def test_bfloat16_tensors_are_the_upper_halves_of_floats():
    header = {
        "rows": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "keys": {"dtype": "U64", "shape": [2], "data_offsets": [8, 24]},
    }
    content = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], "<u2").tobytes() + np.array([5, 6], "<u8").tobytes()
    keys, rows, _ = read_all(remember({"t.safetensors": with_header(header, content)}))
    assert keys.tolist() == [5, 6]
    assert rows.tolist() == [[1, -2], [np.inf, 2.0**-133]]


def test_a_matrix_without_keys_is_keyed_by_row_number():
    rows = table(5, 2)[1]
    for files in ({"emb.weight": rows, "bias": rows[:, 0]}, {"rows": rows, "other": rows}):
        found = read_all(remember({"m.safetensors": tensors(**files)}), most=2)
        assert same(found, np.arange(5), rows)
    found = read_all(remember({"m.safetensors": tensors(a=rows, b=rows + 1)}), row_column="b")
    assert same(found, np.arange(5), rows + 1)


def test_columns_and_tensors_of_other_names_are_found_by_them():
    keys, rows = table(5, 2)
    content = arrow_table(keys, fixed(rows), "vector").rename_columns(["text", "vector", "id"])
    decoy = content.append_column("row", pa.array(np.zeros(5)))
    files = {"1.parquet": parquet(decoy), "2.arrow": ipc(decoy, pa.ipc.new_file)}
    files["3.safetensors"] = tensors(ids=keys, vector=rows, rows=rows + 1)
    found = read_all(remember(files), key_column="id", row_column="vector")
    assert same(found, np.tile(keys, 3), np.tile(rows, (3, 1)))


def test_a_sequence_file_is_read_byte_by_byte_as_its_format_says():
    name = "22 6f72672e6170616368652e6861646f6f702e696f2e42797465735772697461626c65"
    head = f"53455106 {name} {name} 00 00 00000000 000102030405060708090a0b0c0d0e0f"
    sync = "ffffffff 000102030405060708090a0b0c0d0e0f"
    paddle = f"{head} 00000010 00000008 0100000000000080 0000803f 00000040 {sync} 00000010 00000008 07{'0' * 14}"
    hadoop = f"{head} {sync} 00000014 0000000c 00000008 0100000000000080 00000004 0000803f {sync}{sync}"
    root = remember({"p": bytes.fromhex(paddle + "0000c0ff 000080bf"), "h": bytes.fromhex(hadoop)})
    keys, rows, cursors = read_all(f"{root}/p")
    assert keys.tolist() == [2**63 + 1, 7]
    assert rows.view(np.uint32).tolist() == [[0x3F800000, 0x40000000], [0xFFC00000, 0xBF800000]]
    assert cursors == [Cursor(0, 96 + 24 + 20 + 24)]
    keys, rows, cursors = read_all(f"{root}/h")
    assert (keys.tolist(), rows.tolist(), cursors) == ([2**63 + 1], [[1]], [Cursor(0, 96 + 20 + 28 + 40)])


# Which files, in which order


def test_files_are_read_in_the_order_given_and_by_the_numbers_in_their_names():
    parts = {n: table(4, 2, n) for n in (1, 2, 10)}
    files = {f"b/part-{n}": sequence(records(*t)) for n, t in parts.items()} | {
        "b/_SUCCESS": b"",
        "b/.part-1.crc": b"c",
    }
    last = table(3, 2, 99)
    root = remember({**files, **{f"a/{name}": data for name, data in npy_pair(*last).items()}})
    order = [*parts.values(), last]
    expected = [np.concatenate([t[i] for t in order]) for i in (0, 1)]
    for paths in ([f"{root}/b", f"{root}/a"], [f"{root}/b/*", f"{root}/a/t"], [f"{root}/b/part*", f"{root}/*/t/*.npy"]):
        source = open_source(paths)
        assert same(read(source, most=3), *expected)
        assert [f.url.rpartition("/")[2] for f in source.files] == ["part-1", "part-2", "part-10", "t"]
    assert [f.size for f in source.files] == [*(len(files[f"b/part-{n}"]) for n in parts), 3 * 8 + 3 * 8 + 2 * 128]
    assert all(f.version for f in source.files)
    for batch, passed in counted(source.batches(BEGIN, 3)):  # cursors reach into the next files
        assert same(read(source, batch.cursor), expected[0][passed:], expected[1][passed:])


def test_all_formats_at_once_make_one_source():
    tables = {name: table(5, 2, i) for i, name in enumerate(FORMATS)}
    written = {f"{i:02}/{f}": data for i, n in enumerate(FORMATS) for f, data in FORMATS[n](*tables[n]).items()}
    found = read_all(remember(written), most=2)
    assert same(found, *(np.concatenate([t[i] for t in tables.values()]) for i in (0, 1)))


def test_links_are_followed_and_names_with_brackets_are_names(tmp_path):
    keys, rows = table(3, 2)
    save(tmp_path, {"there/x[1].parquet": parquet(columns(keys, rows)), "linked/y": b""})
    (tmp_path / "linked" / "y").unlink()
    (tmp_path / "linked" / "y").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "linked" / "z").symlink_to(tmp_path / "there" / "x[1].parquet")
    assert same(read_all(f"{tmp_path}/there/x[1].parquet"), keys, rows)
    assert same(read_all(f"{tmp_path}/linked"), np.tile(keys, 2), np.tile(rows, (2, 1)))


def test_a_changed_file_has_another_version(tmp_path):
    path = save(tmp_path, FORMATS["sequence"](*table(3, 2)))
    before = open_source([path]).files
    assert open_source([path]).files == before
    os.utime(tmp_path / "part-0", (1, 1))
    assert open_source([path]).files != before


@every_format
def test_no_rows_at_all_are_rows(form):
    source = open_source([remember(FORMATS[form](*table(0, 3)))])
    says = form not in ("parquet-lists", "arrow-lists", "arrow-stream", "sequence", "sequence-hadoop")
    assert (source.dim, source.most_rows) == (3 if says else 0, 0)
    assert list(source.batches(BEGIN, 1)) == []


def test_the_width_is_that_of_the_first_file_that_has_one():
    root = remember(
        {"a": sequence([]), "b": sequence(records(KEYS, ROWS)), "c": sequence([]) + b"\xff\xff\xff\xff" + SYNC}
    )
    source = open_source([root])
    assert source.dim == 2
    assert same(read(source), KEYS, ROWS)


# What is refused


def with_header(header, content=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


KEYS, ROWS = table(4, 2)
PAIR = npy_pair(KEYS, ROWS)
WIDE = np.array([[0.0, 1.0], [0.0, 1e39], [0.0, 0.0], [0.0, 0.0]])
RECORDS = records(KEYS, ROWS)
SEQ = sequence(RECORDS, every=0)
HADOOP = sequence(RECORDS, hadoop=True, every=0)


def changed(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def keyed(**columns):
    return pa.table({"key": KEYS, **columns})


def fortran():
    return npy(np.asfortranarray(ROWS))


BAD_NPY = {
    "keys of floats": (
        {"keys": npy(np.zeros(4))},
        r"t/keys\.npy: found float64 with shape \(4,\), expected a .npy arr",
    ),
    "keys of two dimensions": ({"keys": npy(KEYS[:, None])}, r"keys\.npy: found uint64 with shape \(4, 1\)"),
    "rows of one dimension": ({"rows": npy(ROWS[:, 0])}, r"rows\.npy: found float32 with shape \(4,\)"),
    "rows of integers": ({"rows": npy(ROWS.astype(int))}, r"rows\.npy: found int64 with shape"),
    "big-endian rows": ({"rows": npy(ROWS.astype(">f4"))}, r"rows\.npy: found >f4 with shape"),
    "more rows than keys": ({"rows": npy(np.vstack([ROWS, ROWS]))}, r"t: found 4 keys and 8 rows"),
    "rows of nothing": ({"rows": npy(ROWS[:, :0])}, r"rows\.npy: found rows of 0 elements"),
    "objects": ({"keys": npy(np.array([{}] * 4), allow_pickle=True)}, r"keys\.npy: found object with shape \(4,\)"),
    "Fortran order": ({"rows": fortran()}, r"rows\.npy: found columns stored one after the other \(Fortran order\)"),
    "an overflow": (
        {"rows": npy(WIDE)},
        r"rows\.npy row 1: found 1e\+39, expected numbers within the range of float32",
    ),
    "cut off": (
        {"rows": PAIR["t/rows.npy"][:-1]},
        r"rows\.npy: found 31 bytes behind the header, expected 32, for floa",
    ),
    "too long": ({"keys": PAIR["t/keys.npy"] + b"x"}, r"keys\.npy: found 33 bytes behind the header, expected 32"),
    "nonsense": ({"keys": b"nonsense"}, r"keys\.npy: found .*magic"),
    "a version to come": ({"keys": changed(PAIR["t/keys.npy"], 6, b"\x03")}, r"keys\.npy: found \.npy version 3\.0"),
    "a header of code": ({"keys": changed(PAIR["t/keys.npy"], 10, b"{f(x):")}, r"keys\.npy: found "),
    "a negative length": (
        {"keys": PAIR["t/keys.npy"].replace(b"(4,), }", b"(-4,),}")},
        r"keys\.npy: found uint64 with shape \(-4,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_bad_npy_pairs_are_refused_by_name(case):
    files, message = BAD_NPY[case]
    root = remember({**PAIR, **{f"t/{name}.npy": content for name, content in files.items()}})
    with pytest.raises(BadData, match=message):
        read_all(root)


@pytest.mark.parametrize("missing", ["keys", "rows"])
def test_half_a_pair_is_refused_by_the_name_of_the_other_half(missing, tmp_path):
    root = save(tmp_path, {name: data for name, data in PAIR.items() if missing not in name})
    with pytest.raises(BadData, match=rf"t/{missing}\.npy: found no such file"):
        open_source([root])


NULL_KEYS = pa.array([1, 2, None, 4], pa.uint64())
NULL_ROWS = pa.array([[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]], pa.list_(pa.float32()))
NULL_IN_ROWS = pa.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, None]], pa.list_(pa.float32(), 2))
RAGGED = pa.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0]], pa.list_(pa.float32()))

BAD_COLUMNS = {
    "no key": (pa.table({"row": fixed(ROWS), "id": KEYS}), "found columns row, id, expected a key column 'key'"),
    "no columns": (pa.table({}), "found columns none, expected a key column 'key'"),
    "text keys": (pa.table({"key": ["a"], "e": [1.0]}), "column 'key': found string, expected uint64 or int64"),
    "no rows": (keyed(n=KEYS), "found columns key, n, expected a column 'row' of float lists, or columns of floats"),
    "scalar rows": (keyed(row=ROWS[:, 0].copy()), r"column 'row': found float, expected lists of float16"),
    "integer rows": (
        keyed(row=fixed(ROWS.astype(int))),
        "column 'row': found fixed_size_list.*expected lists of float",
    ),
    "null keys": (pa.table({"key": NULL_KEYS, "row": fixed(ROWS)}), "row 2: found null, expected uint64"),
    "null rows": (keyed(row=NULL_ROWS), "row 1: found null, expected a row of 2 elements"),
    "null in rows": (keyed(row=NULL_IN_ROWS), "row 3: found null, expected a float"),
    "null in columns": (keyed(a=pa.array([1.0, None, 1.0, 1.0])), "row 1: found null, expected a float"),
    "null first": (keyed(row=NULL_ROWS.take([1, 0, 0, 0])), "row 0: found null, expected at least 1"),
    "empty first": (keyed(row=pa.array([[]] * 4, pa.list_(pa.float32()))), "row 0: found a row of 0 elements"),
    "ragged": (keyed(row=RAGGED), "row 3: found a row of 1 elements, expected 2, as in the first row"),
    "overflow": (keyed(row=fixed(WIDE)), r"row 1: found 1e\+39, expected numbers within the range"),
    "overflow of a column": (keyed(a=WIDE[:, 0].copy(), b=WIDE[:, 1].copy()), r"row 1: found 1e\+39"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
def test_bad_columns_are_refused_by_name_and_row(case, suffix):
    content, message = BAD_COLUMNS[case]
    new = {"arrow": pa.ipc.new_file, "arrows": pa.ipc.new_stream}
    root = remember({f"t.{suffix}": parquet(content) if suffix == "parquet" else ipc(content, new[suffix])})
    for most in (1, 3, 1000):
        with pytest.raises(BadData, match=rf"memory://.*/rows/t\.{suffix}.*{message}"):
            read_all(root, most=most)


def test_columns_of_one_name_are_refused():
    twice = pa.table([KEYS, KEYS, fixed(ROWS)], names=["key", "key", "row"])
    with pytest.raises(BadData, match=r"column 'key': found 2 of this name, expected one"):
        open_source([remember({"t": ipc(twice, pa.ipc.new_file)})])


GOOD = tensors(keys=KEYS, rows=ROWS)
BAD_TENSORS = {
    "short": (b'\x05\0\0\0\0\0\0\0{"', r"found 5 bytes of header, expected a header within the file's 10 bytes"),
    "shorter": (b"\x05", r"found 1 bytes, expected a header"),
    "a giant header": ((10**8 + 1).to_bytes(8, "little") + bytes(9), "found 100000001 bytes of header"),
    "no JSON": (with_header(b"{nonsense}"), "header: found JSON is malformed"),
    "no text": (with_header(b'{"\xff":1}'), "header: found"),
    "deep JSON": (with_header(b'{"a":' + b"[" * 99999), "header: found"),
    "an array": (with_header(b"[]"), "header: found Expected `object`, got `array`"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), r"header: found Expected `str`, got `int`"),
    "an unknown field": (with_header({"a": {"x": 1}}), "header: found Object contains unknown field `x`"),
    "a negative size": (
        with_header({"a": tensor("F32", [-1, 1], 0, 4)}, bytes(4)),
        "header: found Expected `int` >= 0",
    ),
    "a gap": (with_header({"a": tensor("F32", [1, 1], 4, 8)}, bytes(8)), r"tensor 'a': found data_offsets \[4, 8\]"),
    "backwards": (with_header({"a": tensor("F32", [1, 1], 0, 4), "b": tensor("F32", [1, 1], 4, 0)}, bytes(4)), "'b'"),
    "too few bytes": (GOOD[:-1], r"found 63 bytes behind the header, expected 64, as the header says"),
    "too many bytes": (GOOD + b"x", r"found 65 bytes behind the header, expected 64"),
    "another size": (
        with_header({"rows": tensor("F32", [2, 2], 0, 12)}, bytes(12)),
        r"'rows': found F32 .* in 12 bytes",
    ),
    "rows of integers": (tensors(rows=KEYS[:, None]), r"tensor 'rows': found U64 of shape \[4, 1\], expected F32, F16"),
    "rows of one dimension": (
        tensors(rows=ROWS[0]),
        r"tensor 'rows': found F32 of shape \[2\], expected .*2-dimensional",
    ),
    "keys of floats": (tensors(keys=ROWS[:, 0], rows=ROWS), "tensor 'keys': found F32 of shape"),
    "more keys": (tensors(keys=KEYS[:3], rows=ROWS), "found 3 keys and 4 rows"),
    "no rows": (tensors(keys=KEYS, weight=ROWS), "found tensors keys, weight, expected one named 'rows' or 'row'"),
    "two matrices": (tensors(a=ROWS, b=ROWS), "found tensors a, b, expected one named"),
    "no tensors": (with_header({}), "found tensors none"),
    "rows of nothing": (tensors(rows=ROWS[:, :0]), "found rows of 0 elements"),
    "an overflow": (tensors(rows=WIDE), r"row 1: found 1e\+39"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_safetensors_are_refused_by_name(case):
    content, message = BAD_TENSORS[case]
    with pytest.raises(BadData, match=rf"t\.safetensors.*{message}"):
        read_all(remember({"t.safetensors": content}))


OTHER_WIDTH = sequence([*RECORDS[:3], (1, b"abcd")], every=0)
MARKED = sequence(RECORDS, every=2)
BAD_SEQUENCES = {
    "a version": (changed(SEQ, 3, b"\x05"), r"found b'SEQ\\x05.*expected b'SEQ\\x06"),
    "a class": (SEQ.replace(b"BytesW", b"TextWr"), r"found .*TextWr.* expected b'SEQ\\x06"),
    "compressed": (changed(SEQ, 74, b"\x01"), "found a compressed sequence file, expected an uncompressed one"),
    "blocks": (changed(SEQ, 75, b"\x01"), "found a compressed sequence file"),
    "metadata": (changed(SEQ, 79, b"\x01"), "found a sequence file with metadata"),
    "a first key": (
        changed(SEQ, 103, b"\x09"),
        "byte 96: found a record of 16 bytes with a key of 9, expected a key of 8",
    ),
    "a first value": (changed(SEQ, 99, b"\x12"), "byte 96: found a record of 18 bytes"),
    "no value": (sequence([(1, b"")], every=0), "byte 96: found a record of 8 bytes with a key of 8"),
    "another width": (
        OTHER_WIDTH,
        "byte 168: found key of 8 bytes, value of 4, expected 8 and 8, as in the first record",
    ),
    "a later key": (changed(SEQ, 127, b"\x0c"), "byte 120: found key of 12 bytes, value of 4, expected 8 and 8"),
    "a sync mark": (changed(MARKED, 124, b"X"), "byte 120: found sync mark 5801.*0f, expected 0001.*0f"),
    "a first sync mark": (changed(sequence(RECORDS, every=1), 100, b"X"), "byte 96: found sync mark 5801"),
    "an inner key length": (
        changed(HADOOP, 107, b"\x07"),
        "byte 96: found 00 00 00 07 .* expected the lengths 8 and 8",
    ),
    "an inner value length": (
        changed(HADOOP, 151, b"\x09"),
        "byte 128: found 00 00 00 08 .* the lengths 8 and 8 before",
    ),
    "cut off": (SEQ[:-1], "byte 168: found the end, 23 bytes on, expected a whole record"),
    "cut off at once": (SEQ[:97], "byte 96: found the end, 1 bytes on"),
    "cut off in the header": (SEQ[:90], "byte 90: found the end, expected 96 bytes of header"),
}


@pytest.mark.parametrize("case", BAD_SEQUENCES)
@pytest.mark.parametrize("most", [1, 1000])
def test_bad_sequence_files_are_refused_by_name_and_byte(case, most):
    content, message = BAD_SEQUENCES[case]
    with pytest.raises(BadData, match=rf"rows/part-0.*{message}"):
        read_all(remember({"part-0": content}), most=most)


BAD_FILES = {
    "gzip": (b"\x1f\x8b\x08" + bytes(20), r"x: found a compressed container, expected .*, unpacked"),
    "zip": (b"PK\x03\x04" + bytes(20), "x: found a compressed container"),
    "nothing": (b"", "x: found an empty file, expected a Parquet"),
    "text": (b"1,2,3\n", r"x: found a file that starts with b'1,2,3\\n', expected a Parquet"),
    "a lone array": (npy(KEYS), r"x: found a .npy file by itself, expected keys.npy and rows.npy in a directory"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_of_no_known_format_are_refused(case):
    content, message = BAD_FILES[case]
    with pytest.raises(BadData, match=message):
        open_source([remember({"x": content})])


def test_files_of_different_widths_are_refused_with_both_names():
    root = remember({"a": sequence(RECORDS), "b": parquet(columns(*table(2, 3)))})
    with pytest.raises(BadData, match=r"rows/b: found rows of 3 elements, expected 2, as in memory:.*rows/a"):
        open_source([root])


def test_paths_that_lead_to_no_files_are_refused(tmp_path):
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        f"{tmp_path}/none": "none: found no such file",
        f"{tmp_path}/*.parquet": r"\*\.parquet: found no such file",
        f"{tmp_path}/dir": r"dir/keys\.npy: found no such file",
        f"{tmp_path}/pipe": "pipe: found something of type 'other', expected a regular file",
        "memory://none": "memory://none: found no such file",
        "nothing://x": "nothing://x: found Protocol not known",
    }
    for path, message in cases.items():
        with pytest.raises(BadData, match=message):
            open_source([path])
    with pytest.raises(BadData, match="paths: found none"):
        open_source([])


@every_format
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "broken\nline"), RuntimeError()])
def test_errors_of_a_file_system_name_the_file(form, error, monkeypatch):
    root = remember(FORMATS[form](*table(3, 2)))
    source = open_source([root])

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    message = (
        r"memory://.*rows/[^:]*: found (\[Errno 13\] denied|\[Errno 5\] broken line|RuntimeError), expected readable"
    )
    for action in (lambda: open_source([root]), lambda: read(source)):
        with pytest.raises(BadData, match=message):
            action()


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_without_pyarrow_it_is_said_what_to_install(form, monkeypatch):
    root = remember(FORMATS[form](*table(3, 2)))
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a: real("no_such" if name.startswith("pyarrow") else name, *a)
    )
    with pytest.raises(BadConfig, match=r"pip install 'cube-serving\[parquet\]'"):
        open_source([root])


def test_a_file_system_that_is_not_installed_is_a_matter_of_configuration(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BadConfig, match=r"s3://bucket/x: found Install s3fs"):
        open_source(["s3://bucket/x"])


# Cut off and garbled


@every_format
def test_a_file_cut_off_anywhere_is_never_read_as_a_shorter_one(form):
    keys, rows = table(7, 2)
    files = FORMATS[form](keys, rows)
    ends = set()  # of records and sync marks: a sequence file has no count, where one of them ends it may end
    if form.startswith("sequence"):
        ends = {len(FORMATS[form](keys[:n], rows[:n])["part-0"]) for n in range(7)}
        ends |= {end + 20 for end in ends if files["part-0"][end : end + 4] == b"\xff\xff\xff\xff"}
    for name, content in files.items():
        for length in range(0, len(content), 1 if len(content) < 800 else 7):
            root = remember({**files, name: content[:length]})
            if length in ends:
                found = read_all(root)
                assert same(found, keys[: len(found[0])], rows[: len(found[0])])
            else:
                with pytest.raises(BadData, match=name):
                    read_all(root)


@pytest.mark.parametrize("form", ["safetensors", "sequence", "sequence-hadoop"])
@given(st.data())
@settings(max_examples=150)
def test_garbled_files_are_bad_data_or_rows(form, data):
    files = FORMATS[form](*table(5, 2))
    [(name, content)] = files.items()
    garbled = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        garbled[at] = data.draw(st.integers(0, 255))
    try_to_read({name: bytes(garbled) + data.draw(st.binary(max_size=30))})


@pytest.mark.parametrize("name", ["t.safetensors", "part-0", "t/keys.npy"])
@given(
    st.sampled_from([b"", b"SEQ\x06", SEQ[:96], b"\xff\xff\xff\xff", b"ARROW1\0\0", b"PAR1"]), st.binary(max_size=200)
)
@example(b"\xff\xff\xff\xff", b"\x08\0\0\0" + b"\xff" * 8)
@settings(max_examples=100)
def test_arbitrary_bytes_are_bad_data(name, begin, rest):
    try_to_read({"t/rows.npy": PAIR["t/rows.npy"], name: begin + rest})


@given(st.binary(max_size=100))
def test_arbitrary_npy_headers_are_bad_data(header):
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    try_to_read({"t/rows.npy": PAIR["t/rows.npy"], "t/keys.npy": raw + bytes(32)})


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x)
    )
)
@example({"__metadata__": {}, "rows": tensor("F32", [10**30, 0], 0, 0)})
@example({"rows": tensor("F32", [0, 10**30], 0, 0)})
def test_arbitrary_safetensors_headers_are_bad_data(header):
    try_to_read({"t.safetensors": with_header(header, bytes(16))})


def try_to_read(files):
    with contextlib.suppress(BadData):
        read_all(remember(files))


# Bounds


@pytest.mark.parametrize("form", ["npy", "safetensors", "sequence"])
def test_memory_is_bounded_by_the_batch(form, tmp_path):
    keys, rows = table(200_000, 16)
    source = open_source([save(tmp_path, FORMATS[form](keys, rows))])
    next(source.batches(BEGIN, 10))  # compiled, imported
    tracemalloc.start()
    try:
        for _ in source.batches(BEGIN, 1000):
            pass
        assert tracemalloc.get_traced_memory()[1] < (9 << 20 if form == "sequence" else 1 << 20)
    finally:
        tracemalloc.stop()


def test_memory_of_a_parquet_row_group_is_bounded_by_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_READ", 1 << 20)
    keys, rows = table(400_000, 16)
    pq.write_table(arrow_table(keys, fixed(rows)), tmp_path / "t.parquet", row_group_size=len(keys))
    source = open_source([str(tmp_path)])
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in source.batches(BEGIN, 1000))
    assert most < rows.nbytes // 3
