"""The proof of a pruned Paddle program: original against pruned + rows, both run by Paddle.

Here the interpreter stands in for Paddle. Where PADDLE_PYTHON names a Python that has Paddle, Paddle is asked too.
"""

import os
import sys

import numpy as np
import pytest
from paddle_interpreter import run
from places import ROOT

from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from cube.rows import RowFormat
from trainer_tools import accuracy, criteo
from trainer_tools.accuracy import Wanted
from trainer_tools.pb.paddle_framework_pb2 import ProgramDesc
from trainer_tools.programs import paddle
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

needs_paddle = pytest.mark.skipif("PADDLE_PYTHON" not in os.environ, reason="PADDLE_PYTHON names no Python with Paddle")

STAND_IN = """
import pathlib, types
import paddle_interpreter
from trainer_tools.programs import paddle as programs

class Config:
    def __init__(self, program, parameters=None):
        self.place = pathlib.Path(program).parent if parameters else pathlib.Path(program)
    def __getattr__(self, name):
        return lambda *args: None

class Predictor:
    def __init__(self, place):
        self.program, self.inputs, self.lods = programs.load(place), {}, {}
    def get_input_handle(self, name):
        return types.SimpleNamespace(
            copy_from_cpu=lambda array: self.inputs.update({name: array}),
            set_lod=lambda lod: self.lods.update({name: lod[-1]}),
        )
    def run(self):
        self.outputs = paddle_interpreter.run(self.program, self.inputs, self.lods)
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
    (place / "paddle" / "inference.py").write_text(STAND_IN)
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
        DataCorrupt, match=r"proof: found outputs that differ by .*, expected at most 1e-06 of .*: nothing was"
    ):
        prune(model("331-ctr"), tmp_path / "out", Options(verify_samples=20, paddle_python=stand_in))
    assert [p.name for p in tmp_path.iterdir()] == ["331-ctr"]


@pytest.fixture
def clicks(tmp_path):
    """Labelled requests for 185-lod: slots of 0 to 3 ids."""
    rng = np.random.default_rng(3)
    arrays = {"dense_input": rng.random((60, 5), np.float32), "label": rng.integers(0, 2, 60)}
    for name in ("C1", "C2", "C3"):
        lengths = rng.integers(0, 4, (60, 1)).astype(np.int32)
        arrays |= {name: rng.integers(0, 1001, lengths.sum()), f"{name}.lengths": lengths}
    np.savez(tmp_path / "clicks.npz", **arrays)
    return arrays


@pytest.mark.parametrize(("row_format", "most"), [("f32", 0), ("i8", 2e-2)])
def test_what_a_row_format_does_to_programs_of_sequences_is_measured(
    model, tmp_path, stand_in, clicks, monkeypatch, row_format, most
):
    monkeypatch.setattr(accuracy, "BATCH", 25)  # in several parts, the last of them smaller
    wanted = Wanted(RowFormat.parse(row_format), tmp_path / "clicks.npz", max_auc_loss=0.1)
    options = Options(verify_samples=0, paddle_python=stand_in, wanted=wanted)
    found = prune(model("185-lod"), tmp_path / "out", options).accuracy
    given = {
        name: array for name, array in clicks.items() if name not in ("label", *(f"C{i}.lengths" for i in (1, 2, 3)))
    }
    lods = {name: np.concatenate([[0], np.cumsum(clicks[f"{name}.lengths"])]) for name in ("C1", "C2", "C3")}
    scores = run(paddle.load(tmp_path / "185-lod"), {n: a[:, None] if n in lods else a for n, a in given.items()}, lods)
    assert found.samples == 60
    assert (found.largest_change == 0) == (row_format == "f32")
    assert found.largest_change <= most
    assert found.auc[0] == criteo.auc(clicks["label"].astype(np.int8), next(iter(scores.values()))[:, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C1.lengths": np.int32([[1]] * 60)}, "'C1.lengths': found lengths that sum to 60, .* keys"),
        ({"C2.lengths": np.int32([[0]] * 59), "C2": np.int64([])}, "found .*59 in 'C2.lengths'.*as many samples in"),
        ({"C3": np.zeros((9, 1), np.int64)}, r"'C3': found int64 \[9, 1\], expected UINT64 \[-1\]"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(model, tmp_path, stand_in, clicks, changes, message):
    np.savez(tmp_path / "clicks.npz", **(clicks | changes))
    options = Options(verify_samples=0, paddle_python=stand_in, wanted=Wanted(RowFormat.I8, tmp_path / "clicks.npz"))
    with pytest.raises(BadData, match=message):
        prune(model("185-lod"), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_sequences_that_the_program_joins_have_to_be_as_long(model, tmp_path, stand_in):
    arrays = {"words": np.arange(6), "words.lengths": np.int32([[2], [4]]), "marks": np.ones((6, 1), np.int64)}
    options = Options(verify_samples=0, paddle_python=stand_in, wanted=Wanted(RowFormat.I8, tmp_path / "d.npz"))
    np.savez(tmp_path / "d.npz", **arrays, **{"marks.lengths": np.int32([3, 3])})
    with pytest.raises(BadData, match=r"'marks\.lengths' and 'words\.lengths': found different lengths"):
        prune(model("185-tagger"), tmp_path / "out", options)


def test_a_program_of_a_fixed_number_of_samples_is_run_as_often_as_it_takes(model, tmp_path, stand_in):
    place = model("331-ctr")
    desc = ProgramDesc.FromString((place / "ctr.pdmodel").read_bytes())
    for var in desc.blocks[0].vars:
        dims = var.type.dense_tensor.tensor.dims
        if not var.persistable and list(dims[:1]) == [-1]:
            dims[0] = 8
    (place / "ctr.pdmodel").write_bytes(desc.SerializeToString())
    report = prune(place, tmp_path / "out", Options(paddle_python=stand_in))
    assert (report.compared, report.largest_difference) == (4 * 8, 0)


# ---- with Paddle ----


@needs_paddle
@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod", "185-tagger", "185-train"])
def test_paddle_answers_the_same_to_the_bit(model, tmp_path, name):
    fetch = ["assign_0.tmp_0"] if name == "185-train" else []
    report = prune(model(name), tmp_path / "out", Options(fetch=fetch, verify_samples=64))
    assert (report.compared, report.largest_difference) == (64, 0)
