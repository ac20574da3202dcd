"""Train a small residual net that names shapes, and write it for predictor-server: python train.py [DIR].

The images are drawn here: a circle, a square, a triangle or a cross, of any size and light colour, anywhere on a dark
ground.
"""

import asyncio
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.export import Dim

from predictor.ops.image import DecodeImage
from predictor.ops.op import Batch
from predictor.tensors import texts
from trainer_tools.programs import torch_export

LABELS = ["circle", "cross", "square", "triangle"]
SIDE = 32  # pixels; this and what follows stand in workflow.prototxt too
DECODE = DecodeImage(height=SIDE, width=SIDE, mean=[0.5] * 3, std=[0.25] * 3)
EPOCHS = 3


class Block(torch.nn.Module):
    """Two convolutions beside the way around them, as in ResNet v1; the image's sides are halved."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.first = torch.nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False)
        self.second = torch.nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.around = torch.nn.Conv2d(into, out, 1, stride=2, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(out) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(made)) + self.norms[2](self.around(x)))


class ResNet(torch.nn.Module):
    """pixels float32[n, 3, SIDE, SIDE] → prob float32[n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.Sequential(Block(3, 12), Block(12, 24), Block(24, 48))
        self.out = torch.nn.Linear(48, len(LABELS))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"prob": torch.softmax(self.out(self.blocks(pixels).mean((2, 3))), 1)}


def images(count: int, seed: int) -> tuple[list[bytes], np.ndarray]:
    """PNG files, and the number of each one's label: int64[count]."""
    rng = np.random.default_rng(seed)
    files, labels = [], rng.integers(0, len(LABELS), count)
    for label in labels:
        image = Image.fromarray(rng.integers(0, 80, (48, 48, 3), np.uint8))
        draw, colour = ImageDraw.Draw(image), tuple(map(int, rng.integers(120, 256, 3)))
        r = int(rng.integers(9, 18))
        x, y = map(int, rng.integers(r, 48 - r, 2))
        if LABELS[label] == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif LABELS[label] == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        elif LABELS[label] == "triangle":
            draw.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=colour)
        else:
            draw.line((x - r, y, x + r, y), fill=colour, width=5)
            draw.line((x, y - r, x, y + r), fill=colour, width=5)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files, labels


def pixels_of(files: list[bytes]) -> torch.Tensor:
    """What the net is given for image files, by the op that serves them."""
    batch = Batch(image=texts(files))
    batch.rows, batch.deadline = len(files), None
    return torch.from_numpy(asyncio.run(DECODE.run(batch))["pixels"])


def train(directory: Path) -> torch.nn.Module:
    """Write net, labels and an image of each into directory/model, and return the net."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a net this small gains nothing from more
    files, labels = images(1000, seed=1)
    pixels, targets, net = pixels_of(files), torch.from_numpy(labels), ResNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for start in [at for _ in range(EPOCHS) for at in range(0, len(files), 50)]:
        part = slice(start, start + 50)
        loss = torch.nn.functional.nll_loss(net(pixels[part])["prob"].log(), targets[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    files_new, labels_new = images(400, seed=2)
    with torch.inference_mode():
        right = (net(pixels_of(files_new))["prob"].argmax(1).numpy() == labels_new).mean()
    print(f"{right:.1%} of new images right")
    program = torch.export.export(net, (pixels[:2],), dynamic_shapes=({0: Dim("rows", min=1)},))
    (directory / "model" / "resnet").mkdir(parents=True, exist_ok=True)
    torch_export.save(program, directory / "model" / "resnet" / "program.pt2")
    (directory / "model" / "labels.txt").write_text("\n".join(LABELS) + "\n")
    for file, label in zip(files_new, labels_new, strict=True):
        (directory / "model" / f"{LABELS[label]}.png").write_bytes(file)
    return net


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
