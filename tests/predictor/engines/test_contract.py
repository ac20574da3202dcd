"""One suite for all engines: the same small net in every format, and one that asks for more memory than there is.

Paddle's cases run where this Python has Paddle; test_paddle_engine.py runs them by one that has.
"""

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import dense_programs
import numpy as np
import pytest
from dense_programs import INPUTS, OUTPUTS

from cube.errors import BadRequest, Overloaded
from predictor.engines.callable_engine import CallableEngine
from predictor.engines.open import open_engine


class Case(NamedTuple):
    """An engine: how it is opened on either net, and what the framework itself answers."""

    kind: str
    open: object  # (greedy=False) → engine
    bare: object  # x, ids → score, best
    refuses: tuple[type[Exception], ...] = (BadRequest,)  # what inputs that do not fit raise
    ulps: int = 0  # how far answers may be from the framework's own: compiled code adds in another order
    is_cheap: bool = True  # to open: compiling takes half a minute


@pytest.fixture(scope="module", params=["torch", "torch compiled", "onnx", "paddle", "callable"])
def case(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    return CASES[request.param](place)


@pytest.fixture(scope="module")
def engine(case):
    opened = case.open()
    yield opened
    opened.close()


def torch_case(place, compile="none"):
    import torch

    net = dense_programs.torch_net()

    def bare(x, ids):
        with torch.inference_mode():
            made = net(torch.tensor(x), torch.tensor(ids))
        return made["score"].numpy(), made["best"].numpy()

    def opened(greedy=False):
        path = place / f"{greedy}.pt2"
        if not path.exists():
            dense_programs.write_torch(path, dense_programs.greedy_torch_net() if greedy else net)
        return open_engine(path, "torch.export", engine="TORCH", compile=compile)

    if compile == "aot":
        if not shutil.which("g++"):
            pytest.skip("no g++ here")
        return Case("torch compiled", opened, bare, ulps=4, is_cheap=False)
    return Case("torch", opened, bare)


def onnx_case(place):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        dense_programs.write_onnx(place / "bare.onnx"), providers=["CPUExecutionProvider"]
    )

    def opened(greedy=False):
        return open_engine(dense_programs.write_onnx(place / f"{greedy}.onnx", greedy=greedy), "onnx")

    return Case("onnx", opened, lambda x, ids: session.run(None, {"x": x, "ids": ids}))


def paddle_case(place):
    if not importlib.util.find_spec("paddle"):
        pytest.skip("this Python has no Paddle")

    def opened(greedy=False):
        directory = place / str(greedy)
        directory.mkdir(exist_ok=True)
        return open_engine(dense_programs.write_paddle(directory, greedy=greedy), "paddle")

    program = dense_programs.write_paddle(place)

    def bare(x, ids):
        import paddle.inference

        config = paddle.inference.Config(str(program), str(program.with_suffix(".pdiparams")))
        config.disable_glog_info()
        config.disable_onednn()
        predictor = paddle.inference.create_predictor(config)
        for name, array in (("x", x), ("ids", ids)):
            predictor.get_input_handle(name).copy_from_cpu(array)
        predictor.run()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]

    return Case("paddle", opened, bare)


def callable_case(place):
    def opened(greedy=False):
        return CallableEngine(f"dense_programs:{'greedy_' if greedy else ''}by_numpy", INPUTS, OUTPUTS)

    return Case("callable", opened, dense_programs.by_numpy, (ValueError, IndexError))


CASES = {
    "torch": torch_case,
    "torch compiled": partial(torch_case, compile="aot"),
    "onnx": onnx_case,
    "paddle": paddle_case,
    "callable": callable_case,
}


def test_inputs_and_outputs_are_described(engine):
    assert (engine.inputs, engine.outputs) == (INPUTS, OUTPUTS)
    assert not engine.lod_levels
    assert engine.platform


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 1000])
def test_answers_are_those_of_the_framework_itself_bit_for_bit(case, engine, samples):
    feeds = dense_programs.feeds(samples, seed=samples)
    made, bare = engine.run(feeds), case.bare(*feeds)
    for one, other in zip(made, bare, strict=True):
        assert one.dtype == other.dtype
        if one.dtype == np.float32:
            np.testing.assert_array_max_ulp(one, other, case.ulps)
        else:
            assert np.array_equal(one, other)
    for one, other in zip(made, dense_programs.by_numpy(*feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def unaligned(array):
    """The same over memory that begins at an odd address, as the parts of a request's bytes do."""
    raw = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:]
    return raw.view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize(
    "placed",
    [
        pytest.param(unaligned, id="at an odd address"),
        pytest.param(lambda a: np.repeat(a, 2, axis=0)[::2], id="every other row of a larger array"),
        pytest.param(lambda a: np.asfortranarray(a), id="column by column"),
    ],
)
def test_an_input_may_lie_in_memory_as_it_likes(engine, placed):
    feeds = dense_programs.feeds(33)
    for one, other in zip(engine.run([placed(feed) for feed in feeds]), engine.run(feeds), strict=True):
        assert np.array_equal(one, other)


def test_an_empty_batch_has_empty_answers(engine):
    made = engine.run(dense_programs.feeds(0))
    assert [(array.shape, array.dtype) for array in made] == [((0, 1), np.float32), ((0,), np.int64)]


def test_runs_beside_each_other_do_not_mix(engine):
    given = [dense_programs.feeds(1 + seed % 9, seed) for seed in range(200)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(engine.run, given))
    for feeds, made in zip(given, answers, strict=True):
        for one, other in zip(made, engine.run(feeds), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x, ids: (x[:, :3], ids), id="too few columns"),
        pytest.param(lambda x, ids: (x[:3], ids), id="fewer samples in one input"),
        pytest.param(lambda x, ids: (x, ids + 1000), id="an id beyond the table"),
        pytest.param(lambda x, ids: (x, ids - 1000), id="an id below it"),
    ],
)
def test_inputs_it_cannot_compute_with_are_refused_and_the_next_run_is_as_good_as_any(case, engine, spoil):
    feeds = dense_programs.feeds(5)
    before = engine.run(feeds)
    for _ in range(3):
        with pytest.raises(case.refuses) as refused:
            engine.run(list(map(np.ascontiguousarray, spoil(*feeds))))
        assert "\n" not in str(refused.value)
        assert "pytest-of" not in str(refused.value)  # a caller is not told where files lie
    assert all(np.array_equal(one, other) for one, other in zip(before, engine.run(feeds), strict=True))


@pytest.fixture
def opened(case):
    """Opens one more engine."""
    if not case.is_cheap:
        pytest.skip("compiling once more takes half a minute")
    return case.open


def test_a_request_for_which_memory_is_short_fails_and_the_process_lives(opened, engine):
    greedy = opened(greedy=True)
    for _ in range(3):
        with pytest.raises(Overloaded, match="not enough memory for this request"):
            greedy.run(dense_programs.feeds(2))
    greedy.close()
    engine.run(dense_programs.feeds(2))


def test_closing_one_leaves_another_of_the_same_program_alone(opened, engine):
    feeds = dense_programs.feeds(3)
    other = opened()
    before = other.run(feeds)
    other.close()
    assert all(np.array_equal(one, same) for one, same in zip(before, engine.run(feeds), strict=True))
