"""The example of a node with processes of its own: as a script, and served."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

from predictor.client.inference import Client
from predictor.ops.op import Batch

EXAMPLE = ROOT / "examples" / "ocr_like"


@pytest.mark.slow
def test_the_answers_of_one_node_and_of_a_split_one_are_the_same():
    command = [sys.executable, "-m", "examples.ocr_like", "--requests", "20", "--rounds", "1", "--concurrency", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    one, split, ratio, same = done.stdout.splitlines()
    assert one.startswith("one node: ")
    assert split.startswith("split, 1 processes: ")
    assert ratio.startswith("ratio: ")
    assert same == "the same answers to 20 requests"


@pytest.mark.slow
def test_it_is_served_as_configured(server):
    spec = importlib.util.spec_from_file_location("pages", EXAMPLE / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    batch = Batch(page=np.random.default_rng(3).integers(0, 256, (11, pages.SIDE, pages.SIDE), np.uint8))
    batch.rows, batch.deadline = 11, None
    expected = pages.PrepareAndRecognise().run(batch)["letters"]
    with Client(server("predictor-server", "--conf", EXAMPLE)) as client:
        answer = client.infer("PageService", {"page": batch["page"]})
    assert np.allclose(answer.outputs["letters"], expected, rtol=1e-5, atol=1e-6)
