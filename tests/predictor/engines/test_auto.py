"""Which engine AUTO takes: engines that answer at will, a clock that says how long each took."""

import logging
import re

import dense_programs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import BadConfig, BadRequest
from predictor.engines.auto import LEAST_GAIN, Candidate, Undecided, fastest
from predictor.engines.open import open_engine


class Clock:
    """Time passes only where an engine runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed:
    """An engine that takes its time, on a clock, and makes what it is told to."""

    lod_levels, platform = {}, "timed"
    inputs, outputs = dense_programs.INPUTS, dense_programs.OUTPUTS[:1]

    def __init__(self, clock, seconds, answer=lambda x: x[:, :1]):
        self.clock, self.seconds, self.answer, self.is_closed = clock, seconds, answer, False

    def run(self, feeds):
        assert not self.is_closed
        self.clock.now += self.seconds * len(feeds[0])
        return [self.answer(feeds[0])]

    def close(self):
        self.is_closed = True


def chosen(clock, *engines):
    """The number of the engine that is chosen."""
    candidates = [Candidate(f"engine {at}", lambda engine=engine: engine) for at, engine in enumerate(engines)]
    best = fastest(candidates, lambda first: [dense_programs.feeds(n) for n in (1, 8)], clock)
    assert [engine.is_closed for engine in engines] == [engine is not best for engine in engines]
    return engines.index(best)


@given(st.lists(st.floats(1e-6, 0.05), min_size=1, max_size=5))
def test_the_fastest_is_chosen_and_of_those_nearly_as_fast_the_first(seconds):
    clock = Clock()
    best = chosen(clock, *(Timed(clock, each) for each in seconds))
    kept = 0
    for at, each in enumerate(seconds):
        if each < seconds[kept] * (1 - LEAST_GAIN):
            kept = at
    assert seconds[best] == pytest.approx(seconds[kept])
    assert seconds[best] <= min(seconds) / (1 - LEAST_GAIN) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda x: x[:, :1] + 0.01, "output 'score' of request 0 differs by 0.01"),
        (lambda x: x[:, :1] + np.float32(0.01 * (len(x) == 8)), "output 'score' of request 1 differs by 0.01"),
        (lambda x: x[:, :2], r"output 'score' is float32 \(1, 2\), not float32 \(1, 1\)"),
        (lambda x: x[:, :1].astype(np.float64), r"output 'score' is float64"),
        (lambda x: np.full_like(x[:, :1], np.nan), "output 'score' of request 0 differs by nan"),
        (lambda x: 1 / 0, "request 0 fails .division by zero"),
    ],
)
def test_one_that_answers_otherwise_is_dropped_with_a_warning(caplog, answer, why):
    clock = Clock()
    assert chosen(clock, Timed(clock, 0.01), Timed(clock, 0.001, answer)) == 0
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.getMessage().startswith("engine engine 1 is not used: ")
    assert re.search(why, warning.getMessage())


def test_what_is_small_is_compared_by_its_own_size(caplog):
    clock, rare = Clock(), lambda x: x[:, :1] * np.float32(1e-6)
    assert chosen(clock, Timed(clock, 0.01, rare), Timed(clock, 0.001, lambda x: 8 * rare(x))) == 0
    assert "differs by" in caplog.text
    assert chosen(clock, Timed(clock, 0.01, rare), Timed(clock, 0.001, lambda x: rare(x) * np.float32(1 + 1e-6))) == 1


def test_a_difference_in_the_last_digits_is_none():
    clock = Clock()
    assert chosen(clock, Timed(clock, 0.01), Timed(clock, 0.001, lambda x: x[:, :1] * np.float32(1 + 1e-6))) == 1


def test_the_log_tells_what_each_took(caplog):
    clock = Clock()
    with caplog.at_level(logging.INFO):
        chosen(clock, Timed(clock, 0.002), Timed(clock, 0.001))
    assert (
        "engine engine 1 chosen, by runs of 1, 8 rows: engine 0 2000 + 16000 µs; engine 1 1000 + 8000 µs" in caplog.text
    )


def test_one_that_cannot_be_had_here_is_left_out():
    clock = Clock()

    def absent():
        raise BadConfig("engine", "none", "one")

    here = Timed(clock, 1.0)
    assert fastest([Candidate("a", absent), Candidate("b", lambda: here)], lambda first: []) is here
    with pytest.raises(BadConfig, match="engine: found none"):
        fastest([Candidate("a", absent), Candidate("b", absent)], lambda first: [])


def test_requests_that_the_first_refuses_choose_nothing(caplog):
    clock = Clock()

    def refuse(x):
        raise BadRequest("ids", 1, "0")

    assert chosen(clock, Timed(clock, 1.0, refuse), Timed(clock, 0.5)) == 0
    assert "engine engine 0 is used untimed: ids: found 1" in caplog.text


def undecided(clock, *engines):
    return Undecided([Candidate(f"engine {n}", lambda e=e: e) for n, e in enumerate(engines)], clock)


@pytest.mark.parametrize("runs", [0, 1, 40])
def test_one_that_is_undecided_is_the_first_until_it_is_told_to_be_the_fastest(runs):
    clock = Clock()
    slow, wrong, fast = Timed(clock, 0.01), Timed(clock, 1e-6, lambda x: x[:, 1:2]), Timed(clock, 0.001)
    engine = undecided(clock, slow, wrong, fast)
    for number in range(runs):
        began, (x, ids) = clock.now, dense_programs.feeds(3, number)
        assert np.array_equal(engine.run([x, ids])[0], x[:, :1])
        assert clock.now - began == pytest.approx(0.03)
    engine.decide()
    best = fast if runs else slow
    assert [e.is_closed for e in (slow, wrong, fast)] == [e is not best for e in (slow, wrong, fast)]
    for _ in range(2):
        assert engine.platform == "timed"
        assert np.array_equal(engine.run([x, ids] if runs else dense_programs.feeds(3))[0][:, 0].shape, (3,))
        engine.decide()  # another service may have had requests for it, too
    engine.close()
    assert best.is_closed


def test_one_that_takes_or_makes_something_else_is_dropped_with_a_warning(caplog):
    clock = Clock()
    other = Timed(clock, 0.001)
    other.outputs = dense_programs.OUTPUTS
    assert chosen(clock, Timed(clock, 0.01), other) == 0
    assert (
        "engine engine 1 is not used beside engine 0: its outputs, score FP32 [-1, 1], best INT64 [-1], "
        "are not those of the first, score FP32 [-1, 1]\n" in caplog.text
    )
    assert other.is_closed


@pytest.mark.parametrize("first_is_broken", [False, True])
def test_a_broken_file_beside_a_good_one_is_a_warning_with_its_name_and_what_is_wrong(
    tmp_path, caplog, first_is_broken
):
    caplog.set_level("INFO")
    torch_program = dense_programs.write_torch(tmp_path / "net.pt2", dense_programs.torch_net())
    onnx_program = dense_programs.write_onnx(tmp_path / "net.onnx")
    broken = torch_program if first_is_broken else onnx_program
    broken.write_bytes(broken.read_bytes()[:100])
    engine = open_engine(torch_program, "torch.export", also=[(onnx_program, "onnx")])
    assert engine.platform == ("onnxruntime_onnx" if first_is_broken else "torch_export")
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    name = "torch" if first_is_broken else "onnxruntime"
    assert re.match(rf"engine {name} is not used: {re.escape(str(broken))}: found .+, expected a", warning)


def test_one_that_the_settings_leave_out_is_no_fault(tmp_path, caplog):
    caplog.set_level("INFO")
    torch_program = dense_programs.write_torch(tmp_path / "net.pt2", dense_programs.torch_net())
    also = [(dense_programs.write_onnx(tmp_path / "net.onnx"), "onnx")]
    engine = open_engine(torch_program, "torch.export", also=also, memory_limit_mb=64)
    assert engine.platform == "onnxruntime_onnx"
    (line,) = (r for r in caplog.records if "engine torch is not used: memory_limit_mb" in r.getMessage())
    assert line.levelno == logging.INFO


def test_auto_opens_the_one_engine_of_a_format_without_timing_it(tmp_path):
    engine = open_engine(dense_programs.write_onnx(tmp_path / "net.onnx"), "onnx", undecided=True)
    assert engine.platform == "onnxruntime_onnx"
