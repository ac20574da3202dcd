"""Paddle programs in the predictor's process: the suite of all engines, and what only Paddle has.

Both need Paddle. Where this Python has none and PADDLE_PYTHON names one that does, that one runs them.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig

import numpy as np
import pytest
from paddle_answers import answered
from places import GOLDEN, ROOT

from cube.errors import BadConfig, BadRequest
from predictor.client import Client
from predictor.engines.open import open_engine
from trainer_tools import manifest
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

HAS_PADDLE = importlib.util.find_spec("paddle") is not None
NO_OTHER = "PADDLE_PYTHON names no Python with Paddle"
needs_another = pytest.mark.skipif("PADDLE_PYTHON" not in os.environ, reason=NO_OTHER)
needs_paddle = pytest.mark.skipif(not HAS_PADDLE, reason="this Python has no Paddle")

# The other Python has Paddle and numpy; pytest and what we need besides come from here.
WITH_PADDLE = """
import os, sys
os.environ["FLAGS_enable_pir_api"] = "0"
sys.path[:0], sys.path[len(sys.path):] = [{root!r}], [{here!r}]
import pytest
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore::UserWarning",
                      "-W", "ignore::DeprecationWarning",
                      "-k", "paddle and not another_python and not without_paddle and not served", {tests!r}]))
"""


def opened(name):
    """An engine on a golden program, and the feeds that its answers are for."""
    directory = GOLDEN / f"paddle-{name}"
    (program,) = [*directory.glob("*.pdmodel"), *directory.glob("__model__")]
    engine = open_engine(program, "paddle")
    given, lods = answered(name, "in"), answered(name, "lod")
    assert set(lods) == {tensor.name for tensor in engine.inputs if tensor.name in engine.lod_levels}
    feeds = [(given[t.name], lods[t.name].astype(np.int64)) if t.name in lods else given[t.name] for t in engine.inputs]
    return engine, feeds


@pytest.mark.skipif(HAS_PADDLE or "PADDLE_PYTHON" not in os.environ, reason="PADDLE_PYTHON names no Python with Paddle")
def test_another_python_with_paddle_passes():
    code = WITH_PADDLE.format(
        root=str(ROOT), here=sysconfig.get_path("purelib"), tests=str(ROOT / "tests" / "predictor" / "engines")
    )
    done = subprocess.run([os.environ["PADDLE_PYTHON"], "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


SERVER = """
import sys
sys.path[:0], sys.path[len(sys.path):] = [{root!r}], [{here!r}]
from predictor.cli import server
sys.exit(server(sys.argv[1:]))
"""


@contextlib.contextmanager
def serving(*models):
    """A client of a predictor-server with Paddle in its process."""
    code = SERVER.format(root=str(ROOT), here=sysconfig.get_path("purelib"))
    line = [os.environ["PADDLE_PYTHON"], "-c", code, "--listen", "127.0.0.1:0"]
    line += [flag for model in models for flag in ("--model", str(model))]
    with subprocess.Popen(line, cwd=models[0].parent, stdout=subprocess.PIPE, text=True) as process:
        try:
            announced = process.stdout.readline()
            with Client(announced.removeprefix("predictor-server: listening on ").split(",")[0]) as client:
                yield client
        finally:
            process.terminate()


def asked(said, given, lods):
    """The request that means what Paddle was given. lods: offsets of what is ragged."""
    request = {}
    for tensor in said.inputs:
        request[tensor.name] = given[tensor.name]
        if tensor.name in said.lod_levels:
            request[f"{tensor.name}.lengths"] = np.diff(lods[tensor.name]).astype(np.int32)
    for lookup in said.lookups:
        ids = given[lookup.keys]
        lengths = np.diff(lods[lookup.keys]) if lookup.keys in lods else np.ones(len(ids))
        request |= {lookup.keys: ids.astype(np.uint64).ravel(), lookup.lengths: lengths.astype(np.int32)[:, None]}
    return request


@needs_another
def test_pruned_programs_are_served_and_answer_as_the_originals(tmp_path):
    names = {"331-ctr": "ctr", "185-lod": "lod", "185-tagger": "tagger"}
    for golden, name in names.items():
        shutil.copytree(GOLDEN / f"paddle-{golden}", tmp_path / name)
        prune(tmp_path / name, tmp_path / f"{name}.pruned", Options(verify_samples=0))
    with serving(*(tmp_path / f"{name}.pruned" for name in names.values())) as client:
        for golden, name in names.items():
            said = manifest.read(manifest.Manifest, tmp_path / f"{name}.pruned" / "manifest.json")
            lods = answered(golden, "lod")
            made = client.infer(name, asked(said, answered(golden, "in"), lods)).outputs
            for output, array in answered(golden, "out").items():
                np.testing.assert_allclose(made[output], array, rtol=1e-5, atol=1e-6)
                if f"{output}.lengths" in made:
                    assert np.array_equal(made[f"{output}.lengths"], np.diff(lods["words"]))
            assert (name == "tagger") == any(output.endswith(".lengths") for output in made)


@needs_another
def test_a_tagger_that_paddle_has_trained_is_proven_and_served_with_an_answer_for_each_word(tmp_path):
    line = [os.environ["PADDLE_PYTHON"], ROOT / "tests" / "support" / "paddle_tagger.py", tmp_path]
    done = subprocess.run(line, env=os.environ | {"FLAGS_enable_pir_api": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = prune(tmp_path / "tagger", tmp_path / "tagger.pruned", Options(verify_samples=64))
    assert (report.compared, report.largest_difference) == (64, 0)
    assert [(c.lookup.table, c.is_cut) for c in report.candidates] == [("word_emb", True), ("mark_emb", True)]
    said = manifest.read(manifest.Manifest, tmp_path / "tagger.pruned" / "manifest.json")
    assert said.alike == [["words.lengths", "marks.lengths"]]
    scores, topic = (tensor.name for tensor in said.outputs)
    with np.load(tmp_path / "answers.npz") as archive:
        answers = dict(archive)
    offsets = np.concatenate([[0], np.cumsum(answers["lengths"])])
    with serving(tmp_path / "tagger.pruned") as client:
        for first, last in ((0, len(answers["lengths"])), (0, 1), (1, 2), (2, 5)):  # all, some, one that is empty
            part = slice(offsets[first], offsets[last])
            lods = dict.fromkeys(("words", "marks"), offsets[first : last + 1])
            request = asked(said, {name: answers[name][part] for name in lods}, lods)
            made = client.infer("tagger", request).outputs
            assert np.array_equal(made[f"{scores}.lengths"], answers["lengths"][first:last])
            np.testing.assert_allclose(made[scores], answers["scores"][part], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(made[topic], answers["topic"][first:last], rtol=1e-5, atol=1e-6)
        request |= {"words.lengths": np.int32([[1], [3], [3]]), "marks.lengths": np.int32([[1], [4], [2]])}
        wrong = "inputs 'words.lengths' and 'marks.lengths': found 3 and 4 in sample 1, expected as many in both"
        with pytest.raises(BadRequest, match=wrong):
            client.infer("tagger", request)


@needs_paddle
@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod", "185-tagger"])
def test_programs_of_three_releases_answer_as_their_own_did(name):
    engine, feeds = opened(name)
    lods = list(answered(name, "lod").values())
    for tensor, made in zip(engine.outputs, engine.run(feeds), strict=True):
        values = made
        if tensor.name in engine.lod_levels:
            values, offsets = made
            assert np.array_equal(offsets, lods[0])
        np.testing.assert_allclose(values, answered(name, "out")[tensor.name], rtol=1e-5, atol=1e-6)
    engine.close()


@needs_paddle
def test_each_sample_of_ragged_inputs_is_answered_as_it_is_alone_empty_sequences_too():
    engine, feeds = opened("185-lod")
    dense = feeds[0]
    empty = [(values[:0], np.zeros(len(dense) + 1, np.int64)) for values, _ in feeds[1:]]
    for given in (feeds, [dense, *empty], [dense, empty[0], *feeds[2:]]):
        (whole,) = engine.run(given)
        for i in range(len(dense)):
            alone = [(v[o[i] : o[i + 1]], o[i : i + 2] - o[i]) for v, o in given[1:]]
            np.testing.assert_allclose(engine.run([dense[i : i + 1], *alone])[0], whole[i : i + 1], atol=1e-6)
    none = [(values[:0], np.zeros(1, np.int64)) for values, _ in feeds[1:]]
    assert engine.run([dense[:0], *none])[0].shape == (0, 2)


@needs_paddle
def test_an_output_for_each_key_is_what_its_sequence_has_alone_empty_ones_beside_it_or_not():
    """Its GRU computes with memory of nobody's where Paddle is given an empty sequence."""
    engine, feeds = opened("185-tagger")
    few = [(values[:2], np.array([0, 0, 1, 2, 2], np.int64)) for values, _ in feeds]
    (tags, _), (scores, offsets) = engine.run(few)
    assert (tags.shape, scores.shape) == ((2, 1), (2, 5))
    assert np.array_equal(offsets, few[0][1])
    first = [(values[:1], np.array([0, 1], np.int64)) for values, _ in feeds]
    np.testing.assert_allclose(engine.run(first)[1][0], scores[:1], atol=1e-6)
    none = [(values[:0], np.zeros(3, np.int64)) for values, _ in feeds]
    (tags, _), (scores, offsets) = engine.run(none)
    assert (tags.shape, scores.shape, offsets.tolist()) == ((0, 1), (0, 5), [0, 0, 0])


@needs_paddle
@pytest.mark.parametrize(
    ("name", "expected"), [("185-lod", "0 to 1000"), ("331-ctr", "0 to 1000"), ("331-jit", "0 to 1000")]
)
def test_paddle_never_sees_an_id_beyond_its_table(name, expected):
    engine, feeds = opened(name)
    before = engine.run(feeds)
    for number, tensor in enumerate(engine.inputs):
        for wrong in (-1, 1001, -(2**62)) if tensor.datatype == "INT64" and tensor.name != "day" else ():
            ids = np.array(feeds[number][0] if isinstance(feeds[number], tuple) else feeds[number])
            ids.flat[-1] = wrong
            given = list(feeds)
            given[number] = (ids, feeds[number][1]) if isinstance(feeds[number], tuple) else ids
            with pytest.raises(BadRequest, match=f"input '{tensor.name}': found id {wrong}, expected {expected}"):
                engine.run(given)
    assert all(np.array_equal(one, same) for one, same in zip(before, engine.run(feeds), strict=True))


@pytest.mark.skipif(HAS_PADDLE, reason="this Python has Paddle")
def test_without_paddle_it_says_what_to_install():
    with pytest.raises(BadConfig, match=r"ctr.pdmodel: found no Paddle here .*pip install 'cube-serving\[paddle\]'"):
        open_engine(GOLDEN / "paddle-331-ctr" / "ctr.pdmodel", "paddle")
