"""An op of one's own. A node of type `standardise:Standardise` makes one, with its `config` as keyword arguments."""

import json
from pathlib import Path

import numpy as np

from cube.errors import BadConfig
from predictor.ops.op import Batch, Op, Outputs, Port


class Standardise(Op):
    """Each feature minus its mean, divided by its standard deviation, as the trainer found them."""

    inputs = {"measures": Port("FP32", (-1, 4))}
    outputs = {"features": Port("FP32", (-1, 4))}

    def __init__(self, statistics: Path):
        """statistics: a file with {"mean": [...], "std": [...]}."""
        try:
            said = json.loads(statistics.read_text())
            self.mean, self.std = (np.array(said[name], np.float32).reshape(4) for name in ("mean", "std"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadConfig(str(statistics), repr(error), "4 numbers each for mean and std, as JSON") from error

    def run(self, batch: Batch) -> Outputs:
        return {"features": (batch["measures"] - self.mean) / self.std}
