"""prune-program on Paddle programs: real ones of three releases, read without Paddle.

What they compute is checked by an interpreter in numpy, which is itself checked against what Paddle answered.
"""

from pathlib import Path

import numpy as np
import pytest
from paddle_answers import answered
from paddle_interpreter import attribute, run
from paddle_programs import CTR, QUICK, bytes_of
from places import GOLDEN

from cube.client import LocalCube
from cube.errors import BadData
from trainer_tools import manifest
from trainer_tools.pb.paddle_framework_pb2 import ProgramDesc, VarType
from trainer_tools.programs import paddle
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options


@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod"])
def test_pruned_program_and_rows_answer_as_the_original_and_that_as_paddle(model, tmp_path, name):
    prune(model(name), tmp_path / "out", QUICK)
    original, pruned = paddle.load(tmp_path / name), paddle.load(tmp_path / "out" / "program")
    given, lods = answered(name, "in"), answered(name, "lod")
    want = run(original, given, lods)
    for output, array in answered(name, "out").items():
        np.testing.assert_allclose(want[output], array, rtol=1e-5, atol=1e-6)
    said, cube = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json"), LocalCube(tmp_path / "out/cube")
    feeds = {tensor.name: given[tensor.name] for tensor in said.inputs}
    seen = {k.keys for k in said.lookups} - set(given)
    arranged = run(original.serving().fetching(sorted(seen)), given, lods)
    for lookup in said.lookups:
        ids = given[lookup.keys] if lookup.keys in given else arranged[lookup.keys]
        rows = cube.rows(lookup.table, None, ids.ravel().astype(np.uint64)).rows
        size = [len(rows)] if lookup.lod_level else [len(ids)]
        feeds[lookup.feed] = rows.reshape(size + lookup.feed_shape[1:])
        if lookup.lod_level:
            lods[lookup.feed] = lods[lookup.keys]
    got = run(pruned, feeds, lods)
    assert list(got) == list(want) == [t.name for t in said.outputs]
    assert all(np.array_equal(got[output], want[output]) for output in want)


# ---- reading and writing ----


@pytest.mark.parametrize(
    "name", ["331-ctr", "331-jit", "331-conv", "262-deepfm", "185-lod", "185-loop", "185-tagger", "185-train"]
)
def test_what_is_written_unchanged_is_what_was_read_to_the_byte(tmp_path, name):
    file = Path(paddle.load(GOLDEN / f"paddle-{name}").write(tmp_path))
    written, read = bytes_of(tmp_path), bytes_of(GOLDEN / f"paddle-{name}")
    # 1.8 wrote a field that later releases reserve; it is kept, at another place
    assert sorted(written.pop(file)) == sorted(raw := read.pop(file))
    assert ProgramDesc.FromString((tmp_path / file).read_bytes()) == ProgramDesc.FromString(raw)
    assert written == read


def test_parameters_are_mapped_and_say_what_the_program_says():
    program = paddle.load(GOLDEN / "paddle-185-tagger")
    assert {n: (p.shape.dims, p.array().shape) for n, p in program.parameters.items()} == {
        v.name: (tuple(v.type.dense_tensor.tensor.dims),) * 2
        for v in program.desc.blocks[0].vars
        if v.persistable and v.type.type == VarType.DENSE_TENSOR
    }
    assert isinstance(program.table("word_emb"), np.memmap)
    assert np.abs(program.table("word_emb")).max() <= 1  # drawn from -1 to 1
    assert program.table("word_emb").std() > 0.5


# ---- what goes and what stays ----


def test_a_cut_lookup_leaves_an_input_of_its_name_and_no_table(model, tmp_path):
    prune(model("331-ctr"), tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.datatype, t.shape) for t in program.inputs()] == [
        ("dense_input", "FP32", [-1, 5]),
        *((name, "FP32", [-1, 1, 4]) for name in CTR),
    ]
    ops = program.desc.blocks[0].ops
    assert [(op.type, attribute(op, "col")) for op in ops if op.type in ("feed", "fetch")] == [
        *(("feed", i) for i in range(4)),
        ("fetch", 0),
    ]
    names = {var.name for var in program.desc.blocks[0].vars}
    assert names.isdisjoint({"SparseFeatFactors", "C1", "C2", "C3"})
    assert set(program.parameters) == {"fc_0.w_0", "fc_0.b_0", "fc_1.w_0", "fc_1.b_0"}
    assert all(v.need_check_feed and not v.persistable for v in program.desc.blocks[0].vars if v.name in CTR)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.parent.name == "program") == [
        "ctr.pdiparams",
        "ctr.pdmodel",
    ]


def test_ragged_lookups_leave_ragged_inputs_and_separate_parameters_stay_separate(model, tmp_path):
    prune(model("185-lod"), tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.shape, program.lod_level(t.name)) for t in program.inputs()] == [([-1, 5], 0), *([([-1, 4], 1)] * 3)]
    assert {p.name for p in (tmp_path / "out" / "program").iterdir()} == {
        "__model__", "fc_0.w_0", "fc_0.b_0", "fc_1.w_0", "fc_1.b_0",
    }  # fmt: skip
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert said.program.parameters == "program"
    assert [(k.keys, k.feed, k.pooling, k.lod_level, k.padding, k.feed_shape) for k in said.lookups] == [
        (f"C{i + 1}", name, "none", 1, 0, [-1, 4]) for i, name in enumerate(CTR)
    ]


def test_small_tables_stay_unless_they_are_named_and_the_report_says_why(model, tmp_path):
    report = prune(model("185-tagger"), tmp_path / "out", QUICK)
    assert [(c.lookup.table, c.is_cut, c.reason) for c in report.candidates] == [
        ("word_emb", True, "1,001 rows of 4"),
        ("mark_emb", False, "2 rows, fewer than --min-rows 1,000"),
    ]
    program = paddle.load(tmp_path / "out" / "program")
    assert [t.name for t in program.inputs()] == ["marks", "embedding_0.tmp_0"]
    assert [(t.name, t.datatype) for t in program.outputs()] == [
        ("save_infer_model/scale_0.tmp_1", "INT64"),
        ("save_infer_model/scale_1.tmp_0", "FP32"),
    ]
    assert "mark_emb" in program.parameters
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert said.lod_levels == {"marks": 1}
    for rules, gone in (
        (Rules(min_rows=0), ["embedding_0.tmp_0", "embedding_1.tmp_0"]),
        (Rules(only=["mark_emb"]), ["embedding_1.tmp_0"]),
        (Rules(min_rows=0, keep=["embedding_0.tmp_0"]), ["embedding_1.tmp_0"]),
    ):
        prune(tmp_path / "185-tagger", tmp_path / "out", Options(rules=rules, verify_samples=0))
        inputs = paddle.load(tmp_path / "out" / "program").inputs()
        assert [t.name for t in inputs if t.name.startswith("embedding")] == gone


def test_a_training_program_loses_everything_but_what_its_prediction_needs(model, tmp_path):
    place = model("185-train")
    with pytest.raises(BadData, match=r"without fetch ops.*--fetch NAME.*look at assign_0.tmp_0"):
        prune(place, tmp_path / "out", QUICK)
    with pytest.raises(BadData, match="--fetch: found 'predict', expected a variable of the program"):
        prune(place, tmp_path / "out", Options(fetch=["predict"], verify_samples=0))
    report = prune(place, tmp_path / "out", Options(fetch=["assign_0.tmp_0"], verify_samples=0))
    assert report.ops == (45, 12)
    program = paddle.load(tmp_path / "out" / "program")
    assert [t.name for t in program.inputs()] == ["dense_input", *CTR]
    assert {op.type for op in program.desc.blocks[0].ops} == {
        "feed", "sequence_pool", "concat", "mul", "elementwise_add", "relu", "softmax", "dropout", "assign", "fetch",
    }  # fmt: skip
    assert all(attribute(op, "is_test", True) for op in program.desc.blocks[0].ops)
    assert set(program.parameters) == {"fc_0.w_0", "fc_0.b_0", "fc_1.w_0", "fc_1.b_0"}


def test_ids_arranged_from_several_inputs_are_an_input_of_the_request_as_arranged(model, tmp_path):
    report = prune(model("331-jit"), tmp_path / "out", QUICK)
    assert report.candidates[0].reason == "1,001 rows of 4; ids arranged from a, b, c"
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    (lookup,) = said.lookups
    assert (lookup.keys, lookup.arranged_from, lookup.feed_shape) == ("concat_0.tmp_0", ["a", "b", "c"], [-1, 3, 4])
    assert [t.name for t in said.inputs] == ["day"]


# ---- rows ----


def test_rows_are_the_table_under_its_ids_with_zeros_for_padding(model, tmp_path):
    place = model("331-ctr")
    table = paddle.load(place).table("SparseFeatFactors").copy()
    assert table[0].any()
    table[0] = 0
    prune(place, tmp_path / "out", QUICK)
    rows = tmp_path / "out" / "rows" / "SparseFeatFactors"
    assert np.array_equal(np.load(rows / "keys.npy"), np.arange(1001, dtype=np.uint64))
    assert np.array_equal(np.load(rows / "rows.npy"), table)
    assert np.array_equal(
        LocalCube(tmp_path / "out" / "cube").rows("SparseFeatFactors", None, np.arange(1001, dtype=np.uint64)).rows,
        table,
    )
    report = prune(place, tmp_path / "out", Options(drop_zero_rows=True, verify_samples=0))
    assert report.rows == 1000
    assert np.array_equal(np.load(rows / "keys.npy"), np.arange(1, 1001, dtype=np.uint64))
    assert np.array_equal(np.load(rows / "rows.npy"), table[1:])


def test_a_vocabulary_gives_the_keys(model, tmp_path):
    keys = np.random.default_rng(1).integers(0, 2**64, 1001, dtype=np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    options = Options(vocabularies={"SparseFeatFactors": tmp_path / "keys.npy"}, verify_samples=0)
    prune(model("331-ctr"), tmp_path / "out", options)
    assert np.array_equal(np.load(tmp_path / "out" / "rows" / "SparseFeatFactors" / "keys.npy"), keys)
    assert manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json").sign == "xxh64(text, seed=slot)"
    with pytest.raises(BadData, match="--vocabulary: found fc, expected one for each table that goes"):
        prune(tmp_path / "331-ctr", tmp_path / "out", Options(vocabularies={"fc": tmp_path / "keys.npy"}))
