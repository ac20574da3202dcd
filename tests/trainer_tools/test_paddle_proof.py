"""The proof of a pruned Paddle program: original against pruned + rows, both run by Paddle.

Here the interpreter stands in for Paddle. Where PADDLE_PYTHON names a Python that has Paddle, Paddle is asked too.
"""

import os
import sys

import numpy as np
import pytest
from places import ROOT

from cube.client import LocalCube
from cube.errors import DataCorrupt
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


# ---- with Paddle ----


@needs_paddle
@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod", "185-tagger", "185-train"])
def test_paddle_answers_the_same_to_the_bit(model, tmp_path, name):
    fetch = ["assign_0.tmp_0"] if name == "185-train" else []
    report = prune(model(name), tmp_path / "out", Options(fetch=fetch, verify_samples=64))
    assert (report.compared, report.largest_difference) == (64, 0)
