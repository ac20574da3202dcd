"""prune-program on Paddle programs: real ones of three releases (tests/golden/make_paddle_*.py), read without Paddle.

What they compute is checked by an interpreter in numpy, which is itself checked against what Paddle answered. Where
PADDLE_PYTHON names a Python that has Paddle, Paddle is asked too.
"""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN, ROOT

from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from trainer_tools import manifest
from trainer_tools.pb.paddle_framework_pb2 import BLOCK, INT, LONG, OpDesc, ProgramDesc, VarDesc, VarType
from trainer_tools.programs import paddle, paddle_desc
from trainer_tools.programs.paddle_desc import arguments, reads, writes
from trainer_tools.programs.program import Rules, decide
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

ANSWERS = np.load(GOLDEN / "paddle-answers.npz")
QUICK = Options(verify_samples=0)
CTR = [f"embedding_{i}.tmp_0" for i in range(3)]
needs_paddle = pytest.mark.skipif("PADDLE_PYTHON" not in os.environ, reason="PADDLE_PYTHON names no Python with Paddle")


@pytest.fixture
def model(tmp_path):
    """A copy of a golden program's directory."""
    return lambda name: shutil.copytree(GOLDEN / f"paddle-{name}", tmp_path / name)


def bytes_of(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def answered(name, kind):
    """What Paddle was given ("in", "lod") or answered ("out")."""
    prefix = f"paddle-{name}|{kind}|"
    return {key.removeprefix(prefix): ANSWERS[key] for key in ANSWERS.files if key.startswith(prefix)}


# ---- an interpreter ----


def attribute(op, name, default=None):
    for attr in op.attrs:
        if attr.name == name:
            fields = ("i", "f", "s", "ints", "floats", "strings", "b", "bools", "block_idx", "l", None, "longs")
            return getattr(attr, fields[attr.type])
    return default


def pooled(rows, offsets, how):
    counts = np.maximum(np.diff(offsets), 1) if how == b"AVERAGE" else np.ones(len(offsets) - 1)
    sums = [rows[start:end].sum(axis=0) for start, end in itertools.pairwise(offsets)]
    return np.array(sums, np.float32) / counts[:, None].astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def looked_up(op, table, ids, drop):
    rows = table[ids]
    rows[ids == attribute(op, "padding_idx", -1)] = 0
    return rows.reshape(*(ids.shape[:-1] if drop else ids.shape), -1)


def reshaped(op, x):
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(attribute(op, "shape"))])


def summed(op, x):
    axis = None if attribute(op, "reduce_all") else tuple(attribute(op, "dim"))
    return x.sum(axis=axis, keepdims=attribute(op, "keep_dim"))


def flattened(op, x):
    start, stop = attribute(op, "start_axis"), attribute(op, "stop_axis") % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[stop + 1 :])


COMPUTE = {
    "concat": lambda op, *xs: np.concatenate(xs, axis=attribute(op, "axis")),
    "mul": lambda op, x, y: x @ y,
    "matmul_v2": lambda op, x, y: x @ y,
    "elementwise_add": lambda op, x, y: x + y,
    "elementwise_sub": lambda op, x, y: x - y,
    "elementwise_mul": lambda op, x, y: x * y,
    "sum": lambda op, *xs: sum(xs),
    "scale": lambda op, x: x * np.float32(attribute(op, "scale")) + np.float32(attribute(op, "bias")),
    "relu": lambda op, x: np.maximum(x, 0),
    "sigmoid": lambda op, x: 1 / (1 + np.exp(-x)),
    "softmax": lambda op, x: softmax(x),
    "reshape2": reshaped,
    "reduce_sum": summed,
    "flatten_contiguous_range": flattened,
    "lookup_table": lambda op, w, ids: looked_up(op, w, ids, drop=True),
    "lookup_table_v2": lambda op, w, ids: looked_up(op, w, ids, drop=False),
}


def run(program, inputs, lods):
    """Outputs by name. inputs: arrays by name; lods: offsets of the ragged ones, to which others are added."""
    values = {n: p.array() for n, p in program.parameters.items()} | inputs
    outputs = {}
    for op in program.desc.blocks[0].ops:
        if op.type == "feed":
            (name,) = writes(op)
            assert name in inputs
        elif op.type == "fetch":
            (name,) = reads(op)
            outputs[name] = values[name]
        else:
            slots = {slot.parameter: list(slot.arguments) for slot in op.inputs}
            names = slots["W"] + slots["Ids"] if "Ids" in slots else slots["X"] + slots.get("Y", [])
            out = arguments(op.outputs, "Out")[0]
            if op.type == "sequence_pool":
                values[out] = pooled(values[names[0]], lods[names[0]], attribute(op, "pooltype"))
            else:
                values[out] = COMPUTE[op.type](op, *(values[name] for name in names))
                if ragged := [name for name in names if name in lods]:
                    lods[out] = lods[ragged[0]]
    return outputs


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


# ---- programs made by hand ----


def variable(name, dims, kind=VarType.FP32, **fields):
    tensor = VarType.DenseTensorDesc(tensor=VarType.TensorDesc(data_type=kind, dims=dims))
    return VarDesc(name=name, type=VarType(type=VarType.DENSE_TENSOR, dense_tensor=tensor), **fields)


def op(kind, inputs, outputs, *attrs):
    return OpDesc(
        type=kind,
        inputs=[OpDesc.Var(parameter=k, arguments=v.split()) for k, v in inputs.items()],
        outputs=[OpDesc.Var(parameter=k, arguments=v.split()) for k, v in outputs.items()],
        attrs=attrs,
    )


def made(directory, ops, *more, tables=("t",), inner=()):
    """A program over ids `a`, `b` [-1, 1], tables [2000, 3] as parameter files, fetching `y`."""
    desc = ProgramDesc()
    block = desc.blocks.add(idx=0, parent_idx=-1)
    block.vars.extend([variable(name, [2000, 3], persistable=True) for name in tables])
    block.vars.extend([variable(name, [-1, 1], VarType.INT64) for name in ("a", "b")])
    block.vars.extend(more)
    block.vars.extend([variable(name, [-1, 3]) for name in ("x", "y", "z")])
    feeds = [op("feed", {"X": "feed"}, {"Out": n}, OpDesc.Attr(name="col", type=INT, i=i)) for i, n in enumerate("ab")]
    block.ops.extend([*feeds, *ops, op("fetch", {"X": "y"}, {"Out": "fetch"})])
    if inner:
        desc.blocks.add(idx=1, parent_idx=0).ops.extend(inner)
    directory.mkdir(exist_ok=True)
    (directory / "__model__").write_bytes(desc.SerializeToString())
    for name in tables:
        (directory / name).write_bytes(stream(np.arange(6000, dtype="<f4").reshape(2000, 3)))
    return directory


def stream(array):
    """A parameter as Paddle stores it."""
    kind = {"<f4": VarType.FP32, "<f2": VarType.FP16, "<f8": VarType.FP64, "<i8": VarType.INT64}[array.dtype.str]
    shape = VarType.TensorDesc(data_type=kind, dims=array.shape).SerializeToString()
    return bytes(16) + len(shape).to_bytes(4, "little") + shape + array.tobytes()  # versions and LoD levels are zeros


LOOKUP = op("lookup_table_v2", {"Ids": "a", "W": "t"}, {"Out": "x"})
INNER = OpDesc.Attr(name="sub_block", type=BLOCK, block_idx=1)
DOUBLED = op("scale", {"X": "x"}, {"Out": "y"})


def reason(directory):
    return [(c.lookup.name, c.is_cut, c.reason) for c in decide(paddle.load(directory).serving(), Rules())]


def test_a_distributed_lookup_is_as_many_lookups_as_it_has_ids(tmp_path):
    several = op("distributed_lookup_table", {"Ids": "a b", "W": "t"}, {"Outputs": "x z"})
    place = made(tmp_path / "m", [several, op("sum", {"X": "x z"}, {"Out": "y"})])
    assert reason(place) == [("x", True, "2,000 rows of 3"), ("z", True, "2,000 rows of 3")]
    prune(place, tmp_path / "out", Options(rules=Rules(keep=["x"]), verify_samples=0))
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.shape) for t in program.inputs()] == [("a", [-1, 1]), ("z", [-1, 3])]
    assert [(op.type, reads(op), writes(op)) for op in program.desc.blocks[0].ops][2] == (
        "distributed_lookup_table",
        ["a", "t"],
        ["x"],
    )
    (place / "t").unlink()  # on a parameter server
    assert reason(place) == [
        ("x", True, "rows of 3 on a parameter server"),
        ("z", True, "rows of 3 on a parameter server"),
    ]
    report = prune(place, tmp_path / "out", Options())
    assert (report.rows, report.compared, report.unproven) == (0, 0, "rows of t are on a parameter server")


def test_a_table_on_a_parameter_server_goes_without_its_rows(tmp_path):
    place = tmp_path / "m"
    place.mkdir()
    shutil.copy(GOLDEN / "paddle-331-remote.pdmodel", place / "m.pdmodel")
    bias, weight = stream(np.ones(2, "<f4")), stream(np.ones((11, 2), "<f4"))
    (place / "m.pdiparams").write_bytes(bias + weight)
    report = prune(place, tmp_path / "out")
    assert [c.reason for c in report.candidates] == ["rows of 8 on a parameter server"]
    assert report.unproven == "rows of sparse_embedding_0.w_0 are on a parameter server"
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.shape) for t in program.inputs()] == [
        ("dense_input", [-1, 3]),
        ("sparse_embedding_0.tmp_0", [-1, 8]),
    ]
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert (said.tables, said.cube) == ({}, None)
    assert said.lookups[0].table == "sparse_embedding_0.w_0"


def test_rows_of_float16_feed_a_program_of_float16(tmp_path):
    more = [variable("h", [2000, 2], VarType.FP16, persistable=True)]
    place = made(tmp_path / "m", [op("lookup_table", {"Ids": "a", "W": "h"}, {"Out": "x"}), DOUBLED], *more)
    rows = np.random.default_rng(1).random((2000, 2)).astype("<f2")
    (place / "h").write_bytes(stream(rows))
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, t.datatype, t.shape) for t in program.inputs()] == [("x", "FP16", [-1, 2])]
    assert np.array_equal(np.load(tmp_path / "out" / "rows" / "h" / "rows.npy"), rows.astype("f4"))


@pytest.mark.parametrize("name", ["../t", "/etc/t", "a/../../t", "t\0"])
def test_a_parameter_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    look = op("lookup_table", {"Ids": "a", "W": name}, {"Out": "x"})
    place = made(tmp_path / "m", [look, DOUBLED], variable(name, [2000, 3], persistable=True))
    (tmp_path / "t").write_bytes((place / "t").read_bytes())
    refused(place, tmp_path, "name of a parameter: found .*, expected a path inside")


def test_the_one_other_file_holds_the_parameters_whatever_its_name(model, tmp_path):
    place = model("331-ctr")
    (place / "ctr.pdmodel").rename(place / "model")
    (place / "ctr.pdiparams").rename(place / "weights.bin")
    prune(place, tmp_path / "out", QUICK)
    assert sorted(p.name for p in (tmp_path / "out" / "program").iterdir()) == ["model", "weights.bin"]
    assert paddle.load(tmp_path / "out" / "program").inputs()


@pytest.mark.parametrize(
    ("ops", "why"),
    [
        ([op("range", {}, {"Out": "p"}), op("lookup_table_v2", {"Ids": "p", "W": "t"}, {"Out": "x"})],
         "its ids are computed by op range (p)"),
        ([op("hash", {"X": "a"}, {"Out": "p"}), op("cast", {"X": "p"}, {"Out": "q"}),
          op("lookup_table_v2", {"Ids": "q", "W": "t"}, {"Out": "x"})], "its ids are computed by op hash (p)"),
        ([op("lookup_table_v2", {"Ids": "c", "W": "t"}, {"Out": "x"})], "its ids are constants, c"),
        ([op("scale", {"X": "t"}, {"Out": "u"}), op("lookup_table_v2", {"Ids": "a", "W": "u"}, {"Out": "x"})],
         "its table is computed by op scale"),
        ([op("lookup_table_v2", {"Ids": "a", "W": "b"}, {"Out": "x"})], "its table is no parameter"),
        ([op("lookup_table_v2", {"Ids": "a", "W": "wide"}, {"Out": "x"})], "its rows are FP64; a cube's are float32"),
        ([LOOKUP, op("increment", {"X": "x"}, {"Out": "x"})], "2 ops write its output"),
        ([op("fused_embedding_seq_pool", {"Ids": "a", "W": "t"}, {"Out": "x"})], "lookup and pooling are one op"),
    ],
)  # fmt: skip
def test_what_is_no_lookup_of_a_request_stays_and_the_report_says_why(tmp_path, ops, why):
    more = [
        variable("p", [-1, 1], VarType.INT64), variable("q", [-1, 1], VarType.INT64), variable("u", [2000, 3]),
        variable("c", [5, 1], VarType.INT64, persistable=True),
        variable("wide", [5, 1], VarType.FP64, persistable=True),
    ]  # fmt: skip
    place = made(tmp_path / "m", [*ops, DOUBLED], *more)
    for name, dtype in (("c", "<i8"), ("wide", "<f8")):
        (place / name).write_bytes(stream(np.ones((5, 1), dtype)))
    assert reason(place) == [("x", False, why)]
    with pytest.raises(BadData, match="m/__model__: found no lookup to cut: x stays: "):
        prune(place, tmp_path / "out", QUICK)
    with pytest.raises(BadData, match="--only, lookup x: found"):
        prune(place, tmp_path / "out", Options(rules=Rules(only=["x"])))


def test_lookups_of_one_table_with_another_padding_stay(tmp_path):
    seven = OpDesc.Attr(name="padding_idx", type=LONG, l=7)
    padded = op("lookup_table_v2", {"Ids": "b", "W": "t"}, {"Out": "z"}, seven)
    place = made(tmp_path / "m", [LOOKUP, padded, op("sum", {"X": "x z"}, {"Out": "y"})])
    assert reason(place) == [
        ("x", True, "2,000 rows of 3"),
        ("z", False, "its padding id is 7, that of another lookup of its table None"),
    ]
    prune(place, tmp_path / "out", QUICK)
    assert set(paddle.load(tmp_path / "out" / "program").parameters) == {"t"}  # the one that stays needs it


def test_a_table_that_something_else_reads_stays_in_the_program_too(tmp_path):
    place = made(tmp_path / "m", [LOOKUP, op("matmul_v2", {"X": "x", "Y": "t"}, {"Out": "y"})])
    report = prune(place, tmp_path / "out", QUICK)
    assert report.rows == 2000
    assert report.candidates[0].reason == "2,000 rows of 3; the table stays too, for other ops read it"
    assert set(paddle.load(tmp_path / "out" / "program").parameters) == {"t"}


def test_loops_keep_what_they_need_and_their_lookups(tmp_path):
    body = [op("lookup_table_v2", {"Ids": "b", "W": "t"}, {"Out": "z"}), op("sum", {"X": "z x"}, {"Out": "y"})]
    loop = op("while", {"X": "x b"}, {"Out": "y"}, INNER)
    place = made(tmp_path / "m", [LOOKUP, loop], inner=body)
    assert reason(place) == [("x", True, "2,000 rows of 3"), ("z", False, "it is inside a loop or a branch, block 1")]
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert sorted(t.name for t in program.inputs()) == ["b", "x"]
    assert set(program.parameters) == {"t"}
    assert len(program.desc.blocks) == 2


def test_a_reader_gives_way_to_inputs(tmp_path):
    """As fluid's py_reader leaves a training program: ids and labels come out of an op, nothing is fed."""
    reader = VarDesc(name="r", type=VarType(type=VarType.READER), persistable=True)
    place = made(tmp_path / "m", [op("read", {"Reader": "r"}, {"Out": "a b"}), LOOKUP, DOUBLED], reader)
    desc = ProgramDesc.FromString((place / "__model__").read_bytes())
    del desc.blocks[0].ops[:2]
    (place / "__model__").write_bytes(desc.SerializeToString())
    assert [t.name for t in paddle.load(place).serving().inputs()] == ["a"]
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [(op.type, writes(op)) for op in program.desc.blocks[0].ops] == [
        ("feed", ["x"]), ("scale", ["y"]), ("fetch", ["fetch"]),
    ]  # fmt: skip


def test_a_real_loop_keeps_its_block_and_its_lookup(model, tmp_path):
    report = prune(model("185-loop"), tmp_path / "out", QUICK)
    assert [(c.lookup.table, c.is_cut, c.reason) for c in report.candidates] == [
        ("embedding_0.w_0", True, "1,001 rows of 4"),
        ("embedding_1.w_0", False, "it is inside a loop or a branch, block 1"),
    ]
    program = paddle.load(tmp_path / "out" / "program")
    assert [(t.name, program.lod_level(t.name)) for t in program.inputs()] == [("words", 1), ("embedding_0.tmp_0", 1)]
    assert [op.type for op in program.desc.blocks[0].ops].count("while") == 1
    assert "lookup_table" in {op.type for op in program.desc.blocks[1].ops}
    assert "embedding_1.w_0" in program.parameters
    assert "embedding_0.w_0" not in program.parameters


def test_a_branch_that_nothing_needs_goes_with_its_block(tmp_path):
    branch = op("conditional_block", {"Input": "b"}, {"Out": "z"}, INNER)
    place = made(tmp_path / "m", [LOOKUP, branch, DOUBLED], inner=[op("scale", {"X": "x"}, {"Out": "z"})])
    prune(place, tmp_path / "out", QUICK)
    program = paddle.load(tmp_path / "out" / "program")
    assert [t.name for t in program.inputs()] == ["x"]
    assert len(program.desc.blocks) == 1


# ---- walking back, against a run ----

NAMES = "abcdefg"


def answer(desc, targets):
    """What each target is, as a term of the inputs; None for what is not there."""
    known = {"a": "a", "b": "b"}
    for o in desc.blocks[0].ops:
        if o.type not in ("feed", "fetch"):
            known |= {name: (o.type, name, *(known.get(n) for n in reads(o))) for name in writes(o)}
    return [known.get(target) for target in targets]


names = st.sampled_from(NAMES)
some = st.lists(names, min_size=1, max_size=2, unique=True)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.lists(names, max_size=3), some), max_size=12), some)
def test_walking_back_keeps_exactly_the_ops_that_the_targets_need(steps, targets):
    desc = ProgramDesc()
    block = desc.blocks.add(idx=0, parent_idx=-1)
    block.vars.extend([variable(name, [1]) for name in NAMES])
    known = {"a", "b"}
    for number, (inputs, outputs) in enumerate(steps):
        block.ops.append(
            op(f"op{number}", {"X": " ".join(n for n in inputs if n in known)}, {"Out": " ".join(outputs)})
        )
        known.update(outputs)
    targets = [target for target in targets if target in known]
    if not targets:
        return
    short = paddle_desc.walked_back(desc, targets, "here")
    paddle_desc.check(short, "here")
    assert answer(short, targets) == answer(desc, targets)
    assert paddle_desc.fetched(short) == targets
    assert set(paddle_desc.fed(short)) <= {"a", "b"}
    for at, o in enumerate(short.blocks[0].ops):
        if o.type not in ("feed", "fetch"):
            less = ProgramDesc()
            less.CopyFrom(short)
            del less.blocks[0].ops[at]
            assert answer(less, targets) != answer(short, targets)


# ---- bad input ----


def refused(directory, tmp_path, message, options=QUICK):
    before = bytes_of(directory)
    with pytest.raises(BadData, match=message):
        prune(directory, tmp_path / "out", options)
    assert bytes_of(directory) == before
    assert not (tmp_path / "out").exists()


def test_a_program_without_lookups_is_refused_and_the_command_exits_1(model, command):
    done = command("prune-program", model("331-conv"))
    assert done.returncode == 1
    assert "conv.pdmodel: found no lookup to cut, expected one; a dense program is served as it is" in done.stderr


class Explosive:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.json", b'{"base_code":{"magic":"pir","trainable":false},"program":{}}',
         "a program of Paddle 3's PIR, expected a ProgramDesc: .*FLAGS_enable_pir_api=0"),
        ("model.pdmodel", b'{"base_code":{"magic":"pir"}}', "JSON .*PIR.*expected a ProgramDesc"),
        ("model.pdparams", None, "a pickle, which is not opened"),
        ("model.pt", None, r"model.pt: found a pickle, which is not opened, expected a torch.export archive"),
        ("model.pth", b"zip", r"model.pth: found a zip archive of TorchScript or torch.save.*torch.export.save"),
        ("model.onnx", b"\x08\x07", "ONNX program, which prune-program does not read yet"),
        ("notes.txt", b"hello", "found notes.txt, expected signature.json with a torch.export program"),
        ("__model__", b"", "0 bytes, a ProgramDesc without an op"),
        ("__model__", b"no protobuf at all", "bytes that are no ProgramDesc"),
    ],
)  # fmt: skip
def test_what_is_no_program_we_read_is_refused_with_what_to_do(tmp_path, file, content, message):
    place = tmp_path / "m"
    place.mkdir()
    if content == b"zip":
        with zipfile.ZipFile(place / file, "w") as archive:
            archive.writestr("model/code/__torch__.py", "boom")
    else:
        (place / file).write_bytes(content if content is not None else pickle.dumps(Explosive(tmp_path / "bomb")))
    refused(place, tmp_path, message)
    assert not (tmp_path / "bomb").exists()


def test_no_directory_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(BadData, match="nowhere: found No such file or directory, expected a directory"):
        prune(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "found an empty directory, expected signature.json")


def test_parameters_that_are_missing_or_not_the_programs_are_refused_by_name(model, tmp_path):
    place = model("185-lod")
    table = (place / "SparseFeatFactors").read_bytes()
    (place / "fc_0.b_0").rename(place / "moved")
    refused(
        place, tmp_path, r"185-lod/fc_0.b_0: found no such file, expected the file of parameter 'fc_0.b_0', FP32 \[8\]"
    )
    (place / "moved").rename(place / "fc_0.b_0")
    for content, message in (
        (table[:-1], "SparseFeatFactors'\\): found 16015 bytes of elements, expected 16016"),
        (table + b"x", "found 1 bytes after the parameter"),
        (b"\1" + table[1:], "found 1, expected 0, the version"),
        (b"", "found the end of the file"),
        (table[:20] + b"\xff" * 20, "no TensorDesc"),
        (
            (place / "fc_0.w_0").read_bytes(),
            r"found FP32 \[17, 8\], expected parameter 'SparseFeatFactors'.*\[1001, 4\]",
        ),
    ):
        (place / "SparseFeatFactors").write_bytes(content)
        refused(place, tmp_path, message)
    for name in list(place.iterdir()):
        if name.name != "__model__":
            name.unlink()
    refused(place, tmp_path, "found no other file, expected the parameters: __params__, or a file each")


def test_combined_parameters_that_are_not_the_programs_are_refused(model, tmp_path):
    place = model("331-ctr")
    file = place / "ctr.pdiparams"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-4], "bytes of elements, expected"),
        (whole[: len(whole) - paddle.load(place).parameters["fc_1.w_0"].data], "expected"),
        (whole + b"\0", "1 bytes after 5 parameters"),
        (whole[paddle.load(place).parameters["fc_0.b_0"].start :], "expected parameter 'SparseFeatFactors'"),
    ):
        file.write_bytes(content)
        refused(place, tmp_path, message)
    file.unlink()
    refused(place, tmp_path, "expected the parameters: ctr.pdiparams")


@pytest.mark.parametrize("file", ["331-ctr/ctr.pdmodel", "185-lod/__model__"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_program_is_refused_or_still_a_program(tmp_path_factory, file, data):
    """Bytes flipped, cut or put in: BadData, or whatever else the bytes now say, but no other error."""
    name, _, file = file.partition("/")
    place = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    shutil.copytree(GOLDEN / f"paddle-{name}", place, dirs_exist_ok=True)
    raw = bytearray((place / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.sampled_from([0, 1, 1, 40]))] = data.draw(st.binary(max_size=2))
    (place / file).write_bytes(raw)
    try:
        program = paddle.load(place).serving()
        program.cut([c.lookup for c in decide(program, Rules()) if c.is_cut]).inputs()
    except BadData:
        pass


# ---- the command ----


def test_the_input_is_untouched_and_an_output_of_another_kind_too(model, tmp_path):
    place = model("331-ctr")
    before = bytes_of(place)
    for _ in range(2):  # the second replaces the first
        prune(place, tmp_path / "out", QUICK)
    assert bytes_of(place) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["331-ctr", "out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(BadData, match="other: found an existing path that prune-program did not write"):
        prune(place, tmp_path / "other", QUICK)


def test_the_command_reports_as_text_and_as_json(model, command, tmp_path):
    done = command("prune-program", model("185-tagger"), "--json", "--verify", 0)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["format"] == "paddle"
    assert [(k["name"], k["table"], k["is_cut"], k["rows"]) for k in said["lookups"]] == [
        ("embedding_0.tmp_0", "word_emb", True, 1001),
        ("embedding_1.tmp_0", "mark_emb", False, 2),
    ]
    assert said["ops"] == {"before": 11, "after": 10}
    assert said["proof"] == {"samples": 0, "reason": "--verify 0"}
    assert "cut    lookup_table embedding_0.tmp_0 over word_emb, ids words → input embedding_0.tmp_0" in done.stderr
    assert "stays  lookup_table embedding_1.tmp_0 over mark_emb (2 rows, fewer than --min-rows 1,000)" in done.stderr
    manifest_said = json.loads((tmp_path / "185-tagger.pruned" / "manifest.json").read_text())
    program = tmp_path / "185-tagger.pruned" / manifest_said["program"]["file"]
    assert manifest_said["program"]["sha256"] == hashlib.sha256(program.read_bytes()).hexdigest()


def test_checking_says_what_would_go_and_writes_nothing(model, command, tmp_path):
    done = command("prune-program", model("185-tagger"), "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["cut", "lookup_table"],
        ["stays", "lookup_table"],
    ]
    done = command("prune-program", tmp_path / "185-tagger", "--check", "--json", "--min-rows", 5000)
    assert done.returncode == 1
    assert [(said["table"], said["is_cut"]) for said in json.loads(done.stdout)] == [
        ("word_emb", False),
        ("mark_emb", False),
    ]
    done = command("prune-program", model("331-conv"), "--check")
    assert (done.returncode, done.stdout) == (1, "  no lookups\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["185-tagger", "331-conv"]


def test_a_full_disk_leaves_nothing(model, tmp_path):
    """Every file the tool writes is cut off at 8 KiB, which the kernel reports as it does a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from trainer_tools.prune_program import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, str(model("331-ctr")), "--verify", "0"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("prune-program: ")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["331-ctr"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lines", "x"], "--lines: found a Paddle program, expected a torch.export program"),
        (["--verify", "-1"], "--verify: found -1, expected 0 or more"),
        (["--min-rows", "-1"], "--min-rows: found -1, expected 0 or more"),
        (["--vocabulary", "t"], "--vocabulary: found 't', expected TABLE=FILE"),
        (
            ["--keep", "nobody"],
            "--keep: found 'nobody', expected a lookup or table: SparseFeatFactors, embedding_0.tmp_0",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(model, command, flags, message):
    done = command("prune-program", model("331-ctr"), *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"prune-program: {message}")
    assert done.stderr.count("\n") == 1


def test_without_paddle_nothing_is_proven_and_the_report_says_so(model, tmp_path, monkeypatch):
    monkeypatch.delenv("PADDLE_PYTHON", raising=False)
    report = prune(model("331-ctr"), tmp_path / "out")
    assert report.compared == 0
    assert "proof  none: nothing was compared (no Paddle here: --paddle PYTHON, one that has it)" in str(report)


def test_a_python_without_paddle_is_said_to_be_one(model, tmp_path, command):
    done = command("prune-program", model("331-ctr"), "--paddle", shutil.which("python3"))
    assert done.returncode == 1
    assert "proof: found Paddle could not run ctr.pdmodel (exit 1: ModuleNotFoundError" in done.stderr
    assert not (tmp_path / "331-ctr.pruned").exists()


# ---- the proof ----

STAND_IN = """
import importlib.util, pathlib, sys, types
import numpy as np
spec = importlib.util.spec_from_file_location("interpreter", {here!r})
interpreter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interpreter)

class Config:
    def __init__(self, program, parameters=None):
        self.place = pathlib.Path(program).parent if parameters else pathlib.Path(program)
    def __getattr__(self, name):
        return lambda *args: None

class Predictor:
    def __init__(self, place):
        self.program, self.inputs, self.lods = interpreter.paddle.load(place), {{}}, {{}}
    def get_input_handle(self, name):
        return types.SimpleNamespace(
            copy_from_cpu=lambda array: self.inputs.update({{name: array}}),
            set_lod=lambda lod: self.lods.update({{name: lod[-1]}}),
        )
    def run(self):
        self.outputs = interpreter.run(self.program, self.inputs, self.lods)
    def get_output_handle(self, name):
        lod = [list(map(int, self.lods[name]))] if name in self.lods else []
        return types.SimpleNamespace(copy_to_cpu=lambda: self.outputs[name], lod=lambda: lod)

def create_predictor(config):
    return Predictor(config.place)
"""


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
    """This Python, with the interpreter above behind the part of Paddle's API that the proof uses."""
    place = tmp_path_factory.mktemp("stand-in")
    (place / "paddle").mkdir()
    (place / "paddle" / "__init__.py").touch()
    (place / "paddle" / "inference.py").write_text(STAND_IN.format(here=__file__))
    monkeypatch.setenv("PYTHONPATH", f"{place}:{ROOT}:{ROOT / 'tests' / 'support'}")
    return sys.executable


@pytest.mark.parametrize("name", ["331-jit", "185-lod"])
def test_the_proof_runs_original_and_pruned_on_the_same_ids(model, tmp_path, stand_in, name):
    report = prune(model(name), tmp_path / "out", Options(verify_samples=20, paddle_python=stand_in))
    assert (report.compared, report.largest_difference) == (20, 0)
    assert "on 20 samples: largest difference 0" in str(report)


@pytest.mark.parametrize("wrong", [lambda rows: rows[::-1], lambda rows: rows * np.nan])
def test_a_wrong_row_shows_in_the_proof(model, tmp_path, stand_in, monkeypatch, wrong):
    real = LocalCube.rows
    monkeypatch.setattr(LocalCube, "rows", lambda *args: real(*args)._replace(rows=wrong(real(*args).rows)))
    with pytest.raises(
        DataCorrupt, match=r"proof: found outputs that differ by .*, expected at most 1e-06: nothing was"
    ):
        prune(model("331-ctr"), tmp_path / "out", Options(verify_samples=20, paddle_python=stand_in))
    assert [p.name for p in tmp_path.iterdir()] == ["331-ctr"]


# ---- with Paddle ----


@needs_paddle
@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod", "185-tagger", "185-train"])
def test_paddle_answers_the_same_to_the_bit(model, tmp_path, name):
    fetch = ["assign_0.tmp_0"] if name == "185-train" else []
    report = prune(model(name), tmp_path / "out", Options(fetch=fetch, verify_samples=64))
    assert (report.compared, report.largest_difference) == (64, 0)
