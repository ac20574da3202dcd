"""Reading a line of a page: first the slow part, Python that holds the GIL, then a small net."""

from typing import ClassVar

import numpy as np

from predictor.ops.op import Batch, Op, Outputs, Port

SIDE, LINE = 128, 32  # pixels of a page's side; of a line's height
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PAGE = Port("UINT8", (-1, SIDE, SIDE))
INK = Port("FP32", (-1, LINE, SIDE))
TEXT = Port("FP32", (-1, len(LETTERS)))


class Prepare(Op):
    """Pages → their darkest line of text, straightened, as ink between 0 and 1. 5 to 10 ms a page."""

    inputs: ClassVar = {"page": PAGE}
    outputs: ClassVar = {"ink": INK}

    def run(self, batch: Batch) -> Outputs:
        return {"ink": np.stack([prepared(page) for page in batch["page"]])}


class Recognise(Op):
    """Ink → a score for each letter, by a net of fixed random weights: what it reads is of no interest here."""

    inputs: ClassVar = {"ink": INK}
    outputs: ClassVar = {"letters": TEXT}

    def __init__(self) -> None:
        draw = np.random.default_rng(1)
        self._first = draw.normal(0, 0.02, (LINE * SIDE, 256)).astype(np.float32)
        self._second = draw.normal(0, 0.1, (256, len(LETTERS))).astype(np.float32)

    def run(self, batch: Batch) -> Outputs:
        hidden = np.maximum(batch["ink"].reshape(batch.rows, -1) @ self._first, 0)
        return {"letters": hidden @ self._second}


class PrepareAndRecognise(Op):
    """Both in one op."""

    inputs: ClassVar = Prepare.inputs
    outputs: ClassVar = Recognise.outputs

    def __init__(self) -> None:
        self._prepare, self._recognise = Prepare(), Recognise()

    def run(self, batch: Batch) -> Outputs:
        line = Batch(self._prepare.run(batch))
        line.rows, line.deadline = batch.rows, batch.deadline
        return self._recognise.run(line)


def prepared(page: np.ndarray) -> np.ndarray:
    """float32[LINE, SIDE] of one page, uint8[SIDE, SIDE]. Slow on purpose, as code that was never vectorised is."""
    threshold = _threshold(page)
    ink = [[max(threshold - pixel, 0) / 255 for pixel in row] for row in page.tolist()]
    darkness = [sum(row) for row in ink]
    sums = [sum(darkness[top : top + LINE]) for top in range(SIDE - LINE + 1)]
    top = max(range(len(sums)), key=sums.__getitem__)
    return np.array(ink[top : top + LINE], np.float32)


def _threshold(page: np.ndarray) -> int:
    """The grey that parts the page best into light and dark, by Otsu's rule."""
    counts = [0] * 256
    for row in page.tolist():
        for pixel in row:
            counts[pixel] += 1
    total, mass = page.size, sum(grey * count for grey, count in enumerate(counts))
    best, best_spread, below, below_mass = 0, -1.0, 0, 0
    for grey, count in enumerate(counts):
        below += count
        below_mass += grey * count
        if 0 < below < total:
            spread = (mass * below / total - below_mass) ** 2 / (below * (total - below))
            if spread > best_spread:
                best, best_spread = grey, spread
    return best
