"""prune-program on ONNX programs: made by hand, exported by torch, quantised by onnxruntime, which proves each cut."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import taken
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import quantize_dynamic
from places import ROOT
from pruned_models import assert_serves, served

from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from trainer_tools import manifest, proof
from trainer_tools.programs import onnx_file, onnx_graph, onnx_program
from trainer_tools.programs.program import Rules, decide
from trainer_tools.prune_program import prune, survey
from trainer_tools.pruning import Options

ROWS, DIM = 2000, 4
TABLE = np.random.default_rng(1).standard_normal((ROWS, DIM)).astype("f4")
QUICK = Options(verify_samples=0)
SAMPLES = sorted(os.environ.get("ONNX_SAMPLES", "").split())
LOOK = helper.make_node("Gather", ["t", "ids"], ["e"])
SUM = helper.make_node("ReduceSum", ["e"], ["y"], keepdims=0)


def value(name, dims, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, dims)


IDS = value("ids", ["n", 3], TensorProto.INT64)


def model_of(nodes, tensors, inputs=(IDS,), outputs=("y",), opset=17, ir_version=8, **more):
    """A program. tensors: arrays by name, initializers; outputs of any type and shape, by name."""
    graph = helper.make_graph(
        nodes,
        "g",
        list(inputs),
        [o if isinstance(o, onnx.ValueInfoProto) else value(o, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **more)


def made(directory, *args, outside=None, **more):
    """The same as the one file of a directory; outside: keyword arguments of onnx's own writer of external data."""
    directory.mkdir(exist_ok=True)
    model = model_of(*args, **more)
    if outside is not None:
        onnx.save_model(model, directory / "m.onnx", save_as_external_data=True, size_threshold=0, **outside)
    else:
        onnx.save_model(model, directory / "m.onnx")
    return directory


def pruned(place, tmp_path, **options):
    """Prune, prove and serve; the report, the manifest, and the program that is left."""
    report = prune(place, tmp_path / "out", Options(**options))
    assert_serves(tmp_path / "out")
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    return report, said, onnx_program.load(tmp_path / "out" / "program")


def rows_of(tmp_path, table):
    return np.load(tmp_path / "out" / "rows" / table / "rows.npy")


def bytes_of(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def reasons(place, **rules):
    return [(c.lookup.name, c.is_cut, c.reason) for c in survey(place, Options(rules=Rules(**rules)))]


# ---- what is cut ----


def test_a_lookup_becomes_an_input_and_its_table_rows(tmp_path):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    report, said, program = pruned(place, tmp_path)
    assert (report.compared, report.largest_difference, report.largest_ulps) == (256, 0, 0)
    assert report.ops == (2, 1)
    assert report.candidates[0].reason == "2,000 rows of 4"
    assert [(t.name, t.datatype, t.shape) for t in program.inputs()] == [("e", "FP32", [-1, 3, DIM])]
    assert program.dims("e") == ["n", 3, DIM]
    assert not program.model.graph.initializer
    assert np.array_equal(rows_of(tmp_path, "t"), TABLE)
    assert np.array_equal(
        LocalCube(tmp_path / "out/cube").rows("t", None, np.arange(ROWS, dtype=np.uint64)).rows, TABLE
    )
    (lookup,) = said.lookups
    assert (said.name, said.sign, said.inputs, [t.name for t in said.outputs]) == ("m", "none", [], ["y"])
    assert (lookup.keys, lookup.text, lookup.lengths, lookup.pooling) == ("ids", "ids.text", None, "none")
    assert (lookup.feed, lookup.feed_shape, lookup.padding) == ("e", [-1, 3, DIM], None)
    file = tmp_path / "out" / "program" / "m.onnx"
    assert (said.program.file, said.program.format, said.program.parameters) == ("program/m.onnx", "onnx", None)
    assert said.program.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted(p.name for p in file.parent.iterdir()) == ["m.onnx"]


def test_an_id_outside_the_table_reads_zeros(tmp_path):
    """ONNX counts negative ids from the end; a cube has no such key."""
    prune(made(tmp_path / "m", [LOOK, SUM], {"t": TABLE}), tmp_path / "out", QUICK)
    keys = np.array([-1, -ROWS, ROWS, ROWS - 1]).astype(np.uint64)
    rows = LocalCube(tmp_path / "out/cube").rows("t", None, keys).rows
    assert np.array_equal(rows, np.concatenate([np.zeros((3, DIM), "f4"), TABLE[-1:]]))


ARRANGED = {
    "Cast": ([helper.make_node("Cast", ["ids"], ["p"], to=TensorProto.INT32)], [-1, 3]),
    "Concat": ([helper.make_node("Concat", ["ids", "more", "ids"], ["p"], axis=1)], [-1, 9]),
    "Flatten": ([helper.make_node("Flatten", ["ids"], ["p"], axis=1)], [-1, 3]),
    "Gather": ([helper.make_node("Gather", ["ids", "one"], ["p"], axis=1)], [-1, 1]),
    "Identity": ([helper.make_node("Identity", ["ids"], ["p"])], [-1, 3]),
    "Reshape": ([helper.make_node("Reshape", ["ids", "three"], ["p"])], [-1, 3]),
    "Slice": ([helper.make_node("Slice", ["ids", "one", "two", "one"], ["p"])], [-1, 1]),
    "Split": ([helper.make_node("Split", ["ids", "parts"], ["q", "p"], axis=1)], [-1, 2]),
    "Squeeze": (
        [helper.make_node("Gather", ["ids", "one"], ["q"], axis=1), helper.make_node("Squeeze", ["q", "one"], ["p"])],
        [-1],
    ),
    "Transpose": ([helper.make_node("Transpose", ["ids"], ["p"], perm=[0, 1])], [-1, 3]),
    "Unsqueeze": ([helper.make_node("Unsqueeze", ["ids", "one"], ["p"])], [-1, 1, 3]),
    "reshaped by what is computed": (
        [helper.make_node("Shape", ["ids"], ["s"]), helper.make_node("Reshape", ["ids", "s"], ["p"])], [-1, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ARRANGED)
def test_ids_that_ops_only_move_about_are_an_input_of_the_request_as_arranged(tmp_path, how):
    nodes, shape = ARRANGED[how]
    constants = {
        "one": np.array([1]), "two": np.array([2]), "three": np.array([-1, 3]), "parts": np.array([1, 2]), "t": TABLE,
    }  # fmt: skip
    look = helper.make_node("Gather", ["t", "p"], ["e"])
    inputs = [IDS, *([value("more", ["n", 3], TensorProto.INT64)] if how == "Concat" else [])]
    place = made(tmp_path / "m", [*nodes, look, SUM], constants, inputs)
    report, said, program = pruned(place, tmp_path, verify_samples=20)
    assert report.largest_difference == 0
    arranged = {"Concat": ["ids", "more"], "Cast": [], "Identity": []}.get(how, ["ids"])
    told = f"; ids arranged from {', '.join(arranged)}" if arranged else ""
    assert report.candidates[0].reason == f"2,000 rows of 4{told}"
    assert (said.lookups[0].keys, said.lookups[0].arranged_from) == ("p" if arranged else "ids", arranged)
    assert said.lookups[0].feed_shape == [*shape, DIM]
    assert [t.name for t in program.inputs()] == ["e"]


OTHERWISE = {  # inputs, what is done to them, and why nobody could serve it
    "all in one": ([IDS], [helper.make_node("Flatten", ["ids"], ["p"], axis=0)],
                   r"its ids have the fixed shape \[1, \?\].*: export with a name for the first dimension, dynamic_ax"),
    "one after another": ([IDS], [helper.make_node("Reshape", ["ids", "flat"], ["p"])],
                          "its ids are as many as 33 for 11 samples, and not one after another"),
    "turned": ([IDS], [helper.make_node("Transpose", ["ids"], ["p"], perm=[1, 0])],
               r"its ids have the fixed shape \[3, n\]"),
    "below each other": ([IDS], [helper.make_node("Concat", ["ids", "ids"], ["p"], axis=0)], "22 for 11 samples"),
    "a fixed number of samples": ([value("ids", [2, 3], TensorProto.INT64), value("x", ["n"])], [],
                                  r"the fixed shape \[2, 3\]"),
    "a single one": ([value("ids", [], TensorProto.INT64)], [], "its ids are a single number"),
    "time first": ([value("ids", ["time", "n"], TensorProto.INT64), value("x", ["n"])], [],
                   r"shape \[time, samples\], in which samples do not come first"),
}  # fmt: skip


@pytest.mark.parametrize("how", OTHERWISE)
def test_ids_that_do_not_lie_sample_by_sample_stay_and_the_report_says_why(tmp_path, how):
    inputs, nodes, why = OTHERWISE[how]
    look = helper.make_node("Gather", ["t", "p" if nodes else "ids"], ["e"])
    more = [helper.make_node("Identity", ["x"], ["z"])] if len(inputs) > 1 else []
    outputs = [*([value("z", ["n"])] if more else []), "y"]
    place = made(tmp_path / "m", [*nodes, look, SUM, *more], {"t": TABLE, "flat": np.array([-1])}, inputs, outputs)
    ((name, is_cut, reason),) = reasons(place)
    assert (name, is_cut) == ("e", False)
    assert re.search(why, reason)


@pytest.mark.parametrize("sizes", [[1, "time"], [2, 3]])
def test_a_program_of_a_fixed_number_of_samples_is_served_as_it_is(tmp_path, sizes):
    """As taggers are often exported: for a sentence at a time, of any length."""
    inputs = [value("ids", sizes, TensorProto.INT64), value("x", [sizes[0], 4])]
    nodes = [LOOK, helper.make_node("ReduceSum", ["e", "along"], ["s"], keepdims=0)]
    nodes += [helper.make_node("Add", ["s", "x"], ["y"])]
    place = made(
        tmp_path / "m", nodes, {"t": TABLE, "along": np.array([1])}, inputs, [value("y", [sizes[0], DIM])]
    )  # fmt: skip
    report, said, program = pruned(place, tmp_path, verify_samples=20)
    assert (report.compared >= 20, report.largest_difference) == (True, 0)
    samples = "1 sample" if sizes[0] == 1 else "2 samples"
    assert f"takes {samples} at a time, and no requests are merged: export it with" in report.candidates[0].reason
    assert said.lookups[0].feed_shape == [sizes[0], -1 if sizes[1] == "time" else 3, DIM]
    assert [t.name for t in program.inputs()] == ["x", "e"]


@pytest.mark.parametrize(
    ("op", "given", "attributes"),
    [("Squeeze", ["zero"], {}), ("Reshape", ["all"], {}), ("Transpose", [], {"perm": [1, 0]})],
)
def test_ids_that_no_longer_begin_with_the_fixed_number_of_samples_stay(tmp_path, op, given, attributes):
    """Their words would count as samples of a request."""
    nodes = [
        helper.make_node(op, ["ids", *given], ["words"], **attributes),
        helper.make_node("Gather", ["t", "words"], ["e"]),
        helper.make_node("ReduceMax", ["e"], ["y"], keepdims=0),
    ]
    tensors = {"t": TABLE, "zero": np.array([0]), "all": np.array([-1])}
    inputs = [value("ids", [1, "length"], TensorProto.INT64)]
    place = made(tmp_path / "m", nodes, tensors, inputs, [value("y", [])])
    (candidate,) = survey(place)
    assert not candidate.is_cut
    assert "its ids, words, begin with a size that varies" in candidate.reason


def test_a_mark_for_each_word_of_one_sentence_is_served_a_request_at_a_time(tmp_path):
    """As taggers put it out that are exported for one sentence: no size of the output counts samples."""
    inputs = [value("ids", [1, 2, "length"], TensorProto.INT64)]
    nodes = [
        helper.make_node("Gather", ["ids", "first"], ["words"], axis=1),
        helper.make_node("Gather", ["ids", "second"], ["kinds"], axis=1),
        helper.make_node("Gather", ["t", "words"], ["e"]),
        helper.make_node("Gather", ["u", "kinds"], ["f"]),
        helper.make_node("Mul", ["e", "f"], ["p"]),
        helper.make_node("ReduceSum", ["p", "ends"], ["y"], keepdims=0),
    ]
    tensors = {
        "t": TABLE,
        "u": TABLE[::-1].copy(),
        "first": np.int64(0),
        "second": np.int64(1),
        "ends": np.array([0, 2]),
    }
    place = made(tmp_path / "m", nodes, tensors, inputs, [value("y", ["length"])])
    report, said, _ = pruned(place, tmp_path, verify_samples=20)
    assert (report.compared, report.largest_difference) == (20, 0)
    assert [t.shape for t in said.outputs] == [[-1]]
    original = onnxruntime.InferenceSession(place / "m.onnx", providers=["CPUExecutionProvider"])
    sentences = [np.random.default_rng(n).integers(0, ROWS, (1, 2, n)) for n in (7, 1, 30)]
    lane, answers = served(
        tmp_path / "out",
        *({"words": s[:, 0].astype(np.uint64), "kinds": s[:, 1].astype(np.uint64)} for s in sentences),
    )
    assert not lane.batcher.limits.is_on
    for sentence, answer in zip(sentences, answers, strict=True):
        (marks,) = original.run(None, {"ids": sentence})
        assert marks.shape == answer.outputs["y"].shape == sentence.shape[2:]
        assert np.allclose(answer.outputs["y"], marks, rtol=1e-5, atol=1e-6)


def test_words_that_count_as_samples_and_look_at_their_neighbours_are_served_a_request_at_a_time(tmp_path):
    """A tagger of [length, 2]: nothing tells words from samples but that answers change in company."""
    nodes = [
        LOOK,
        helper.make_node("ReduceSum", ["e", "inner"], ["s"], keepdims=0),
        helper.make_node("CumSum", ["s", "nought"], ["y"]),
    ]
    tensors = {"t": TABLE, "inner": np.array([1, 2]), "nought": np.int64(0)}
    inputs = [value("ids", ["length", 2], TensorProto.INT64)]
    place = made(tmp_path / "m", nodes, tensors, inputs, [value("y", ["length"])])
    assert pruned(place, tmp_path)[0].largest_difference == 0
    sentences = [np.random.default_rng(n).integers(0, ROWS, (n, 2)) for n in (5, 2, 9)]
    lane, answers = served(tmp_path / "out", *({"ids": ids.astype(np.uint64)} for ids in sentences))
    assert not lane.batcher.limits.is_on
    for ids, answer in zip(sentences, answers, strict=True):
        assert np.allclose(answer.outputs["y"], np.cumsum(TABLE[ids].sum((1, 2))), rtol=1e-4, atol=1e-4)


def test_an_output_in_which_samples_do_not_come_first_is_named_with_its_shape_and_the_way_out(tmp_path):
    turn = helper.make_node("Transpose", ["e"], ["y"], perm=[1, 0, 2])
    outputs = [value("y", ["time", "n", DIM])]
    inputs = [value("ids", ["n", "time"], TensorProto.INT64), value("x", ["n", 3])]
    same = helper.make_node("Identity", ["x"], ["z"])
    more = [*outputs, value("z", ["n", 3]), value("w", ["n", 3])]
    nodes = [LOOK, turn, same, helper.make_node("Identity", ["x"], ["w"])]
    place = made(tmp_path / "m", nodes, {"t": TABLE}, inputs, more)
    ((_, is_cut, reason),) = reasons(place)
    assert not is_cut
    assert reason.startswith("output 'y' has shape [time, samples, 4], in which samples do not come first: export it")
    assert "--fetch" in reason


def test_a_program_that_runs_on_one_sample_whatever_it_says_is_told_how_to_say_so(tmp_path):
    """Exporters write sizes of their example into programs whose inputs may have any."""
    shape = helper.make_node("Reshape", ["e", "shape"], ["y"])
    inputs = [value("ids", ["batch", 3], TensorProto.INT64)]
    tensors = {"t": TABLE, "shape": np.array([1, 3 * DIM])}
    place = made(tmp_path / "m", [LOOK, shape], tensors, inputs, [value("y", [1, 3 * DIM])])
    with pytest.raises(BadData, match=r"one sample only, though .*make_dynamic_shape_fixed --dim_param batch --dim_v"):
        prune(place, tmp_path / "out", Options(verify_samples=20))
    command = [sys.executable, "-m", "onnxruntime.tools.make_dynamic_shape_fixed", "--dim_param", "batch"]
    (tmp_path / "one").mkdir()
    files = [place / "m.onnx", tmp_path / "one/m.onnx"]
    subprocess.run([*command, "--dim_value", "1", *files], check=True, capture_output=True)
    assert pruned(tmp_path / "one", tmp_path, verify_samples=20)[0].largest_difference == 0


def test_ids_that_are_hashed_into_the_table_stay(tmp_path):
    """Every id beyond the table has a row of its own then, and would read zeros."""
    nodes = [helper.make_node("Mod", ["ids", "rows"], ["p"]), helper.make_node("Gather", ["t", "p"], ["e"]), SUM]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "rows": np.array([len(TABLE)])})
    assert reasons(place) == [("e", False, "its ids are computed by op Mod (p)")]


ADDED = {  # what is done to the ids, the columns and the constants of the request, and the name of what it holds
    "to each column": ([helper.make_node("Add", ["ids", "starts"], ["p"])], [0, 500, 1500], "ids"),
    "from the other side": ([helper.make_node("Add", ["starts", "ids"], ["p"])], [0, 500, 1500], "ids"),
    "to all": ([helper.make_node("Add", ["ids", "seven"], ["p"])], [7], "ids"),
    "less": ([helper.make_node("Sub", ["ids", "seven"], ["p"])], [-7], "ids"),
    "twice": (
        [helper.make_node("Add", ["ids", "starts"], ["q"]), helper.make_node("Sub", ["q", "seven"], ["p"])],
        [-7, 493, 1493], "ids",
    ),
    "and cast": (
        [helper.make_node("Add", ["ids", "starts"], ["q"]), helper.make_node("Cast", ["q"], ["p"], to=6)],
        [0, 500, 1500], "p",
    ),
    "and turned about": (
        [helper.make_node("Add", ["ids", "starts"], ["q"]), helper.make_node("Gather", ["q", "last"], ["p"], axis=1)],
        [1500, 0], "p",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ADDED)
def test_constants_that_are_added_to_ids_are_the_lookups(tmp_path, how):
    """One table of all fields, in which the rows of each begin where those of the one before it end."""
    nodes, added, keys = ADDED[how]
    constants = {"t": TABLE, "starts": np.array([0, 500, 1500]), "seven": np.int64(7), "last": np.array([2, 0])}
    place = made(tmp_path / "m", [*nodes, helper.make_node("Gather", ["t", "p"], ["e"]), SUM], constants)
    report, said, program = pruned(place, tmp_path)
    assert (report.compared, report.largest_difference) == (256, 0)
    (lookup,) = said.lookups
    assert (lookup.keys, lookup.added) == (keys, added)
    assert report.candidates[0].reason.endswith(f"; {', '.join(map(str, added))} added to ids")
    assert [t.name for t in program.inputs()] == ["e"]
    np.save(tmp_path / "keys.npy", np.random.default_rng(1).integers(0, 2**64, ROWS, dtype=np.uint64))
    report, said, _ = pruned(place, tmp_path, vocabularies={"t": tmp_path / "keys.npy"})
    assert (report.largest_difference, said.lookups[0].added) == (0, [])


def test_lookups_to_whose_ids_other_constants_are_added_hold_keys_of_their_own(tmp_path):
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["e"]),
        helper.make_node("Add", ["ids", "seven"], ["p"]),
        helper.make_node("Gather", ["t", "p"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["y"]),
    ]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "seven": np.int64(7)}, outputs=[value("y", ["n", 3, DIM])])
    report, said, _ = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [(k.keys, k.added) for k in said.lookups] == [("ids", []), ("p", [])]


@pytest.mark.parametrize("constant", [np.arange(5)[:, None], np.arange(15).reshape(5, 3)])
def test_constants_that_differ_from_sample_to_sample_stay(tmp_path, constant):
    add = helper.make_node("Add", ["ids", "c"], ["p"])
    place = made(tmp_path / "m", [add, helper.make_node("Gather", ["t", "p"], ["e"]), SUM], {"t": TABLE, "c": constant})
    ((_, is_cut, reason),) = reasons(place)
    assert not is_cut
    assert "its ids" in reason


def negative_from_the_end(kind):
    """As JAX writes it, and as Keras does through tf2onnx; and ids that are only kept within the table."""
    below = [helper.make_node("Less", ["ids", "zero"], ["b"]), helper.make_node("Add", ["ids", "rows"], ["w"])]
    if kind == "where":
        return [*below, helper.make_node("Where", ["b", "w", "ids"], ["p"])]
    if kind == "clip":
        return [helper.make_node("Clip", ["ids", "zero", "last"], ["p"])]
    return [
        *below,
        helper.make_node("Cast", ["b"], ["b1"], to=TensorProto.INT64),
        helper.make_node("Not", ["b"], ["c"]),
        helper.make_node("Cast", ["c"], ["c1"], to=TensorProto.INT64),
        helper.make_node("Mul", ["b1", "w"], ["one"]),
        helper.make_node("Mul", ["c1", "ids"], ["other"]),
        helper.make_node("Add", ["one", "other"], ["p"]),
    ]


@pytest.mark.parametrize("kind", ["where", "sum", "clip"])
@pytest.mark.parametrize("rows", [ROWS, ROWS - 1])
def test_arithmetic_that_leaves_every_id_of_the_table_as_it_is_stands_in_no_ones_way(tmp_path, kind, rows):
    constants = {"t": TABLE, "zero": np.int64(0), "rows": np.int64(ROWS), "last": np.int64(rows - 1)}
    nodes = [*negative_from_the_end(kind), helper.make_node("Gather", ["t", "p"], ["e"]), SUM]
    place = made(tmp_path / "m", nodes, constants)
    if kind == "clip" and rows < ROWS:  # the last row would answer under another id
        assert reasons(place) == [("e", False, "its ids are computed by op Clip (p)")]
    else:
        report, said, _ = pruned(place, tmp_path, verify_samples=50)
        assert report.largest_difference == 0
        assert (said.lookups[0].keys, said.lookups[0].arranged_from) == ("ids", [])
        told = {
            "where": "ops Add, Less, Where gave ids below 0 rows from the end: they read zeros now",
            "sum": "ops Add, Less, Mul, Not gave ids below 0 rows from the end: they read zeros now",
            "clip": "op Clip gave ids below 0 row 0 and ids from 2,000 row 1,999: they read zeros now",
        }
        assert report.candidates[0].reason == f"2,000 rows of 4; {told[kind]}"
        assert report.largest_outside > 0
        outside = f"; on ids outside the tables, which read zeros now, {report.largest_outside:g}"
        assert outside in str(report)
        as_json = json.loads(report.json())
        assert as_json["proof"]["largest_outside"] == report.largest_outside
        assert told[kind] in as_json["lookups"][0]["reason"]


@pytest.mark.parametrize("how", ["turned about", "added to"])
def test_what_is_done_to_ids_outside_before_a_request_holds_them_is_told(tmp_path, how):
    """The request holds ids as the program arranges them, so nothing changes if it does that too."""
    nodes = [helper.make_node("Clip", ["ids", "zero", "last"], ["p"])]
    then = [helper.make_node("Transpose", ["p"], ["q"], perm=[0, 1])]
    if how == "added to":
        then = [helper.make_node("Add", ["p", "seven"], ["q"])]
    look = helper.make_node("Gather", ["t", "q"], ["e"])
    tensors = {"t": TABLE, "zero": np.int64(0), "last": np.int64(ROWS - 1), "seven": np.int64(7)}
    report, said, _ = pruned(made(tmp_path / "m", [*nodes, *then, look, SUM], tensors), tmp_path, verify_samples=20)
    told = "op Clip gave ids below 0 row 0 and ids from 2,000 row 1,999, as whoever arranges the ids has to do"
    added = "; 7 added to ids" if how == "added to" else ""
    assert report.candidates[0].reason == f"2,000 rows of 4; ids arranged from ids{added}; {told}"
    assert said.lookups[0].keys != "ids"
    assert report.largest_outside is None


def test_ids_that_are_clipped_may_be_floats(tmp_path):
    nodes = [helper.make_node("Cast", ["ids"], ["q"], to=TensorProto.INT64)]
    nodes += [
        helper.make_node("Clip", ["q", "zero", "last"], ["p"]),
        helper.make_node("Gather", ["t", "p"], ["e"]),
        SUM,
    ]
    tensors = {"t": TABLE, "zero": np.int64(0), "last": np.int64(ROWS - 1)}
    report, said, _ = pruned(made(tmp_path / "m", nodes, tensors, [value("ids", ["n", 3])]), tmp_path)
    assert (report.largest_difference, said.lookups[0].keys) == (0, "ids")
    assert report.largest_outside > 0


SCALES = np.random.default_rng(2).random(ROWS).astype("f4") + 0.1
EIGHT = np.random.default_rng(3).integers(-128, 128, (ROWS, DIM)).astype("i1")
BEFORE = {  # how a table is stored, the ops before the lookup, and the rows
    "identity": (TABLE, [helper.make_node("Identity", ["s"], ["t"])], {}, TABLE),
    "cast": (TABLE.astype("f2"), [helper.make_node("Cast", ["s"], ["t"], to=1)], {}, TABLE.astype("f2").astype("f4")),
    "double": (
        TABLE.astype("f8"), [helper.make_node("Cast", ["s"], ["t"], to=1)], {}, TABLE,
    ),
    "scaled": (TABLE, [helper.make_node("Mul", ["c", "s"], ["t"])], {"c": np.float32(0.3)}, np.float32(0.3) * TABLE),
    "divided by element": (
        TABLE, [helper.make_node("Div", ["s", "c"], ["t"])], {"c": SCALES[:DIM]}, TABLE / SCALES[:DIM],
    ),
    "subtracted from a row": (
        TABLE, [helper.make_node("Sub", ["c", "s"], ["t"])], {"c": SCALES[:, None]}, SCALES[:, None] - TABLE,
    ),
    "dequantised": (
        EIGHT, [helper.make_node("DequantizeLinear", ["s", "c", "z"], ["t"])],
        {"c": np.float32(0.01), "z": np.int8(-3)}, (EIGHT.astype("i4") + 3).astype("f4") * np.float32(0.01),
    ),
    "dequantised by row": (
        EIGHT, [helper.make_node("DequantizeLinear", ["s", "c"], ["t"], axis=0)], {"c": SCALES},
        EIGHT.astype("f4") * SCALES[:, None],
    ),
    "dequantised by element": (
        EIGHT, [helper.make_node("DequantizeLinear", ["s", "c", "z"], ["t"], axis=-1)],
        {"c": SCALES[:DIM], "z": np.arange(DIM, dtype="i1")},
        (EIGHT.astype("i4") - np.arange(DIM)).astype("f4") * SCALES[:DIM],
    ),
    "dequantised, then scaled": (
        EIGHT,
        [helper.make_node("DequantizeLinear", ["s", "c"], ["d"]), helper.make_node("Mul", ["d", "f"], ["t"])],
        {"c": np.float32(0.01), "f": np.float32(3)}, EIGHT.astype("f4") * np.float32(0.01) * np.float32(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BEFORE)
def test_rows_are_computed_where_the_table_is_stored_otherwise(tmp_path, how):
    stored, nodes, constants, rows = BEFORE[how]
    place = made(tmp_path / "m", [*nodes, LOOK, SUM], {"s": stored, **constants})
    report, said, program = pruned(place, tmp_path, verify_samples=50)
    assert report.largest_difference == 0
    assert np.array_equal(rows_of(tmp_path, "s"), rows)
    assert list(said.tables) == ["s"]
    assert [node.op_type for node in program.model.graph.node] == ["ReduceSum"]
    assert not program.model.graph.initializer


AFTER = {  # how a table is stored, the ops behind the lookup, and the rows
    "dequantised": (
        EIGHT, [helper.make_node("DequantizeLinear", ["q", "c", "z"], ["e"])],
        {"c": np.float32(0.01), "z": np.int8(-3)}, (EIGHT.astype("i4") + 3).astype("f4") * np.float32(0.01),
    ),
    "dequantised by element": (
        EIGHT, [helper.make_node("DequantizeLinear", ["q", "c"], ["e"], axis=2)], {"c": SCALES[:DIM]},
        EIGHT.astype("f4") * SCALES[:DIM],
    ),
    "cast": (TABLE.astype("f8"), [helper.make_node("Cast", ["q"], ["e"], to=1)], {}, TABLE),
}  # fmt: skip


@pytest.mark.parametrize("how", AFTER)
def test_what_makes_floats_of_the_rows_found_goes_with_the_lookup(tmp_path, how):
    stored, nodes, constants, rows = AFTER[how]
    look = helper.make_node("Gather", ["s", "ids"], ["q"])
    report, _, program = pruned(made(tmp_path / "m", [look, *nodes, SUM], {"s": stored, **constants}), tmp_path)
    assert report.largest_difference == 0
    assert report.candidates[0].lookup.op == f"Gather+{nodes[-1].op_type}"
    assert np.array_equal(rows_of(tmp_path, "s"), rows)
    assert [node.op_type for node in program.model.graph.node] == ["ReduceSum"]


def test_rows_of_bytes_that_the_program_computes_with_are_fed_as_floats_and_cast_back(tmp_path):
    weight = np.random.default_rng(4).integers(-9, 9, (DIM, 2)).astype("i1")
    nodes = [
        helper.make_node("Gather", ["s", "ids"], ["q"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"]),
        helper.make_node("DequantizeLinear", ["q", "c", "z"], ["f"]),
        helper.make_node("Cast", ["m"], ["g"], to=1),
        helper.make_node("ReduceSum", ["f"], ["h"], keepdims=0),
        helper.make_node("Add", ["g", "h"], ["y"]),
    ]
    stored = (EIGHT.astype("i2") + 128).astype("u1")
    place = made(tmp_path / "m", nodes, {"s": stored, "w": weight, "c": np.float32(0.1), "z": np.uint8(3)})
    report, _, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [(t.name, t.datatype, t.shape) for t in program.inputs()] == [("q_float", "FP32", [-1, 3, DIM])]
    assert np.array_equal(rows_of(tmp_path, "s"), stored.astype("f4"))


def test_rows_of_float16_feed_a_program_of_float16(tmp_path):
    place = made(
        tmp_path / "m", [LOOK, SUM], {"t": TABLE.astype("f2")}, outputs=[value("y", None, TensorProto.FLOAT16)]
    )
    report, _, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [(t.name, t.datatype) for t in program.inputs()] == [("e", "FP16")]


def test_rows_of_bfloat16_are_exact_as_float32(tmp_path):
    bits = (TABLE.view("<u4") >> 16).astype("<u2")
    nodes = [helper.make_node("Cast", ["s"], ["t"], to=1), LOOK, SUM]
    model = model_of(nodes, {"s": TABLE})
    model.graph.initializer[0].CopyFrom(
        TensorProto(name="s", data_type=TensorProto.BFLOAT16, dims=[ROWS, DIM], raw_data=bits.tobytes())
    )
    (tmp_path / "m").mkdir()
    onnx.save_model(model, tmp_path / "m" / "m.onnx")
    assert pruned(tmp_path / "m", tmp_path)[0].largest_difference == 0
    assert np.array_equal(rows_of(tmp_path, "s"), (bits.astype("<u4") << 16).view("<f4"))


def test_a_table_of_several_lookups_is_exported_once(tmp_path):
    nodes = [
        LOOK,
        helper.make_node("Gather", ["t", "more"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["y"]),
    ]
    place = made(tmp_path / "m", nodes, {"t": TABLE}, [IDS, value("more", ["n", 3], TensorProto.INT32)])
    report, said, _ = pruned(place, tmp_path)
    assert (report.largest_difference, report.rows) == (0, ROWS)
    assert [(k.keys, k.feed, k.table, k.slots[0].number) for k in said.lookups] == [
        ("ids", "e", "t", 0),
        ("more", "f", "t", 1),
    ]


def test_lookups_that_compute_other_rows_of_one_tensor_do_not_share_them(tmp_path):
    nodes = [
        LOOK,
        helper.make_node("Mul", ["t", "c"], ["u"]),
        helper.make_node("Gather", ["u", "ids"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["y"]),
    ]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "c": np.float32(2)})
    report, _, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [(c.is_cut, c.reason) for c in report.candidates] == [
        (True, "2,000 rows of 4; the table stays too, for other ops read it"),
        (False, "its rows are computed otherwise than those of another lookup of its table"),
    ]
    assert [t.name for t in program.inputs()] == ["ids", "e"]


def branch(table, name):
    """A body that looks up in a table of the graph around it."""
    nodes = [helper.make_node("Gather", [table, "ids"], [name]), helper.make_node("ReduceSum", [name], [f"{name}s"])]
    return helper.make_graph(nodes, name, [], [value(f"{name}s", None)])


def test_a_table_that_a_body_reads_stays_and_its_lookup_there_too(tmp_path):
    switch = helper.make_node("If", ["on"], ["z"], then_branch=branch("t", "a"), else_branch=branch("u", "b"))
    nodes = [LOOK, SUM, switch, helper.make_node("Add", ["y", "z"], ["x"])]
    inputs = [IDS, value("on", [], TensorProto.BOOL)]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "u": 2 * TABLE}, inputs, ["x"])
    report, _, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [(c.lookup.name, c.is_cut, c.reason) for c in report.candidates] == [
        ("e", True, "2,000 rows of 4; the table stays too, for other ops read it"),
        ("b", False, "it is inside a loop or a branch, op If (z)"),
        ("a", False, "it is inside a loop or a branch, op If (z)"),
    ]
    assert sorted(tensor.name for tensor in program.model.graph.initializer) == ["t", "u"]
    assert [t.name for t in program.inputs()] == ["ids", "on", "e"]


def test_functions_of_a_program_are_looked_into(tmp_path):
    function = helper.make_function(
        "mine",
        "Look",
        ["t", "i"],
        ["o"],
        [helper.make_node("Gather", ["t", "i"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [helper.make_node("Look", ["t", "ids"], ["e"], domain="mine"), SUM]
    model = model_of(nodes, {"t": TABLE}, functions=[function])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    (tmp_path / "m").mkdir()
    onnx.save_model(model, tmp_path / "m" / "m.onnx")
    assert pruned(tmp_path / "m", tmp_path)[0].largest_difference == 0


def test_small_tables_stay_unless_they_are_named(tmp_path):
    """A table of positions, which everybody's text models have."""
    nodes = [
        LOOK,
        helper.make_node("Gather", ["positions", "places"], ["p"]),
        helper.make_node("Add", ["e", "p"], ["y"]),
    ]
    inputs = [IDS, value("places", ["n", 3], TensorProto.INT64)]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "positions": TABLE[:512]}, inputs)
    assert reasons(place) == [
        ("e", True, "2,000 rows of 4"),
        ("p", False, "512 rows, fewer than --min-rows 1,000"),
    ]
    report, _, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [t.name for t in program.inputs()] == ["places", "e"]
    for rules, feeds in (({"min_rows": 0}, {"e", "p"}), ({"only": ["positions"]}, {"p"}), ({"keep": ["p"]}, {"e"})):
        report, said, _ = pruned(place, tmp_path, rules=Rules(**rules), verify_samples=9)
        assert {k.feed for k in said.lookups} == feeds
        assert report.largest_difference == 0


def test_initializers_that_old_programs_list_as_inputs_are_parameters(tmp_path):
    nodes = [LOOK, helper.make_node("Add", ["e", "b"], ["y"])]
    inputs = [IDS, value("t", [ROWS, DIM]), value("b", [DIM])]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "b": TABLE[0]}, inputs, opset=9, ir_version=3)
    assert [t.name for t in onnx_program.load(place).inputs()] == ["ids"]
    report, said, program = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [v.name for v in program.model.graph.input] == ["b", "e"]
    assert [t.name for t in program.inputs()] == ["e"]
    assert said.inputs == []


def test_fetch_says_what_the_outputs_are_and_the_rest_goes(tmp_path):
    nodes = [
        LOOK,
        helper.make_node("ReduceSum", ["e"], ["h"], keepdims=0),
        helper.make_node("Mul", ["h", "x"], ["y"]),
        helper.make_node("Gather", ["u", "ids"], ["f"]),
        helper.make_node("ReduceSum", ["f"], ["loss"], keepdims=0),
    ]
    place = made(tmp_path / "m", nodes, {"t": TABLE, "u": TABLE}, [IDS, value("x", [])], outputs=["y", "loss"])
    report, said, program = pruned(place, tmp_path, fetch=["h"])
    assert [t.name for t in said.outputs] == ["h"]
    assert [t.name for t in program.inputs()] == ["e"]
    assert (report.largest_difference, [c.lookup.name for c in report.candidates]) == (0, ["e"])
    with pytest.raises(BadData, match=r"--fetch: found 'nobody', expected a value whose type is known.*: y, loss"):
        prune(place, tmp_path / "other", Options(fetch=["nobody"]))


def test_a_lookup_that_is_an_output_is_an_input_too(tmp_path):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE}, outputs=["e", value("y", [])])
    report, said, _ = pruned(place, tmp_path)
    assert report.largest_difference == 0
    assert [t.name for t in said.outputs] == ["e", "y"]


def test_a_vocabulary_gives_the_keys_and_rows_of_zeros_may_be_absent(tmp_path):
    table = TABLE.copy()
    table[7] = 0
    keys = np.random.default_rng(1).integers(0, 2**64, ROWS, dtype=np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    place = made(tmp_path / "m", [LOOK, SUM], {"t": table})
    report, said, _ = pruned(place, tmp_path, vocabularies={"t": tmp_path / "keys.npy"}, drop_zero_rows=True)
    assert (report.rows, report.largest_difference) == (ROWS - 1, 0)
    assert np.array_equal(np.load(tmp_path / "out/rows/t/keys.npy"), np.delete(keys, 7))
    assert said.sign == "xxh64(text, seed=slot)"


def test_ids_that_something_else_reads_stay_an_input_beside_the_keys(tmp_path):
    """As a text model's, which masks by them."""
    nodes = [
        LOOK,
        helper.make_node("Cast", ["ids"], ["b"], to=TensorProto.BOOL),
        helper.make_node("Cast", ["b"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["w"]),
        helper.make_node("Mul", ["e", "w"], ["y"]),
    ]
    report, said, program = pruned(made(tmp_path / "m", nodes, {"t": TABLE, "last": np.array([2])}), tmp_path)
    assert report.largest_difference == 0
    assert [(t.name, t.datatype) for t in said.inputs] == [("ids", "INT64")]
    assert [k.keys for k in said.lookups] == ["ids.keys"]
    assert [t.name for t in program.inputs()] == ["ids", "e"]


@pytest.mark.parametrize(("row_format", "most"), [("f32", 0), ("f16", 1e-3), ("i8", 2e-2)])
def test_rows_of_another_format_are_measured_on_data(tmp_path, command, row_format, most):
    nodes = [LOOK, SUM, helper.make_node("ReduceMean", ["e"], ["mean"], axes=[1, 2], keepdims=0)]
    place = made(tmp_path / "m", nodes, {"t": TABLE}, outputs=["y", value("mean", ["n"])])
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "d.npz", ids=rng.integers(0, ROWS, (500, 3)), label=rng.integers(0, 2, 500))
    flags = ["--fetch", "mean", "--format", row_format, "--check", tmp_path / "d.npz", "--max-auc-loss", 0.1, "--json"]
    done = command("prune-program", place, *flags)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["accuracy"]
    assert said["samples"] == 500
    assert 0 <= said["largest_change"] <= most
    assert (said["largest_change"] == 0) == (row_format == "f32")


# ---- what stays ----


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([helper.make_node("Mod", ["ids", "k"], ["p"]), helper.make_node("Gather", ["t", "p"], ["e"])],
         "its ids are computed by op Mod (p)"),
        ([helper.make_node("Add", ["ids", "ids"], ["p"]), helper.make_node("Gather", ["t", "p"], ["e"])],
         "its ids are computed by op Add (p)"),
        ([helper.make_node("Cast", ["x"], ["p"], to=7), helper.make_node("ArgMax", ["x"], ["q"], axis=1),
          helper.make_node("Gather", ["t", "q"], ["e"])], "its ids are computed by op ArgMax (q)"),
        ([helper.make_node("Gather", ["t", "k2"], ["e"])], "its ids are constants, k2"),
        ([helper.make_node("Transpose", ["t"], ["u"]), helper.make_node("Gather", ["u", "k2"], ["e"])],
         "its table is computed by op Transpose"),
        ([helper.make_node("Gather", ["t", "k2"], ["e"], axis=1)], "it gathers along axis 1, not rows"),
        ([helper.make_node("Gather", ["cube", "ids"], ["e"])],
         "its table has shape [1000, 2, 2], not [rows, elements]"),
        ([helper.make_node("Gather", ["wide", "ids"], ["e"])], "its rows are FP64; a cube's are float32"),
        ([helper.make_node("Gather", ["long", "ids"], ["e"])], "its rows are INT64; a cube's are float32"),
        ([helper.make_node("GatherND", ["t", "k3"], ["e"])],
         "it finds elements by several numbers each, not rows by ids"),
        ([helper.make_node("GatherElements", ["t", "k3"], ["e"])], "it finds elements, not rows"),
    ],
)  # fmt: skip
def test_what_is_no_lookup_of_a_request_stays_and_the_report_says_why(tmp_path, nodes, why):
    tensors = {
        "t": TABLE, "cube": np.ones((1000, 2, 2), "f4"), "wide": np.ones((1000, 2)), "long": np.ones((1000, 2), "i8"),
        "k": np.int64(7), "k2": np.array([1, 2]), "k3": np.array([[0, 1]]),
    }  # fmt: skip
    last = helper.make_node("Identity", ["e"], ["y"])
    place = made(tmp_path / "m", [*nodes, last], tensors, [IDS, value("x", ["n", 4])])
    assert reasons(place, min_rows=0) == [("e", False, why)]
    with pytest.raises(BadData, match=r"m/m.onnx: found no lookup to cut: e stays: "):
        prune(place, tmp_path / "out", QUICK)
    with pytest.raises(BadData, match="--only, lookup e: found"):
        prune(place, tmp_path / "out", Options(rules=Rules(only=["e"])))
    assert not (tmp_path / "out").exists()


def test_shapes_that_are_gathered_are_no_lookups(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "k"], ["d"]),
        helper.make_node("Gather", ["x", "ids"], ["e"]),
        helper.make_node("Gather", ["bias", "ids"], ["b"]),
        helper.make_node("Cast", ["d"], ["y"], to=1),
    ]
    tensors = {"k": np.int64(0), "bias": TABLE[:, 0]}
    place = made(tmp_path / "m", nodes, tensors, [IDS, value("x", ["n", 4])], ["y", "e", "b"])
    assert reasons(place) == []


def test_a_program_without_lookups_is_refused_and_the_command_exits_1(tmp_path, command):
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    place = made(tmp_path / "m", [conv], {"w": np.ones((2, 3, 3, 3), "f4")}, [value("x", ["n", 3, 8, 8])])
    done = command("prune-program", place)
    assert done.returncode == 1
    assert "m.onnx: found no lookup to cut, expected one; a dense program is served as it is" in done.stderr
    done = command("prune-program", place, "--dry-run")
    assert (done.returncode, done.stdout) == (1, "  no lookups\n")


# ---- programs of others ----


class Din(torch.nn.Module):
    """Attention of an item over a behaviour sequence, whose table they share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.items = torch.nn.Embedding(1500, 8)
        self.users = torch.nn.Embedding(1100, 4)
        self.top = torch.nn.Linear(8 + 8 + 4 + 2, 1)

    def forward(self, item, history, mask, user, x):
        target, seen = self.items(item), self.items(history)
        weight = torch.softmax((seen * target[:, None]).sum(-1).masked_fill(~mask, -1e9), dim=1)
        pooled = (seen * weight[..., None]).sum(1)
        return torch.sigmoid(self.top(torch.cat([target, pooled, self.users(user), x], dim=1)))


@pytest.fixture(scope="session")
def din(tmp_path_factory):
    """As torch exports it, in a directory of its own."""
    place = tmp_path_factory.mktemp("onnx") / "din"
    place.mkdir()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = (
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2),
    )  # fmt: skip
    dims = ({0: batch}, {0: batch, 1: length}, {0: batch, 1: length}, {0: batch}, {0: batch})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Din().eval(), example, place / "din.onnx", dynamo=True, dynamic_shapes=dims, external_data=False,
            input_names=["item", "history", "mask", "user", "x"], output_names=["score"], verbose=False,
        )  # fmt: skip
    return place


def test_what_torch_exports_is_pruned_and_proven(din, tmp_path, process):
    before = bytes_of(din)
    done = process("prune-program", din, "--out", tmp_path / "out", "--json", "--svg", tmp_path / "din.svg")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["proof"]["samples"] == 256
    assert (report["proof"]["largest_difference"], report["proof"]["largest_ulps"]) == (0, 0)
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert {k.keys: (k.table, k.feed_shape, k.lengths) for k in said.lookups} == {
        "item": ("items.weight", [-1, 8], None),
        "history": ("items.weight", [-1, -1, 8], None),
        "user": ("users.weight", [-1, 4], None),
    }
    assert sorted(t.name for t in said.inputs) == ["mask", "x"]
    assert {name: (t.rows, t.dim) for name, t in said.tables.items()} == {
        "items.weight": (1500, 8),
        "users.weight": (1100, 4),
    }
    assert bytes_of(din) == before
    assert (tmp_path / "din.svg").read_text().count('class="cut"') == 3 + 1  # and the legend


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnxruntime_quantised_is_pruned_and_proven(din, tmp_path, per_channel):
    (tmp_path / "q").mkdir()
    model = onnx.load(din / "din.onnx")
    del model.graph.value_info[:]  # shapes that quantising changes
    quantize_dynamic(model, tmp_path / "q" / "q.onnx", per_channel=per_channel)
    report, said, _ = pruned(tmp_path / "q", tmp_path)
    assert (report.compared, report.largest_difference) == (256, 0)
    assert {k.keys for k in said.lookups} == {"item", "history", "user"}


def outputs_of(place, inputs):
    """What onnxruntime makes of a program as it was trained."""
    (file,) = place.glob("*.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_a_quantised_program_is_served_to_each_as_it_is_alone(din, tmp_path):
    """It scales what it computes by the largest number of all samples, so requests that come together stay apart."""
    (tmp_path / "q").mkdir()
    model = onnx.load(din / "din.onnx")
    del model.graph.value_info[:]
    quantize_dynamic(model, tmp_path / "q" / "q.onnx")
    prune(tmp_path / "q", tmp_path / "out", QUICK)
    rng = np.random.default_rng(2)
    given = [
        {
            "item": rng.integers(0, 1500, n), "history": rng.integers(0, 1500, (n, 4)),
            "user": rng.integers(0, 1100, n),
            "mask": rng.random((n, 4)) < 0.7, "x": rng.random((n, 2), np.float32),
        }
        for n in (1, 2, 3)
    ]  # fmt: skip
    names = ("item", "history", "user")
    requests = [inputs | {name: inputs[name].astype(np.uint64) for name in names} for inputs in given]
    lane, answers = served(tmp_path / "out", *requests)
    assert not lane.batcher.limits.is_on
    for inputs, answer in zip(given, answers, strict=True):
        assert np.array_equal(answer.outputs["score"], outputs_of(tmp_path / "q", inputs))


def test_ids_to_which_constants_are_added_are_served_as_they_came(tmp_path):
    nodes = [helper.make_node("Add", ["ids", "starts"], ["p"]), helper.make_node("Gather", ["t", "p"], ["e"])]
    nodes.append(helper.make_node("ReduceSum", ["e", "axes"], ["y"], keepdims=0))
    constants = {"t": TABLE, "starts": np.array([0, 500, 1500]), "axes": np.array([1, 2])}
    place = made(tmp_path / "m", nodes, constants, outputs=[value("y", ["n"])])
    prune(place, tmp_path / "out", QUICK)
    given = [np.random.default_rng(n).integers(0, 500, (n, 3)) for n in (1, 2, 3)]
    _, answers = served(tmp_path / "out", *({"ids": ids.astype(np.uint64)} for ids in given))
    for ids, answer in zip(given, answers, strict=True):
        assert np.allclose(answer.outputs["y"], outputs_of(place, {"ids": ids}), rtol=1e-6, atol=1e-6)


# ---- where elements lie ----


@pytest.mark.parametrize("outside", [{"location": "all.bin"}, {"all_tensors_to_one_file": False}])
def test_elements_outside_the_programs_file_stay_outside(tmp_path, outside):
    nodes = [LOOK, helper.make_node("MatMul", ["e", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    weight = np.random.default_rng(5).random((DIM, 9000)).astype("f4")
    place = made(
        tmp_path / "m",
        nodes,
        {"t": TABLE, "w": weight, "b": weight[0]},
        outputs=[value("y", ["n", 3, 9000])],
        outside=outside,
    )
    before = bytes_of(place)
    report, said, program = pruned(place, tmp_path, verify_samples=20)
    assert report.largest_difference == 0
    assert np.array_equal(rows_of(tmp_path, "t"), TABLE)
    assert bytes_of(place) == before
    assert said.program.parameters == "program/m.onnx.data"
    assert sorted(p.name for p in (tmp_path / "out/program").iterdir()) == ["m.onnx", "m.onnx.data"]
    left = {tensor.name: tensor for tensor in program.model.graph.initializer}
    assert np.array_equal(onnx_file.elements(left["w"], program.path), weight)
    onnx.checker.check_model(str(program.path), full_check=True)


def test_a_program_named_by_its_file_and_one_of_several_in_a_directory(tmp_path, command):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    shutil.copy(place / "m.onnx", place / "quantised.onnx")
    with pytest.raises(BadData, match=r"m: found m.onnx, quantised.onnx, expected one ONNX program.*name the file"):
        prune(place, tmp_path / "out")
    done = command("prune-program", place / "m.onnx", "--out", tmp_path / "out", "--verify", 9)
    assert done.returncode == 0, done.stderr
    assert manifest.read(manifest.Manifest, tmp_path / "out/manifest.json").name == "m"
    assert "proof  original against pruned + rows on 9 samples: largest difference 0" in done.stdout


kinds = st.sampled_from(["f4", "f2", "f8", "i1", "u1", "i2", "i4", "i8", "?"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(kinds, st.integers(0, 40_000), st.booleans()), max_size=4), st.integers(0, 2**32))
def test_what_is_read_is_what_onnx_reads(tmp_path_factory, tensors, seed):
    """Large and small tensors, stored as bytes or as numbers: every element, mapped or not."""
    place = tmp_path_factory.getbasetemp() / "read.onnx"
    rng = np.random.default_rng(seed)
    arrays = {f"c{i}": rng.integers(0, 2, size).astype(kind) for i, (kind, size, _) in enumerate(tensors)}
    model = model_of([LOOK, SUM], {"t": TABLE[:3]})
    for (name, array), (_, _, as_bytes) in zip(arrays.items(), tensors, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if as_bytes:
            tensor = numpy_helper.from_array(array, name)
        else:
            tensor = helper.make_tensor(name, kind, array.shape, array)
        model.graph.initializer.append(tensor)
    onnx.save_model(model, place)
    read = onnx_file.read(place)
    assert [t.name for t in read.graph.initializer] == ["t", *arrays]
    for tensor in read.graph.initializer:
        array = arrays.get(tensor.name, TABLE[:3])
        found = onnx_file.elements(tensor, place)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        large = array.nbytes >= 64 << 10
        assert onnx_file.is_reference(tensor) <= large
    out = place.with_name("written.onnx")
    onnx_file.write(read, place, out)
    for tensor in onnx.load(out).graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), arrays.get(tensor.name, TABLE[:3]))


@pytest.mark.slow
@pytest.mark.parametrize("outside", [None, {"location": "all.bin"}])
def test_a_wide_table_takes_no_more_memory_than_twice_its_size(tmp_path, outside):
    rows, dim = 600_000, 64
    table = np.random.default_rng(1).random((rows, dim), dtype=np.float32)
    wide = made(tmp_path / "m", [LOOK, SUM], {"t": table}, outside=outside)
    small = made(tmp_path / "s", [LOOK, SUM], {"t": TABLE})
    assert taken(small, wide, tmp_path / "out") < 2 * table.nbytes
    assert np.array_equal(np.load(tmp_path / "out/rows/t/rows.npy", mmap_mode="r"), table)


# ---- walking back, against a run ----

names = st.integers(0, 8)


def answers(model, inputs):
    """What onnx's own interpreter makes of a program."""
    given = {name: np.float32(array) for name, array in inputs.items()}
    run = ReferenceEvaluator(model)
    return run.run(None, {value.name: given[value.name] for value in model.graph.input})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(names, names, st.booleans()), min_size=1, max_size=10), st.sets(names, min_size=1), names)
def test_walking_back_keeps_exactly_what_the_targets_need(steps, wanted, cut):
    """Inputs i0 and i1, a parameter w, then sums of two values before; some through a branch that captures them."""
    values, nodes = ["i0", "i1", "w"], []
    for number, (one, other, inside) in enumerate(steps):
        pair, out = [values[one % len(values)], values[other % len(values)]], f"v{number}"
        add = helper.make_node("Add", pair, [f"{out}b" if inside else out])
        if inside:
            bodies = [
                helper.make_graph([helper.make_node("Add", pair, [f"{out}{b}"])], b, [], [value(f"{out}{b}", [])])
                for b in "ab"
            ]
            add = helper.make_node("If", ["on"], [out], then_branch=bodies[0], else_branch=bodies[1])
        nodes.append(add)
        values.append(out)
    targets = sorted({values[3:][number % len(steps)] for number in wanted})
    model = model_of(
        nodes, {"w": np.float32(5), "on": np.bool_(True)}, [value("i0", []), value("i1", [])],
        [value(name, []) for name in values[3:]],
    )  # fmt: skip
    inputs = {"i0": 1, "i1": 3}
    known = dict(zip(values[3:], answers(model, inputs), strict=True))
    fed = values[3:][cut % len(steps)]
    for given_too in ({}, {fed: value(fed, [])}):
        short = onnx_graph.walked_back(model, [value(name, []) for name in targets], given_too)
        onnx.checker.check_model(short)
        onnx_graph.check_names(short.graph, "here")
        assert answers(short, inputs | known) == [known[target] for target in targets]
        read = {name for node in short.graph.node for name in onnx_graph.reads(node)} | set(targets)
        stored = [tensor.name for tensor in short.graph.initializer]
        assert read.issuperset([*stored, *(v.name for v in short.graph.input)])
        assert all(read.intersection(onnx_graph.writes(node)) for node in short.graph.node)
        assert not any(set(given_too).intersection(onnx_graph.writes(node)) for node in short.graph.node)


# ---- bad input ----


def refused(place, tmp_path, message, options=QUICK):
    before = bytes_of(place)
    with pytest.raises(BadData, match=message):
        prune(place, tmp_path / "out", options)
    assert bytes_of(place) == before
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected an ONNX program"),
        (b"no protobuf at all", r"byte \d+: found bytes that are no ONNX program \(wire type"),
        (b"\x08\x07", "2 bytes, an ONNX program without an op"),
        (b"\x80" * 30, "a number without an end"),
        (b"PK\x03\x04", "no ONNX program"),
    ],
)
def test_what_is_no_program_is_refused(tmp_path, content, message):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "m.onnx").write_bytes(content)
    refused(tmp_path / "m", tmp_path, message)


@pytest.mark.parametrize("size", [0.2, 0.9, 0.9999])
def test_a_program_that_was_cut_off_is_refused(tmp_path, size):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": np.ones((20_000, 4), "f4")})
    raw = (place / "m.onnx").read_bytes()
    (place / "m.onnx").write_bytes(raw[: int(len(raw) * size)])
    refused(place, tmp_path, r"byte \d+: found a field that ends [\d,]+ bytes after the end.*was the file cut off")


def edited(directory, change, **more):
    """A program whose table lies in all.bin, with one thing changed in how it says so."""
    place = made(directory, [LOOK, SUM], {"t": np.ones((20_000, 4), "f4")}, outside={"location": "all.bin"}, **more)
    model = onnx.load(place / "m.onnx", load_external_data=False)
    change(model)
    (place / "m.onnx").write_bytes(model.SerializeToString())
    return place


def said_outside(**entries):
    def change(model):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entries.get(entry.key, entry.value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (said_outside(location="nowhere.bin"), "tensor 't', .*nowhere.bin: found No such file"),
        (said_outside(location="../all.bin"), "tensor 't' location: found '../all.bin', expected a path inside"),
        (said_outside(location="/etc/passwd"), "found '/etc/passwd', expected a path inside"),
        (said_outside(location=""), "found '', expected a path inside"),
        (said_outside(location="link"), "location: found .*link, a link, expected a file inside"),
        (said_outside(offset="8"), "all.bin: found 320000 bytes, expected at least 320008"),
        (said_outside(offset="-8"), "found 320000 bytes from byte -8"),
        (said_outside(length="8"), "found 8 bytes from byte 0, expected 320000 bytes"),
        (said_outside(length="x"), "offset and length: found invalid literal"),
        (lambda model: model.graph.initializer[0].dims.__setitem__(0, -1), "found type 1 \\[-1, 4\\]"),
        (lambda model: setattr(model.graph.initializer[0], "data_type", 99), "found type 99"),
    ],
)
def test_elements_that_are_not_where_they_should_be_are_refused(tmp_path, change, message):
    shutil.copy(edited(tmp_path / "other", lambda model: None) / "all.bin", tmp_path / "all.bin")
    place = edited(tmp_path / "m", change)
    (place / "link").symlink_to(tmp_path / "all.bin")
    refused(place, tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 999), "opset_import: found opset 999, expected 1 to"),
        (lambda model: setattr(model, "ir_version", 99), "no valid ONNX program .*ir_version 99"),
        (lambda model: setattr(model.graph.node[0], "op_type", "Invented"), "No Op registered for Invented"),
        (lambda model: model.graph.node.reverse(), "no valid ONNX program"),
        (lambda model: setattr(model.graph.output[0], "name", "gone"), "no valid ONNX program|found 'gone'"),
        (lambda model: model.graph.output[0].type.ClearField("value"), "no valid ONNX program"),
        (lambda model: model.graph.initializer.append(model.graph.initializer[0]), "initializer|no valid"),
    ],
)
def test_what_is_no_valid_onnx_is_refused(tmp_path, change, message):
    refused(edited(tmp_path / "m", change), tmp_path, message)


def test_values_that_are_no_tensors_are_refused_unless_they_are_not_fetched(tmp_path):
    nodes = [LOOK, SUM, helper.make_node("SequenceConstruct", ["y"], ["s"])]
    sequence = helper.make_value_info("s", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None)))
    place = made(tmp_path / "m", nodes, {"t": TABLE}, outputs=["y", sequence])
    refused(place, tmp_path, "value 's': found sequence, expected a tensor of BOOL", Options(verify_samples=0))
    assert prune(place, tmp_path / "out", Options(fetch=["y"])).largest_difference == 0


@pytest.mark.parametrize("name", ["ids.keys", "ids.text", "ids.lengths"])
def test_a_name_of_a_request_that_would_mean_two_things_is_refused(tmp_path, name):
    """Ids that are read otherwise too stay an input, and their keys are `ids.keys` then, or `ids.text`."""
    nodes = [
        LOOK,
        helper.make_node("Cast", ["ids"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["m"]),
        helper.make_node("Mul", ["e", "m"], ["f"]),
        helper.make_node("Add", ["f", name], ["y"]),
    ]
    tensors, inputs = {"t": TABLE, "last": np.array([2])}, [IDS, value(name, ["n", 3, DIM])]
    place = made(tmp_path / "m", nodes, tensors, inputs=inputs, outputs=[value("y", ["n", 3, DIM])])
    if name == "ids.lengths":  # every sample has as many ids, so there are no lengths
        pruned(place, tmp_path)
    else:
        refused(
            place, tmp_path, f"lookup e: found request input '{name}', which is another's too, expected other names"
        )


def test_an_output_that_exists_and_flags_of_other_formats_are_refused(tmp_path):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").touch()
    with pytest.raises(BadData, match="mine: found an existing path that prune-program did not write"):
        prune(place, tmp_path / "mine")
    with pytest.raises(BadData, match="a path inside the trained model"):
        prune(place, place / "out")
    refused(place, tmp_path, "--lines: found an ONNX program", Options(verify_lines=Path("x")))
    for _ in range(2):  # the second replaces the first
        prune(place, tmp_path / "out", QUICK)


def test_a_full_disk_leaves_nothing(tmp_path):
    """Every file the tool writes is cut off at 8 KiB, which the kernel reports as it does a full disk."""
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from trainer_tools.prune_program import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, str(place), "--verify", "0"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"prune-program: .*/m.pruned: found File too large, expected .*: --out\n", done.stderr), (
        done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_of_temporary_files_is_told_from_a_full_disk_of_results(tmp_path, command, monkeypatch):
    """Rows that the program stores otherwise are computed into $TMPDIR."""
    look = [helper.make_node("DequantizeLinear", ["q", "s"], ["t"]), LOOK, SUM]
    place = made(tmp_path / "m", look, {"q": np.ones((ROWS, DIM), np.int8), "s": np.float32(0.5)})
    (tmp_path / "scratch").mkdir()

    def full(array, *args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    def temporary(prefix):
        return real(prefix=prefix, dir=tmp_path / where)

    where, real = "scratch", tempfile.mkdtemp
    monkeypatch.setattr("trainer_tools.scratch.tempfile", types.SimpleNamespace(mkdtemp=temporary))
    monkeypatch.setattr("trainer_tools.programs.onnx_rows.np.ascontiguousarray", full)
    failed = command("prune-program", place, "--verify", "0")
    said = f"temporary files in {tmp_path / 'scratch'}: found No space left on device"
    assert failed.stderr == f"prune-program: {said}, expected a directory with more room: TMPDIR\n"
    where = "nowhere"
    failed = command("prune-program", place, "--verify", "0")
    assert "temporary files: found No such file or directory, expected a directory to write to: TMPDIR" in failed.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", "m.onnx", "scratch"]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The bytes of a small program with much in it."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["p"], to=7),
        helper.make_node("DequantizeLinear", ["q", "c"], ["t"]),
        helper.make_node("Gather", ["t", "p"], ["e"]),
        helper.make_node("If", ["on"], ["z"], then_branch=branch("t", "a"), else_branch=branch("t", "b")),
        helper.make_node("Add", ["e", "z"], ["y"]),
    ]
    inputs = [IDS, value("on", [], TensorProto.BOOL)]
    return model_of(nodes, {"q": EIGHT[:40], "c": np.float32(0.1)}, inputs).SerializeToString()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_program_is_refused_or_still_a_program(tmp_path_factory, plain, data):
    """Bytes flipped, cut or put in: BadData, or whatever else the bytes now say, but no other error."""
    place = tmp_path_factory.getbasetemp() / "damaged.onnx"
    raw = bytearray(plain)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.sampled_from([0, 1, 1, 40]))] = data.draw(st.binary(max_size=2))
    place.write_bytes(raw)
    try:
        program = onnx_program.load(place).serving()
        lookups = [c.lookup for c in decide(program, Rules(min_rows=0)) if c.is_cut]
        for lookup in lookups:
            program.table(lookup.table)
        program.cut(lookups).inputs()
        program.graph()
    except BadData:
        pass


# ---- the proof ----


@pytest.mark.parametrize("wrong", [lambda rows: rows[::-1], lambda rows: rows * np.nan])
def test_a_wrong_row_shows_in_the_proof(tmp_path, monkeypatch, wrong):
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    real = LocalCube.rows
    monkeypatch.setattr(LocalCube, "rows", lambda *args: real(*args)._replace(rows=wrong(real(*args).rows)))
    with pytest.raises(DataCorrupt, match=r"proof: found outputs that differ by .*nothing was written"):
        prune(place, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


NOISE = helper.make_node("RandomNormalLike", ["e"], ["r"])
SEEDED = helper.make_node("RandomNormalLike", ["e"], ["seeded"], seed=1.0)
RANDOM = {
    "Dropout (y)": [helper.make_node("Dropout", ["e", "half", "yes"], ["y"], seed=1)],
    "RandomNormalLike (seeded)": [SEEDED, helper.make_node("Add", ["e", "seeded"], ["y"])],
    "RandomNormalLike (r)": [NOISE, helper.make_node("Add", ["e", "r"], ["y"])],
}


@pytest.mark.parametrize("samples", [0, 9])
@pytest.mark.parametrize("op", RANDOM)
def test_a_program_that_computes_something_else_in_every_run_is_told_from_a_wrong_result(tmp_path, op, samples):
    """Also with a seed, which makes equal the first runs of two sessions, but not two runs of one."""
    constants = {"t": TABLE, "half": np.float32(0.5), "yes": np.array(True)}
    place = made(tmp_path / "m", [LOOK, *RANDOM[op]], constants, outputs=[value("y", ["n", 3, DIM])])
    why = rf"a program whose own outputs differ from run to run \(random ops: {re.escape(op)}\)"
    message = f"m.onnx: found {why}, expected one exported to serve: after model.eval"
    refused(place, tmp_path, message, Options(verify_samples=samples))
    off = {**constants, "yes": np.array(False)}
    place = made(tmp_path / "off", [LOOK, RANDOM["Dropout (y)"][0]], off, outputs=[value("y", ["n", 3, DIM])])
    assert onnx_program.load(place).random_ops() == []


def test_a_program_that_differs_from_run_to_run_for_no_reason_we_know_is_told_from_a_wrong_result():
    numbers = itertools.count()

    def runs():
        return [proof.Expected(1, {}, [np.float32([next(numbers)])])]

    with pytest.raises(BadData, match=r"^m\.onnx: found a program whose own outputs differ from run to run, by 1, exp"):
        proof.check_steady("m.onnx", runs)
    proof.check_steady("m.onnx", lambda: [proof.Expected(1, {}, [np.float32([1])])])


def test_inputs_of_every_kind_are_proven(tmp_path, monkeypatch):
    """Dims of one name are of one size."""
    kinds = {"h": TensorProto.FLOAT16, "d": TensorProto.DOUBLE, "b": TensorProto.BOOL, "u": TensorProto.UINT8}
    kinds |= {"v": TensorProto.UINT64}
    nodes = [LOOK, SUM]
    for name in kinds:
        nodes += [helper.make_node("Cast", [name], [f"{name}1"], to=1)]
    nodes += [helper.make_node("Sum", ["y", *(f"{name}1" for name in kinds)], ["z"])]
    nodes += [helper.make_node("Identity", ["text"], ["upper"])]
    inputs = [value("ids", ["n", "m"], TensorProto.INT64), *(value(n, ["n", "m", 4], k) for n, k in kinds.items())]
    inputs += [value("text", ["n"], TensorProto.STRING)]
    nodes += [helper.make_node("Add", ["d", "d"], ["twice"])]
    outputs = ["z", value("upper", ["n"], TensorProto.STRING), value("twice", None, TensorProto.DOUBLE)]
    place = made(tmp_path / "m", nodes, {"t": TABLE}, inputs, outputs)
    runs = []
    real = proof.difference
    monkeypatch.setattr(proof, "difference", lambda one, other: runs.append(one.shape) or real(one, other))
    report = prune(place, tmp_path / "out", Options(verify_samples=20))
    assert (report.compared, report.largest_difference) == (20, 0)
    assert len(runs) == 3


def test_a_program_that_onnxruntime_cannot_run_is_refused_but_cut_without_proof(tmp_path):
    custom = helper.make_node("Mine", ["e"], ["y"], domain="mine")
    model = model_of([LOOK, custom], {"t": TABLE})
    model.opset_import.append(helper.make_opsetid("mine", 1))
    (tmp_path / "m").mkdir()
    onnx.save_model(model, tmp_path / "m" / "m.onnx")
    refused(tmp_path / "m", tmp_path, "proof, m.onnx: found onnxruntime could not run it.*--verify 0", Options())
    report = prune(tmp_path / "m", tmp_path / "out", QUICK)
    assert (report.compared, report.unproven) == (0, "--verify 0")


def test_without_onnxruntime_nothing_is_proven_and_without_onnx_nothing_is_read(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    assert "nothing was compared (no onnxruntime here" in str(prune(place, tmp_path / "out"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else real(name))
    with pytest.raises(BadData, match="m: found an ONNX program, and no onnx here, expected pip install"):
        prune(place, tmp_path / "out")


@pytest.mark.skipif(not SAMPLES, reason="ONNX_SAMPLES names no programs")
@pytest.mark.parametrize("name", SAMPLES or [""])
def test_programs_of_other_hands(name, tmp_path):
    """ONNX_SAMPLES: files, separated by spaces. Each is pruned and proven, or has no lookup."""
    options = Options(rules=Rules(min_rows=0))
    if any(candidate.is_cut for candidate in survey(Path(name), options)):
        report = prune(Path(name), tmp_path / "out", options)
        assert (report.compared, report.largest_difference) == (256, 0)
    else:
        refused(Path(name), tmp_path, "found no lookup to cut", options)


def test_pruned_programs_run_as_they_are_written(tmp_path):
    """By a predictor's engine too: with its own optimisation, from rows that come as float32."""
    place = made(tmp_path / "m", [LOOK, SUM], {"t": TABLE})
    prune(place, tmp_path / "out", QUICK)
    session = onnxruntime.InferenceSession(tmp_path / "out/program/m.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[1, 2, 3], [4, 4, 1999]])
    (got,) = session.run(None, {"e": TABLE[ids]})
    assert np.allclose(got, TABLE[ids].sum())


def test_tables_of_the_same_ids_cannot_have_keys_of_their_own(tmp_path):
    second = helper.make_node("Gather", ["u", "ids"], ["other"])
    add = helper.make_node("Add", ["rows", "other"], ["y"])
    first = helper.make_node("Gather", ["t", "ids"], ["rows"])
    place = made(tmp_path / "m", [first, second, add], {"t": TABLE, "u": TABLE})
    rng = np.random.default_rng(1)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.permutation(ROWS).astype(np.uint64))
    vocabularies = {"t": tmp_path / "a.npy", "u": tmp_path / "b.npy"}
    with pytest.raises(BadData, match="--vocabulary u: found another than that of 't', which is read by the same ids"):
        pruned(place, tmp_path, vocabularies=vocabularies)
    assert pruned(place, tmp_path, vocabularies=dict.fromkeys("tu", tmp_path / "a.npy"))[0].largest_difference == 0
