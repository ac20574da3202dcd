"""A trained program of two tables, as a trainer would leave it: what the tests prune and serve."""

import json

import numpy as np
import torch
from torch.export import Dim

SLOTS, DIM = 3, 4


class Net(torch.nn.Module):
    """Two tables, one of them read twice in one program by different inputs."""

    def __init__(self, mode="mean", **bag):
        super().__init__()
        torch.manual_seed(1)
        self.users = torch.nn.EmbeddingBag(11, DIM, mode=mode, include_last_offset=True, **bag)
        self.items = torch.nn.EmbeddingBag(7, 2, mode="sum", include_last_offset=True)
        self.top = torch.nn.Linear(SLOTS * DIM + 2 + 5, 1)
        with torch.no_grad():
            self.users.weight[10] = 0
            self.items.weight[6] = 0

    def forward(self, x, user_ids, user_offsets, item_ids, item_offsets):
        users = self.users(user_ids, user_offsets).reshape(x.shape[0], SLOTS * DIM)
        items = self.items(item_ids, item_offsets)
        return {"score": torch.sigmoid(self.top(torch.cat([users, items, x], dim=1)))}


def export(net, path):
    samples, users, items = Dim("samples", min=1), Dim("users", min=0), Dim("items", min=0)
    example = (
        torch.zeros(2, 5), torch.zeros(4, dtype=torch.int64), torch.arange(2 * SLOTS + 1),
        torch.zeros(3, dtype=torch.int64), torch.arange(3),
    )  # fmt: skip
    dims = ({0: samples}, {0: users}, {0: SLOTS * samples + 1}, {0: items}, {0: samples + 1})
    torch.export.save(torch.export.export(net.eval(), example, dynamic_shapes=dims), path)


def lookup(name, table, slots, **changes):
    said = {
        "ids": f"{name}_ids",
        "offsets": f"{name}_offsets",
        "slots": [{"name": f"{name}{i}", "number": i} for i in range(slots)],
        "table": table,
        "vocabulary": f"{name}.npy",
    }
    return said | changes


def written(directory):
    """The model's directory: program, vocabularies, signature."""
    directory.mkdir()
    export(Net(), directory / "program.pt2")
    np.save(directory / "user.npy", np.random.default_rng(1).integers(0, 2**64, 10, dtype=np.uint64))
    np.save(directory / "item.npy", np.arange(6, dtype=np.uint64))
    said = {
        "schema": 1,
        "name": "two-towers",
        "version": 42,
        "program": "program.pt2",
        "sign": "xxh64(text, seed=slot)",
        "lookups": [lookup("user", "users", SLOTS), lookup("item", "items", 1)],
    }
    (directory / "signature.json").write_text(json.dumps(said))
    return directory
