"""Paddle programs in the predictor's process: the suite of all engines, and what only Paddle has.

Both need Paddle. Where this Python has none and PADDLE_PYTHON names one that does, that one runs them.
"""

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
from predictor.engines.open import open_engine

HAS_PADDLE = importlib.util.find_spec("paddle") is not None
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
    assert set(lods) == set(engine.lod_levels)
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


@pytest.mark.skipif("PADDLE_PYTHON" not in os.environ, reason="PADDLE_PYTHON names no Python with Paddle")
def test_pruned_programs_are_served_and_answer_as_the_originals(tmp_path):
    from predictor.client import Client
    from trainer_tools.prune_program import prune
    from trainer_tools.pruning import Options

    names = {"331-ctr": "ctr", "185-lod": "lod"}
    for golden, name in names.items():
        shutil.copytree(GOLDEN / f"paddle-{golden}", tmp_path / name)
        prune(tmp_path / name, tmp_path / f"{name}.pruned", Options(verify_samples=0))
    code = SERVER.format(root=str(ROOT), here=sysconfig.get_path("purelib"))
    line = [os.environ["PADDLE_PYTHON"], "-c", code, "--listen", "127.0.0.1:0"]
    line += [flag for name in names.values() for flag in ("--model", str(tmp_path / f"{name}.pruned"))]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            announced = process.stdout.readline()
            address = announced.removeprefix("predictor-server: listening on ").split(",")[0]
            with Client(address) as client:
                for golden, name in names.items():
                    lods, request = answered(golden, "lod"), {}
                    for key, array in answered(golden, "in").items():
                        if array.dtype.kind == "f":
                            request[key] = array
                            continue
                        request[key] = array.astype(np.uint64).ravel()
                        lengths = np.diff(lods[key]) if key in lods else np.ones(len(array))
                        request[f"{key}.lengths"] = lengths.astype(np.int32)[:, None]
                    made = client.infer(name, request).outputs
                    for output, array in answered(golden, "out").items():
                        np.testing.assert_allclose(made[output], array, rtol=1e-5, atol=1e-6)
        finally:
            process.terminate()


@needs_paddle
@pytest.mark.parametrize("name", ["331-ctr", "331-jit", "262-deepfm", "185-lod", "185-tagger"])
def test_programs_of_three_releases_answer_as_their_own_did(name):
    engine, feeds = opened(name)
    for tensor, made in zip(engine.outputs, engine.run(feeds), strict=True):
        np.testing.assert_allclose(made, answered(name, "out")[tensor.name], rtol=1e-5, atol=1e-6)
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
def test_an_output_for_each_key_has_no_more_than_there_are_keys():
    engine, feeds = opened("185-tagger")
    few = [(values[:2], np.array([0, 0, 1, 2, 2], np.int64)) for values, _ in feeds]
    tags, scores = engine.run(few)
    assert (tags.shape, scores.shape) == ((2, 1), (2, 5))
    first = [(values[:1], np.array([0, 1], np.int64)) for values, _ in feeds]
    np.testing.assert_allclose(engine.run(first)[1], scores[:1], atol=1e-6)


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
