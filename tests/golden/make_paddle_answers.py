"""Writes paddle-answers.npz, what Paddle answers for the programs in paddle-*: run by hand from the repository,

    python tests/golden/make_paddle_answers.py PYTHON_WITH_PADDLE

Keys: MODEL|in|NAME, MODEL|lod|NAME (offsets of the innermost level, of ragged inputs), MODEL|out|NAME.
"""

import sys
from pathlib import Path

import numpy as np

from trainer_tools import paddle_proof
from trainer_tools.feeding import Sequences
from trainer_tools.programs import paddle

GOLDEN = Path(__file__).parent
SAMPLES = 12

answers = {}
for place in sorted(GOLDEN.glob("paddle-*/")):
    program = paddle.load(place)
    if not program.outputs() or place.name.endswith("loop"):
        continue  # names no outputs; holds ops that Paddle 3 lacks
    serving = program.serving()
    given = paddle_proof._random_inputs(program, serving, SAMPLES, joined="tagger" in place.name)
    for name, value in given.items():
        answers[f"{place.name}|in|{name}"] = value.values if isinstance(value, Sequences) else value
        if isinstance(value, Sequences):
            answers[f"{place.name}|lod|{name}"] = value.offsets
    for name, value in paddle_proof._run(sys.argv[1], program, place, given).items():
        answers[f"{place.name}|out|{name}"] = value.values if isinstance(value, Sequences) else value
np.savez_compressed(GOLDEN / "paddle-answers.npz", **answers)
