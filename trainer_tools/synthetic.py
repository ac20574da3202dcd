"""Criteo lines with a known truth: Zipf-distributed categories, a click model of ours, so the best AUC is known.

logit(click) = BIAS + Σ slots effect[slot, category] + Σ integers weight[i] · normalised[i], blanks adding 0. Effects
are normal, drawn once per category. No model can rank better than the true probability does.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cube.kernels import U, kernel, mix
from trainer_tools.criteo import DENSE_MIN, DENSE_RANGE, INTEGERS, SLOTS

CATEGORIES = np.geomspace(8, 30_000, SLOTS).astype(np.int64)  # distinct values of each slot
BIAS, EFFECT, BLANK_SHARE = -1.6, 0.3, 0.06
_CHUNK_LINES = 50_000
_LINE_BYTES = 2 + INTEGERS * 8 + SLOTS * 9


@kernel
def _write(labels, integers, categories, out):  # type: ignore[no-untyped-def]
    """integers: int64[n, 13] and categories.

    Int64[n, 26], negative where blank (integers: below -3). Returns bytes written.
    """
    at, digits = 0, np.empty(20, np.uint8)
    for i in range(labels.size):
        out[at] = 48 + labels[i]
        at += 1
        for j in range(integers.shape[1]):
            out[at] = 9
            at += 1
            x = integers[i, j]
            if x < -3:
                continue
            if x < 0:
                out[at] = 45
                at, x = at + 1, -x
            count = 0
            while count == 0 or x > 0:  # ends: x falls tenfold a turn
                digits[count] = 48 + x % 10
                count, x = count + 1, x // 10
            for d in range(count):
                out[at] = digits[count - 1 - d]
                at += 1
        for j in range(categories.shape[1]):
            out[at] = 9
            at += 1
            if categories[i, j] < 0:
                continue
            h = mix(U(categories[i, j]) ^ (U(j + 1) << U(40)))
            for d in range(8):
                nibble = (h >> U(4 * d)) & U(15)
                out[at] = nibble + U(48) if nibble < U(10) else nibble + U(87)
                at += 1
        out[at] = 10
        at += 1
    return at


def write(
    path: Path, lines: int, seed: int, progress: Callable[[int], object] = lambda lines: None
) -> NDArray[np.float32]:
    """Write tab-separated Criteo lines to `path`; returns the true click probability of each, float32[lines]."""
    rng = np.random.default_rng(seed)
    effects = [rng.normal(0, EFFECT, count).astype(np.float32) for count in CATEGORIES]
    weights = rng.normal(0, 0.4, INTEGERS)
    truth = []
    with path.open("wb") as file:
        for start in range(0, lines, _CHUNK_LINES):
            n = min(_CHUNK_LINES, lines - start)
            # P(category <= r) = log(r + 1) / log(count): Zipf with exponent 1, without a table
            categories = np.exp(rng.random((n, SLOTS)) * np.log(CATEGORIES)).astype(np.int64)
            integers = np.floor(DENSE_MIN + DENSE_RANGE * rng.exponential(0.4, (n, INTEGERS))).astype(np.int64)
            no_category, no_integer = rng.random((n, SLOTS)) < BLANK_SHARE, rng.random((n, INTEGERS)) < BLANK_SHARE
            effect = np.stack([e[categories[:, s] - 1] for s, e in enumerate(effects)], axis=1)
            dense = np.where(no_integer, 0, (integers - DENSE_MIN) / DENSE_RANGE)
            logit = BIAS + np.where(no_category, 0, effect).sum(axis=1) + dense @ weights
            probability = 1 / (1 + np.exp(-logit))
            labels = (rng.random(n) < probability).astype(np.int8)
            out = np.empty(n * _LINE_BYTES * 2, np.uint8)
            used = _write(labels, np.where(no_integer, -9, integers), np.where(no_category, -1, categories), out)
            file.write(out[:used].data)
            truth.append(probability.astype(np.float32))
            progress(n)
    return np.concatenate(truth)
