"""Train the CTR-DNN of the demo, cut its table out, and leave both for predictor-server: python train.py [DIR].

model/ is what a trainer writes, model.pruned/ what is served: a dense program, a manifest and a local cube of rows.
"""

import sys
from pathlib import Path

from trainer_tools import criteo, synthetic, train_ctr
from trainer_tools.prune_program import prune

LINES, SEED = 3000, 7


def train(directory: Path) -> Path:
    """Write everything into directory; returns the file of the lines it trained on."""
    lines, model = directory / "lines.tsv", directory / "model"
    synthetic.write(lines, LINES, SEED)
    model.mkdir(exist_ok=True)
    trained = train_ctr.train(criteo.read(lines, LINES), SEED)
    train_ctr.save(trained, "ctr_prediction", 1, model)
    prune(model, directory / "model.pruned")
    return lines


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
