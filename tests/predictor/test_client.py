"""The CTR client: the same keys as everybody, one version per file, every error seen."""

import asyncio
import json

import numpy as np
import pytest
from places import GOLDEN

from cube.errors import BadData, BadRequest, Overloaded
from predictor.client.ctr import batches_of, score
from predictor.client.inference import Answer
from trainer_tools import synthetic


def test_the_client_sends_the_golden_keys(tmp_path):
    cases = [
        case
        for case in json.loads((GOLDEN / "signs.json").read_text())["signs"]
        if 1 <= case["slot"] <= 26 and case["text"] and set(case["text"]) <= set("0123456789abcdefABCDEF")
    ]
    lines = []
    for case in cases:
        cells = ["0"] + [""] * 39
        cells[13 + case["slot"]] = case["text"]
        lines.append("\t".join(cells))
    (tmp_path / "lines.tsv").write_text("\n".join(lines))
    keys = [key for batch in batches_of(tmp_path / "lines.tsv", 2) for key in batch.keys.tolist()]
    assert keys == [case["key"] for case in cases]


class Predictor:
    """Answers like AsyncClient.infer, out of order, and as told."""

    def __init__(self, version=lambda n: "1", width=2, error=None):
        self.calls, self._version, self._width, self._error = 0, version, width, error

    async def metadata(self, model, timeout_s):
        pass

    async def infer(self, model, inputs, outputs, timeout_s):
        self.calls += 1
        number = self.calls
        await asyncio.sleep(0.001 * (number % 3))
        if self._error and number == 3:
            raise self._error
        dense = inputs["dense"]
        prob = np.repeat(dense[:, :1], self._width, axis=1)
        facts = {"keys": inputs["keys"].size, "keys_absent": 1, "table.t": f"{self._version(number)}@0"}
        return Answer({"prob": prob}, model, self._version(number), facts)


@pytest.fixture
def file(tmp_path):
    synthetic.write(tmp_path / "lines.tsv", 100, seed=2)
    return tmp_path / "lines.tsv"


def scored(predictor, file, size=7):
    return asyncio.run(score(predictor, "m", batches_of(file, size), concurrency=4, timeout_s=1))


def test_scores_come_in_the_order_of_the_lines_whatever_the_order_of_the_answers(file):
    got = scored(Predictor(), file)
    want = np.concatenate([batch.dense[:, 0] for batch in batches_of(file, 100)])
    assert np.array_equal(got.scores, want)
    summary = got.summary()
    assert (summary["samples"], summary["requests"], summary["keys_absent"]) == (100, 15, 15)
    assert summary["table_versions"] == {"t": "1@0"}
    assert summary["p50_ms"] <= summary["p99_ms"]


def test_answers_of_different_versions_are_refused(file):
    with pytest.raises(BadRequest, match="answers: found 2 combinations of versions, expected one"):
        scored(Predictor(version=lambda number: str(number // 9)), file)


def test_the_first_error_ends_the_run(file):
    with pytest.raises(ExceptionGroup) as raised:
        scored(Predictor(error=Overloaded("full")), file)
    assert raised.group_contains(Overloaded)


def test_a_model_that_does_not_answer_two_classes_is_refused(file):
    with pytest.raises(ExceptionGroup) as raised:
        scored(Predictor(width=3), file)
    assert raised.group_contains(BadRequest, match=r"output 'prob': found shape \[7, 3\], expected \[7, 2\]")


def test_no_lines_at_all_are_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(BadData, match="lines to score: found none"):
        scored(Predictor(), tmp_path / "empty")
