"""What Paddle answered for the golden programs (tests/golden/make_paddle_answers.py)."""

import numpy as np
from places import GOLDEN

ANSWERS = np.load(GOLDEN / "paddle-answers.npz")


def answered(name, kind):
    """Arrays that Paddle was given ("in", "lod") or answered ("out"), by the name of the variable."""
    prefix = f"paddle-{name}|{kind}|"
    return {key.removeprefix(prefix): ANSWERS[key] for key in ANSWERS.files if key.startswith(prefix)}
