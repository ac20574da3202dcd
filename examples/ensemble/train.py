"""Train two nets for the same question, and write them for predictor-server: python train.py [DIR].

What the answer goes by is in part linear, which suits the wide one, and in part not, which the deep one can learn.
"""

import sys
from pathlib import Path

import torch
from torch.export import Dim

from trainer_tools.programs import torch_export

FEATURES = 8


class Net(torch.nn.Module):
    """features float32[n, 8] → prob float32[n, 2]."""

    def __init__(self, *layers: torch.nn.Module):
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"prob": torch.softmax(self.layers(features), 1)}


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """features float32[count, 8], labels int64[count]."""
    features = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return features, (features[:, 0] - features[:, 1] + features[:, 2] * features[:, 3] > 0).long()


def train(directory: Path) -> dict[str, torch.nn.Module]:
    """Write both nets into directory/model, and return them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nets this small gain nothing from more
    nets = {
        "wide": Net(torch.nn.Linear(FEATURES, 2)),
        "deep": Net(torch.nn.Linear(FEATURES, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)),
    }
    features, labels = samples(2000, seed=1)
    for name, net in nets.items():
        optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
        for _ in range(150):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(net(features)["prob"].log(), labels).backward()
            optimizer.step()
        (directory / "model" / name).mkdir(parents=True, exist_ok=True)
        program = torch.export.export(net.eval(), (features[:2],), dynamic_shapes=({0: Dim("rows", min=1)},))
        torch_export.save(program, directory / "model" / name / "program.pt2")
    new, truth = samples(1000, seed=2)
    with torch.inference_mode():
        scores = {name: net(new)["prob"] for name, net in nets.items()}
    for name, score in (*scores.items(), ("both", 0.25 * scores["wide"] + 0.75 * scores["deep"])):
        print(f"{name}: {(score.argmax(1) == truth).float().mean():.1%} right")
    return nets


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
