"""Train a net on standardised measures, and write both for predictor-server: python train.py [DIR]."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim

from trainer_tools.programs import torch_export

KINDS = 3
# Made up after Fisher's irises: mean of sepal length and width, petal length and width of each kind, centimetres.
CENTRES = np.array([[5.0, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3.0, 5.6, 2.0]])


class Net(torch.nn.Module):
    """features float32[n, 4] → prob float32[n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, KINDS))

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"prob": torch.softmax(self.layers(features), 1)}


def flowers(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Measures float32[count, 4], kinds int64[count]."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, KINDS, count)
    return (CENTRES[kinds] + rng.normal(0, 0.25, (count, 4))).astype(np.float32), kinds


def train(directory: Path) -> torch.nn.Module:
    """Write net and statistics into directory/model, and return the net."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a net this small gains nothing from more
    measures, kinds = flowers(600, seed=1)
    mean, std = measures.mean(0), measures.std(0)
    features, labels, net = torch.from_numpy((measures - mean) / std), torch.from_numpy(kinds), Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(net(features)["prob"].log(), labels).backward()
        optimizer.step()
    (directory / "model" / "iris").mkdir(parents=True, exist_ok=True)
    program = torch.export.export(net.eval(), (features[:2],), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch_export.save(program, directory / "model" / "iris" / "program.pt2")
    statistics = {"mean": mean.tolist(), "std": std.tolist()}
    (directory / "model" / "statistics.json").write_text(json.dumps(statistics))
    measures_new, kinds_new = flowers(300, seed=2)
    with torch.inference_mode():
        found = net(torch.from_numpy((measures_new - mean) / std))["prob"].argmax(1).numpy()
    print(f"{(found == kinds_new).mean():.1%} of new flowers right")
    return net


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
