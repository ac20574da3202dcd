"""Criteo lines: one reader for trainer, prune-program and client; every bad line is named."""

import gzip
import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN, ROOT
from sklearn.metrics import roc_auc_score

from cube.errors import BadData
from trainer_tools import criteo, synthetic

REAL = ROOT.parent / "shared" / "data" / "criteo"

blank_or = lambda values: st.one_of(st.just(""), values)  # noqa: E731
lines = st.lists(
    st.tuples(
        st.sampled_from("01"),
        st.lists(blank_or(st.integers(-999, 10**9).map(str)), min_size=13, max_size=13),
        st.lists(blank_or(st.text("0123456789abcdefABCDEF", min_size=1, max_size=16)), min_size=26, max_size=26),
    ),
    min_size=1,
    max_size=8,
)


def line(label="1", integers=("",) * 13, categories=("",) * 26):
    return "\t".join([label, *integers, *categories])


def changed(column, text):
    cells = line().split("\t")
    cells[column] = text
    return "\t".join(cells)


def slow_twin(cases):
    """What the reader must do, one value at a time."""
    labels = [int(label) for label, _, _ in cases]
    dense = [
        [
            np.float32((int(x) - low) / width) if x else 0
            for x, low, width in zip(row, criteo.DENSE_MIN, criteo.DENSE_RANGE, strict=True)
        ]
        for _, row, _ in cases
    ]
    keys = [
        xxhash.xxh64_intdigest(text.encode(), seed=slot)
        for _, _, row in cases
        for slot, text in enumerate(row, 1)
        if text
    ]
    lengths = [[int(text != "") for text in row] for _, _, row in cases]
    return labels, np.array(dense, np.float32), keys, lengths


@given(lines, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines_are_read_as_the_slow_twin_reads_them(cases, newline, last_newline):
    text = newline.join(line(*case) for case in cases) + (newline if last_newline else "")
    rows = criteo.parse(text.encode())
    labels, dense, keys, lengths = slow_twin(cases)
    assert rows.labels.tolist() == labels
    assert np.array_equal(rows.dense, dense)
    assert rows.keys.tolist() == keys
    assert rows.lengths.tolist() == lengths


@given(lines, st.permutations(["Id", *criteo.NAMES]))
def test_a_header_may_name_the_columns_in_any_order(cases, names):
    cells = [dict(zip(criteo.NAMES, line(*case).split("\t"), strict=True)) | {"Id": "17"} for case in cases]
    text = "\n".join([",".join(names).upper(), *(",".join(c[n] for n in names) for c in cells)])
    want, got = criteo.parse("\n".join(line(*case) for case in cases).encode()), criteo.parse(text.encode())
    for a, b in zip(want, got, strict=True):
        assert np.array_equal(a, b)


def test_keys_are_the_golden_ones():
    vectors = json.loads((GOLDEN / "signs.json").read_text())["signs"]
    checked = 0
    for case in vectors:
        hexadecimal = case["text"] and all(c in "0123456789abcdefABCDEF" for c in case["text"])
        if 1 <= case["slot"] <= 26 and hexadecimal:
            rows = criteo.parse(changed(13 + case["slot"], case["text"]).encode())
            assert rows.keys.tolist() == [case["key"]]
            checked += 1
    assert checked >= 5


def test_an_integer_may_be_written_as_260_0():
    rows = criteo.parse(changed(1, "260.0").encode())
    assert rows.dense[0, 0] == np.float32(13)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\t".join(["0"] * 39), r"line 2: found 39 columns, expected 40, separated by tabs"),
        ("\t".join(["0"] * 41), r"line 2: found 41 columns, expected 40"),
        ("", r"line 2: found 1 columns"),
        (changed(14, "xyz"), r"line 2 column 15 \(C1\): found 'xyz', expected hexadecimal digits or a blank"),
        (changed(39, "12 4"), r"column 40 \(C26\): found '12 4'"),
        (changed(1, "1.5"), r"line 2 column 2 \(I1\): found '1\.5', expected an integer"),
        (changed(13, "abc"), r"column 14 \(I13\): found 'abc'"),
        (changed(5, "-"), r"column 6 \(I5\): found '-'"),
        (changed(5, ".0"), r"column 6 \(I5\): found '\.0'"),
        (changed(5, "9" * 19), r"column 6 \(I5\): found '9999"),
        (changed(0, ""), r"column 1 \(LABEL\): found '', expected 0 or 1"),
        (changed(0, "2"), r"column 1 \(LABEL\): found '2'"),
        (changed(20, "é"), r"column 21 \(C7\)"),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_column(tmp_path, text, message):
    path = tmp_path / "lines.tsv"
    path.write_text(line() + "\n" + text + "\n" + line() + "\n")
    with pytest.raises(BadData, match=r"lines\.tsv .*" + message):
        criteo.read(path)


@pytest.mark.parametrize("content", [b"", b"label," + ",".join(criteo.NAMES[1:]).encode() + b"\n"])
def test_a_file_without_lines_is_refused(tmp_path, content):
    (tmp_path / "empty.tsv").write_bytes(content)
    with pytest.raises(BadData, match=r"empty\.tsv: found no lines"):
        criteo.read(tmp_path / "empty.tsv")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("label,I1", "no or repeated i2"),
        (",".join([*criteo.NAMES, "C1"]), "no or repeated c1"),
        (",".join([*criteo.NAMES, "x"]), "unknown x"),
    ],
)
def test_a_header_without_all_columns_is_refused(header, message):
    with pytest.raises(BadData, match=f"line 1: found {message}"):
        criteo.parse(header.encode() + b"\n")


def test_missing_files_folders_and_broken_gzip_are_refused(tmp_path):
    with pytest.raises(BadData, match=r"nowhere: found No such file"):
        criteo.read(tmp_path / "nowhere")
    with pytest.raises(BadData, match="found Is a directory"):
        criteo.read(tmp_path)
    whole = gzip.compress((line() + "\n").encode() * 999)
    for broken in (b"no gzip", whole[:-9], whole[:30]):
        (tmp_path / "x.gz").write_bytes(broken)
        with pytest.raises(BadData, match=r"x\.gz: found"):
            criteo.read(tmp_path / "x.gz")


def test_chunks_do_not_change_what_is_read(tmp_path, monkeypatch):
    path = tmp_path / "lines.tsv"
    synthetic.write(path, 300, seed=1)
    whole = criteo.read(path)
    (tmp_path / "lines.tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(criteo, "_CHUNK_BYTES", 1000)
    for other in (criteo.read(path), criteo.read(tmp_path / "lines.tsv.gz"), criteo.read(path, limit=300)):
        for a, b in zip(whole, other, strict=True):
            assert np.array_equal(a, b)
    assert len(criteo.read(path, limit=7).labels) == 7
    path.write_text(path.read_text() + "bad\n")
    with pytest.raises(BadData, match="line 301: found 1 columns"):
        criteo.read(path)


def test_batches_are_views_that_cover_everything():
    rows = criteo.parse("\n".join([changed(14, "a"), line(), changed(15, "b")]).encode())
    parts = list(rows.batches(2))
    assert [len(p.labels) for p in parts] == [2, 1]
    assert np.array_equal(np.concatenate([p.keys for p in parts]), rows.keys)
    assert parts[0].offsets[-1] == 1
    first, rest = rows.split(2)
    assert (len(first.labels), first.keys.size, len(rest.labels), rest.keys.size) == (2, 1, 1, 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_agrees_with_scikit_learn(cases):
    labels, scores = (np.array(column) for column in zip(*cases, strict=True))
    got = criteo.auc(labels.astype(np.int8), scores.astype(np.float32))
    if 0 < labels.sum() < len(labels):
        assert got == pytest.approx(roc_auc_score(labels, scores))
    else:
        assert np.isnan(got)


def test_generated_lines_are_reproducible_and_follow_their_truth(tmp_path):
    truth = synthetic.write(tmp_path / "a.tsv", 20_000, seed=3)
    again = synthetic.write(tmp_path / "b.tsv", 20_000, seed=3)
    assert np.array_equal(truth, again)
    assert (tmp_path / "a.tsv").read_bytes() == (tmp_path / "b.tsv").read_bytes()
    rows = criteo.read(tmp_path / "a.tsv")
    assert abs(rows.labels.mean() - truth.mean()) < 0.02
    assert 0.75 < criteo.auc(rows.labels, truth) < 0.9
    counts = np.sort(np.unique(rows.keys, return_counts=True)[1])[::-1]
    assert counts[0] > 100 * np.median(counts)  # few categories are most of the traffic
    assert 0.03 < (rows.lengths == 0).mean() < 0.09  # blanks


@pytest.mark.skipif(not REAL.is_dir(), reason="the data samples are not here")
@pytest.mark.parametrize(
    ("name", "rows", "clicks"),
    [
        ("kaggle2014_train_tiny.csv", 1999, 418),
        ("kaggle2014_test_tiny.csv", 1999, 0),
        ("deepctr_criteo_sample.txt", 200, 49),
    ],
)
def test_real_samples_are_read(name, rows, clicks):
    got = criteo.read(REAL / name)
    assert (len(got.labels), got.labels.sum()) == (rows, clicks)
    assert np.isfinite(got.dense).all()
