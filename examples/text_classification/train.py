"""Train three nets that tell good reviews from bad ones, and write them for predictor-server: python train.py [DIR].

The reviews are made up: words that praise, words that blame, and words that turn the next one round ("not good"), among
others. A bag of words cannot see the turn; the convolution and the LSTM can.
"""

import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim

from predictor.ops.op import Batch
from predictor.ops.text import Tokenise, padded
from predictor.tensors import texts
from trainer_tools.programs import torch_export

LENGTH = 24  # words of a review that a net sees, as in workflow.prototxt
GOOD = ["good", "great", "fine", "superb", "lovely", "moving", "funny", "clever", "warm", "brilliant"]
BAD = ["bad", "awful", "dull", "boring", "weak", "silly", "cold", "clumsy", "empty", "dreadful"]
TURNS = ["not", "never", "hardly"]
OTHER = ["the", "a", "this", "film", "story", "cast", "was", "is", "and", "ending", "music", "first", "act", "scene"]
WORDS = ["<pad>", "<unk>", *GOOD, *BAD, *TURNS, *OTHER]
WIDTH, EPOCHS = 16, 5


class Bow(torch.nn.Module):
    """The mean of the words' vectors. As all three: words int64[n, 24], words_mask bool[n, 24] → prob float32[n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(WORDS), WIDTH)
        self.out = torch.nn.Linear(WIDTH, 2)

    def forward(self, words: torch.Tensor, words_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"prob": torch.softmax(self.out(mean(self.words(words), words_mask)), 1)}


class Cnn(torch.nn.Module):
    """What is strongest anywhere among windows of three words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(WORDS), WIDTH)
        self.windows = torch.nn.Conv1d(WIDTH, 2 * WIDTH, 3, padding=1)
        self.out = torch.nn.Linear(2 * WIDTH, 2)

    def forward(self, words: torch.Tensor, words_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.relu(self.windows((self.words(words) * words_mask[:, :, None]).transpose(1, 2)))
        return {"prob": torch.softmax(self.out((found * words_mask[:, None]).sum(2)), 1)}


class Lstm(torch.nn.Module):
    """The mean of what an LSTM makes of each word and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(WORDS), WIDTH)
        self.lstm = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = torch.nn.Linear(WIDTH, 2)

    def forward(self, words: torch.Tensor, words_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        made, _ = self.lstm(self.words(words))
        return {"prob": torch.softmax(self.out(mean(made, words_mask)), 1)}


def mean(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the vectors that are no padding: [n, width]."""
    weights = mask[:, :, None].to(vectors.dtype)
    return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1)


NETS = {"bow": Bow, "cnn": Cnn, "lstm": Lstm}


def reviews(count: int, seed: int) -> tuple[list[bytes], np.ndarray]:
    """Texts, and of each whether it is good: int64[count]."""
    rng = random.Random(seed)
    said, labels = [], np.zeros(count, np.int64)
    while len(said) < count:
        words, praise = [], 0
        for _ in range(rng.randrange(1, 7)):
            words += rng.choices(OTHER, k=rng.randrange(3))
            is_good, is_turned = rng.random() < 0.5, rng.random() < 0.3
            words += [*rng.choices(TURNS, k=is_turned), rng.choice(GOOD if is_good else BAD)]
            praise += 1 if is_good != is_turned else -1
        if praise:
            labels[len(said)] = praise > 0
            said.append(" ".join(words).capitalize().encode() + b".")
    return said, labels


def net_inputs(said: list[bytes], vocabulary: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a net is given for texts, by the op that serves them, so that served and trained words are the same."""
    ids = Tokenise(vocabulary, split="words").run(Batch(text=texts(said)))["ids"]
    words, mask = padded(ids, LENGTH)
    return torch.from_numpy(words), torch.from_numpy(mask)


def train(directory: Path) -> dict[str, torch.nn.Module]:
    """Write vocabulary and nets into directory/model, and return the nets."""
    torch.set_num_threads(1)  # nets this small gain nothing from more
    vocabulary = directory / "model" / "vocabulary.txt"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("\n".join(WORDS) + "\n")
    said, labels = reviews(2000, seed=1)
    words, mask = net_inputs(said, vocabulary)
    trained = {}
    for name, kind in NETS.items():
        torch.manual_seed(0)
        net, targets = kind(), torch.from_numpy(labels)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for start in [at for _ in range(EPOCHS) for at in range(0, len(said), 100)]:
            part = slice(start, start + 100)
            loss = torch.nn.functional.nll_loss(net(words[part], mask[part])["prob"].log(), targets[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save(net.eval(), (words[:2], mask[:2]), vocabulary.parent / name)
        said_new, labels_new = reviews(1000, seed=2)
        right = (net(*net_inputs(said_new, vocabulary))["prob"].argmax(1).numpy() == labels_new).mean()
        print(f"{name}: {right:.1%} of new reviews right")
        trained[name] = net
    return trained


def save(net: torch.nn.Module, example: tuple[torch.Tensor, ...], directory: Path) -> None:
    """Write a net as a program that takes any number of rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes self.lstm")  # torch's own, of every exported LSTM
        program = torch.export.export(net, example, dynamic_shapes=({0: Dim("rows", min=1)},) * len(example))
    directory.mkdir(exist_ok=True)
    torch_export.save(program, directory / "program.pt2")


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
