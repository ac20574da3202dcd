"""prune-program on every form of lookup that torch exports: each is cut, and proven to compute the same bits."""

import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import ROOT
from pruned_models import assert_serves, served
from torch.export import Dim

from cube.errors import BadData
from trainer_tools import manifest
from trainer_tools.programs import torch_export
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune, survey
from trainer_tools.pruning import Options

ROWS, DIM = 60, 4
ALL = Options(rules=Rules(min_rows=1))
B, L, K = Dim("B", min=1), Dim("L", min=1, max=100), Dim("K", min=0)


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def saved(directory, model, example, dims, decompose=False):
    """A directory with the program of a model, and nothing else."""
    directory.mkdir()
    torch.manual_seed(0)
    program = torch.export.export(model.eval(), example, dynamic_shapes=dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = program.run_decompositions() if decompose else program
    torch.export.save(program, directory / "program.pt2")
    return directory


def pruned(directory, options=ALL):
    """The report and the manifest of a pruned copy beside it, which a predictor serves, and the program."""
    out = directory.parent / "out"
    report = prune(directory, out, options)
    assert_serves(out)
    said = manifest.read(manifest.Manifest, out / "manifest.json")
    return report, said, torch_export.load(out / "program.pt2")


def asserts_proven(report, program, cut):
    """Every lookup went, and the outputs have the same bits."""
    assert (report.largest_difference, report.largest_ulps, report.compared) == (0, 0, 256)
    assert [c.is_cut for c in report.candidates] == [True] * cut
    assert not torch_export.TorchProgram(program).lookups()


# ---- forms ----


class Bag(torch.nn.Module):
    """Bags by offsets."""

    def __init__(self, **bag):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(ROWS, DIM, **bag)

    def forward(self, ids, offsets):
        return {"score": self.bag(ids, offsets).float().sum(1)}


class WeightedBag(Bag):
    """Bags of ids with weights."""

    def forward(self, ids, offsets, weights):
        return {"score": self.bag(ids, offsets, per_sample_weights=weights).sum(1)}


class Rows(Bag):
    """A bag for each row of a matrix, without offsets."""

    def forward(self, ids):
        return {"score": self.bag(ids).float().sum(1)}


class WeightedRows(Bag):
    """The same, with a weight for each id."""

    def forward(self, ids, weights):
        return {"score": self.bag(ids, per_sample_weights=weights).sum(1)}


class Flags(torch.nn.Module):
    """Every flag that does not matter to a forward run."""

    def __init__(self):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(ROWS, DIM, mode="mean", sparse=True, scale_grad_by_freq=True)
        self.rows = torch.nn.Embedding(ROWS, DIM, sparse=True, scale_grad_by_freq=True, padding_idx=2)
        with torch.no_grad():
            self.rows.weight[2] = 1  # trained or loaded so: forward reads it as it is

    def forward(self, ids):
        return {"score": (self.bag(ids) + self.rows(ids[:, 0])).sum(1)}


class Rowwise(torch.nn.Module):
    """Rows of ids, and what a net does with them."""

    def __init__(self, arrange=lambda ids: ids, pool=lambda rows: rows.flatten(1), dtype=torch.float32):
        super().__init__()
        self.table = torch.nn.Embedding(ROWS, DIM, dtype=dtype)
        self.arrange, self.pool = arrange, pool

    def forward(self, ids):
        return {"score": self.pool(self.table(self.arrange(ids)).float()).sum(1)}


class Parameter(torch.nn.Module):
    """A parameter that is indexed."""

    def __init__(self, take):
        super().__init__()
        self.table, self.take = torch.nn.Parameter(torch.randn(ROWS, DIM)), take

    def forward(self, ids):
        return {"score": self.take(self.table, ids).flatten(1).sum(1)}


BY_OFFSETS = ((ids(6), torch.arange(3)), ({0: K}, {0: B}))
MATRIX = ((ids(3, 5),), ({0: B, 1: L},))
COLUMNS = ((ids(3, 5),), ({0: B},))
TIME_MAJOR = ((ids(5, 3),), ({0: L, 1: B},))
FORMS = {
    "mean": lambda: (Bag(mode="mean"), *BY_OFFSETS),
    "sum": lambda: (Bag(mode="sum"), *BY_OFFSETS),
    "max": lambda: (Bag(mode="max"), *BY_OFFSETS),
    "with an end": lambda: (Bag(include_last_offset=True), (ids(6), torch.arange(4)), ({0: K}, {0: B + 1})),
    "max with an end": lambda: (
        Bag(include_last_offset=True, mode="max"), (ids(6), torch.arange(4)), ({0: K}, {0: B + 1})
    ),
    "mean without padding": lambda: (Bag(mode="mean", padding_idx=3), *BY_OFFSETS),
    "max without padding": lambda: (Bag(mode="max", padding_idx=0), *BY_OFFSETS),
    "padding counted from the end": lambda: (Bag(mode="sum", padding_idx=-1), *BY_OFFSETS),
    "weights": lambda: (
        WeightedBag(mode="sum"), (ids(6), torch.arange(3), torch.ones(6)), ({0: K}, {0: B}, {0: K})
    ),
    "a matrix of any width": lambda: (Rows(mode="mean"), *MATRIX),
    "a matrix": lambda: (Rows(mode="max", padding_idx=1), *COLUMNS),
    "a weighted matrix": lambda: (WeightedRows(mode="sum"), (ids(3, 5), torch.ones(3, 5)), ({0: B}, {0: B})),
    "float16 sums": lambda: (Rows(mode="sum", dtype=torch.float16), *COLUMNS),
    "float16 maxima": lambda: (Rows(mode="max", dtype=torch.float16), *COLUMNS),
    "bfloat16 maxima": lambda: (Rows(mode="max", dtype=torch.bfloat16), *COLUMNS),
    "one id": lambda: (Rowwise(pool=lambda rows: rows), (ids(3),), ({0: B},)),
    "columns of ids": lambda: (Rowwise(), *COLUMNS),
    "sequences, averaged": lambda: (Rowwise(pool=lambda rows: rows.mean(1)), *MATRIX),
    "three dimensions": lambda: (Rowwise(), (ids(3, 5, 2),), ({0: B},)),
    "a column": lambda: (Rowwise(lambda ids: ids[:, 1], lambda rows: rows), *COLUMNS),
    "some columns, stacked": lambda: (Rowwise(lambda ids: torch.stack([ids[:, 4], ids[:, 0]], 1)), *COLUMNS),
    "joined": lambda: (Rowwise(lambda ids: torch.cat([ids[:, :2], ids[:, 3:]], 1).unsqueeze(-1)), *COLUMNS),
    "reshaped": lambda: (Rowwise(lambda ids: ids.reshape(-1, 5, 1).permute(0, 2, 1).contiguous()), *COLUMNS),
    "split": lambda: (Rowwise(lambda ids: ids.split([2, 3], 1)[1].clone()), *COLUMNS),
    "int32": lambda: (Rowwise(), (ids(3, 5).int(),), ({0: B},)),
    "cast from floats": lambda: (Rowwise(lambda ids: ids[:, 2:].long()), (torch.zeros(3, 5),), ({0: B},)),
    "float16 rows": lambda: (Rowwise(dtype=torch.float16), *COLUMNS),
    "bfloat16 rows": lambda: (Rowwise(dtype=torch.bfloat16), *COLUMNS),
    "an indexed parameter": lambda: (Parameter(lambda table, ids: table[ids]), *COLUMNS),
    "selected rows": lambda: (Parameter(lambda table, ids: torch.index_select(table, 0, ids[:, 1])), *COLUMNS),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_lookup_is_cut_and_the_rest_computes_the_same_bits(tmp_path, form):
    report, _, program = pruned(saved(tmp_path / "model", *FORMS[form]()))
    asserts_proven(report, program, 1)


@pytest.mark.parametrize("form", ["mean", "max without padding", "weights", "a matrix of any width", "columns of ids"])
def test_so_is_one_that_torch_has_taken_apart(tmp_path, form):
    report, _, program = pruned(saved(tmp_path / "model", *FORMS[form](), decompose=True))
    asserts_proven(report, program, 1)


def test_weights_beside_padding_are_rounded_in_another_order_by_torch_itself(tmp_path):
    example, dims = (ids(6), torch.arange(3), torch.ones(6)), ({0: K}, {0: B}, {0: K})
    report, said, _ = pruned(saved(tmp_path / "model", WeightedBag(mode="sum", padding_idx=5), example, dims))
    assert report.largest_difference <= 1e-6
    assert (said.lookups[0].weights, said.lookups[0].padding) == ("weights", 5)


def test_flags_of_training_do_not_matter(tmp_path):
    report, said, program = pruned(saved(tmp_path / "model", Flags(), *COLUMNS))
    asserts_proven(report, program, 2)
    assert [lookup.padding for lookup in said.lookups] == [None, None]


class Both(torch.nn.Module):
    """Weighted bags and rows of the same ids, and the weights once more."""

    def __init__(self):
        super().__init__()
        self.bag, self.rows = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum"), torch.nn.Embedding(ROWS, DIM)

    def forward(self, ids, weights):
        return {"score": (self.bag(ids, per_sample_weights=weights) + self.rows(ids).sum(1)).sum(1) + weights.sum(1)}


def test_names_of_a_request_mean_one_thing_each(tmp_path):
    model = saved(tmp_path / "model", Both(), (ids(3, 5), torch.ones(3, 5)), ({0: B}, {0: B}))
    report, said, program = pruned(model)
    asserts_proven(report, program, 2)
    assert [(lookup.keys, lookup.lengths, lookup.weights) for lookup in said.lookups] == [
        ("ids", "ids.lengths", "reshape_1"),
        ("ids.keys", None, None),
    ]
    assert [tensor.name for tensor in said.inputs] == ["weights"]


# ---- constants added to ids ----


class Shifted(torch.nn.Module):
    """One table for three fields, whose rows begin at 0, 10 and 40."""

    def __init__(self, shift, bag=""):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(ROWS, DIM, mode=bag) if bag else torch.nn.Embedding(ROWS, DIM)
        self.register_buffer("begin", torch.tensor([0, 10, 40]))
        self.shift = shift

    def forward(self, ids):
        return {"score": self.table(self.shift(self, ids)).flatten(1).sum(1)}


FIELDS = (ids(3, 3),)
SHIFTS = {
    "a buffer": (lambda m, ids: ids + m.begin, [0, 10, 40]),
    "a buffer, the other way round": (lambda m, ids: m.begin.unsqueeze(0) + ids, [0, 10, 40]),
    "a new tensor": (lambda m, ids: ids + ids.new_tensor([0, 10, 40]).unsqueeze(0), [0, 10, 40]),
    "a computed one": (lambda m, ids: ids + torch.arange(3) * 10, [0, 10, 20]),
    "a number": (lambda m, ids: ids + 1, [1]),
    "a number, subtracted": (lambda m, ids: ids - 2, [-2]),
    "several times": (lambda m, ids: (ids + 1) + m.begin, [1, 11, 41]),
    "to columns": (lambda m, ids: torch.stack([ids[:, 0] + 5, ids[:, 2]], 1), [5, 0]),
    "to int32": (lambda m, ids: ids.int() + m.begin.int(), [0, 10, 40]),
    "none in the end": (lambda m, ids: ids + 1 - 1, []),
}


@pytest.mark.parametrize(
    ("shift", "bag"),
    [(shift, "") for shift in SHIFTS] + [(shift, "mean") for shift in ("a buffer", "a number", "to columns")],
)
def test_constants_added_to_ids_are_in_the_manifest(tmp_path, shift, bag):
    shifted, added = SHIFTS[shift]
    report, said, program = pruned(saved(tmp_path / "model", Shifted(shifted, bag), FIELDS, ({0: B},)))
    asserts_proven(report, program, 1)
    assert said.lookups[0].added == added
    assert (f"; {', '.join(map(str, added))} added to ids" in report.candidates[0].reason) == bool(added)


def test_where_rows_have_keys_of_their_own_a_request_holds_these(tmp_path):
    np.save(tmp_path / "keys.npy", np.arange(ROWS, dtype=np.uint64) * 7)
    model = saved(tmp_path / "model", Shifted(SHIFTS["a buffer"][0]), FIELDS, ({0: B},))
    options = Options(rules=ALL.rules, vocabularies={"table.weight": tmp_path / "keys.npy"})
    report, said, _ = pruned(model, options)
    assert (report.largest_difference, said.lookups[0].added) == (0, [])


class FieldsFm(torch.nn.Module):
    """A weight and a vector for each id, both adding where fields begin, each for itself."""

    def __init__(self):
        super().__init__()
        self.weights, self.vectors = torch.nn.Embedding(ROWS, 1), torch.nn.Embedding(ROWS, DIM)

    def forward(self, x):
        rows = self.vectors(x + x.new_tensor([0, 10, 40]))
        pairs = (rows.sum(1).square() - rows.square().sum(1)).sum(1)
        return self.weights(x + x.new_tensor([0, 10, 40])).sum((1, 2)) + pairs + self.vectors(x + 1).sum((1, 2))


def test_lookups_of_the_same_sums_share_keys_and_others_do_not(tmp_path):
    report, said, program = pruned(saved(tmp_path / "model", FieldsFm(), FIELDS, ({0: B},)))
    asserts_proven(report, program, 3)
    assert sorted((lookup.keys, lookup.added) for lookup in said.lookups) == [
        ("x", [0, 10, 40]),
        ("x", [0, 10, 40]),
        ("x.keys", [1]),
    ]


class Mixed(torch.nn.Module):
    """A lookup of sums that differ between samples, before one of the ids as they are."""

    def __init__(self):
        super().__init__()
        self.stays, self.goes = torch.nn.Embedding(2 * ROWS, DIM), torch.nn.Embedding(ROWS, DIM)

    def forward(self, ids):
        flat = ids.reshape(-1)
        stays = self.stays((ids + torch.arange(5)).reshape(-1)).reshape(-1, 5 * DIM)
        return stays.sum(1) + self.goes(flat.reshape(-1, 5)).sum((1, 2)) + self.goes(ids).sum((1, 2))


class SeveralBags(torch.nn.Module):
    """Bags of three tables over the same ids, each with offsets of its own."""

    def __init__(self, bags):
        super().__init__()
        self.parts = torch.nn.ModuleList(bag(mode=mode) for mode in ("mean", "sum", "max"))
        self.bags = bags

    def forward(self, ids):
        return {"score": sum(self.bags(part, ids, at).sum(1) for at, part in enumerate(self.parts))}


SHARED = {  # how each of three bags finds its ids; the keys of a request
    "a matrix": (lambda part, ids, at: part(ids), ["ids"] * 3),
    "offsets": (
        lambda part, ids, at: part(ids.flatten(), torch.arange(0, ids.shape[0] * ids.shape[1], ids.shape[1])),
        ["ids"] * 3,
    ),
    "a column": (lambda part, ids, at: part(ids[:, 2], torch.arange(ids.shape[0])), ["ids.2"] * 3),
    "columns": (lambda part, ids, at: part(ids[:, at % 2], torch.arange(ids.shape[0])), ["ids.0", "ids.1", "ids.0"]),
    "bags of other lengths": (
        lambda part, ids, at: (
            part(ids) if at else part(ids.flatten(), torch.arange(ids.numel())).unflatten(0, ids.shape).sum(1)
        ),
        ["ids", "ids.keys", "ids.keys"],
    ),
}


@pytest.mark.parametrize("bags", SHARED)
def test_bags_of_the_same_ids_are_fed_them_once(tmp_path, bags):
    """torch makes offsets anew for each, which are the same where they count the same."""
    find, keys = SHARED[bags]
    report, said, program = pruned(saved(tmp_path / "model", SeveralBags(find), *COLUMNS))
    asserts_proven(report, program, 3)
    assert [lookup.keys for lookup in said.lookups] == keys
    assert [lookup.lengths for lookup in said.lookups] == [f"{key}.lengths" for key in keys]
    assert len({lookup.feed for lookup in said.lookups}) == 3


def test_ids_of_a_column_are_named_after_their_input(tmp_path):
    """Not after the node that takes them out of it: select_46."""
    arrange = lambda ids: ids[:, 3]  # noqa: E731
    _, said, _ = pruned(saved(tmp_path / "model", Rowwise(arrange), *COLUMNS))
    assert [(k.keys, k.slots[0].name, k.arranged_from) for k in said.lookups] == [("ids.3", "ids.3", ["ids"])]
    _, said, _ = pruned(saved(tmp_path / "last", Rowwise(lambda ids: ids[:, -1]), *COLUMNS))
    assert said.lookups[0].arranged_from == ["ids"]


def test_ids_are_not_taken_for_sums_that_cannot_be_said(tmp_path):
    report, said, _ = pruned(saved(tmp_path / "model", Mixed(), *COLUMNS))
    assert [candidate.is_cut for candidate in report.candidates] == [False, True, True]
    assert (report.largest_difference, [lookup.added for lookup in said.lookups]) == (0, [[], []])


class Named(torch.nn.Module):
    """Inputs that are called as functions of Python are, which torch calls otherwise."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(ROWS, DIM)

    def forward(self, input, type):
        return {"hash": self.table(input).sum((1, 2)) + type * (input != 0).sum(1)}


def test_inputs_keep_the_names_they_have_in_the_program(tmp_path):
    model = saved(tmp_path / "model", Named(), (ids(3, 5), torch.ones(3)), ({0: B}, {0: B}))
    report, said, program = pruned(model)
    asserts_proven(report, program, 1)
    assert [tensor.name for tensor in said.inputs] == ["input", "type"]
    assert said.lookups[0].keys == "input.keys"


# ---- models ----


def tables(report):
    return {candidate.lookup.table for candidate in report.candidates if candidate.is_cut}


class Dlrm(torch.nn.Module):
    """26 tables of their own, dot products of every pair; ids and offsets of all of them in two inputs."""

    def __init__(self):
        super().__init__()
        self.bags = torch.nn.ModuleList(torch.nn.EmbeddingBag(ROWS + t, DIM, mode="sum") for t in range(26))
        self.bottom, self.top = torch.nn.Linear(13, DIM), torch.nn.Linear(27 * 26 // 2 + DIM, 1)

    def forward(self, dense, ids, offsets):
        low = self.bottom(dense)
        rows = torch.stack([low, *(bag(ids[t], offsets[t]) for t, bag in enumerate(self.bags))], 1)
        row, column = torch.tril_indices(27, 27, -1)
        pairs = torch.bmm(rows, rows.transpose(1, 2))[:, row, column]
        return {"click": torch.sigmoid(self.top(torch.cat([low, pairs], 1)))}


def test_a_dlrm_of_26_tables(tmp_path):
    example = torch.zeros(3, 13), ids(26, 7), torch.zeros(26, 3, dtype=torch.int64)
    report, said, program = pruned(saved(tmp_path / "model", Dlrm(), example, ({0: B}, {1: K}, {1: B})))
    asserts_proven(report, program, 26)
    assert len(said.tables) == 26
    assert [tensor.name for tensor in said.inputs] == ["dense"]
    assert {tuple(lookup.arranged_from) for lookup in said.lookups} == {("ids",)}
    assert len({lookup.keys for lookup in said.lookups}) == 26


class Din(torch.nn.Module):
    """Attention over what a user did before, with the target item in the same table; 0 is no item."""

    def __init__(self):
        super().__init__()
        self.items = torch.nn.Embedding(ROWS, DIM, padding_idx=0)
        self.users = torch.nn.Embedding(ROWS * 2, DIM)
        self.attend, self.top = torch.nn.Linear(4 * DIM, 1), torch.nn.Linear(3 * DIM, 1)

    def forward(self, user, target, history):
        wanted, done = self.items(target), self.items(history)
        each = wanted.unsqueeze(1).expand_as(done)
        scores = self.attend(torch.cat([each, done, each - done, each * done], -1)).squeeze(-1)
        scores = scores.masked_fill(history == 0, -1e9).softmax(1)
        interest = (scores.unsqueeze(-1) * done).sum(1)
        return torch.sigmoid(self.top(torch.cat([self.users(user), wanted, interest], 1)))


def test_a_din_with_a_sequence_and_a_shared_table(tmp_path):
    example = ids(3), ids(3), ids(3, 5)
    report, said, program = pruned(saved(tmp_path / "model", Din(), example, ({0: B}, {0: B}, {0: B, 1: L})))
    asserts_proven(report, program, 3)
    assert tables(report) == {"items.weight", "users.weight"}
    assert [(lookup.keys, lookup.lengths, lookup.feed_shape) for lookup in said.lookups] == [
        ("target", None, [-1, DIM]),
        ("history.keys", None, [-1, -1, DIM]),
        ("user", None, [-1, DIM]),
    ]
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in said.inputs] == [("history", "INT64", [-1, -1])]


class DeepFm(torch.nn.Module):
    """Three fields of one matrix of floats; a weight and a vector for each id, in tables over the same ids."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.ModuleList(torch.nn.Embedding(ROWS + f, 1) for f in range(3))
        self.vectors = torch.nn.ModuleList(torch.nn.Embedding(ROWS + f, DIM) for f in range(3))
        self.deep = torch.nn.Sequential(torch.nn.Linear(3 * DIM + 2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def forward(self, x):
        first = torch.cat([table(x[:, f].long()) for f, table in enumerate(self.linear)], 1).sum(1, keepdim=True)
        vectors = torch.stack([table(x[:, f].long()) for f, table in enumerate(self.vectors)], 1)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1, keepdim=True) / 2
        return torch.sigmoid(first + pairs + self.deep(torch.cat([vectors.flatten(1), x[:, 3:]], 1)))


def test_a_deepfm_whose_ids_are_columns_of_a_matrix_of_floats(tmp_path):
    report, said, program = pruned(saved(tmp_path / "model", DeepFm(), (torch.zeros(3, 5),), ({0: B},)))
    asserts_proven(report, program, 6)
    assert len({lookup.keys for lookup in said.lookups}) == 3, "the two tables of a field share its keys"
    assert [tensor.name for tensor in said.inputs] == ["x"]


class Tied(torch.nn.Module):
    """A table that is the output layer's weight too."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(ROWS, DIM)
        self.out = torch.nn.Linear(DIM, ROWS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.words(ids).mean(1))


def test_a_table_that_other_ops_read_stays_too(tmp_path):
    report, _, program = pruned(saved(tmp_path / "model", Tied(), *COLUMNS))
    asserts_proven(report, program, 1)
    assert report.candidates[0].reason.endswith("the table stays too, for other ops read it")
    assert [tensor.shape for tensor in program.state_dict.values()] == [(ROWS, DIM)]


def test_dimensions_that_varied_still_vary(tmp_path):
    _, _, program = pruned(
        saved(tmp_path / "model", Din(), (ids(3), ids(3), ids(3, 5)), ({0: B}, {0: B}, {0: B, 1: L}))
    )
    run = torch_export.runnable(program)
    for samples, length in ((1, 1), (2, 9), (300, 100)):
        rows = torch.rand(samples, DIM), torch.rand(samples, length, DIM), torch.rand(samples, DIM)
        assert run(ids(samples, length), *rows)[0].shape == (samples, 1)
    assert {int(bounds.upper) for bounds in program.range_constraints.values() if bounds.upper.is_Integer} == {100}


# ---- what stands against a cut ----


class Two(torch.nn.Module):
    """A lookup that can be cut, so that there is something to do, and what a test adds to it."""

    def __init__(self, other, **tables):
        super().__init__()
        self.plain = torch.nn.Embedding(ROWS, DIM)
        self.other = other
        for name, table in tables.items():
            setattr(self, name, table)

    def forward(self, ids):
        return {"score": self.plain(ids).flatten(1).sum(1) + self.other(self, ids).float().flatten(1).sum(1)}


def table(**settings):
    return torch.nn.Embedding(ROWS, DIM, **settings)


def larger():
    return torch.nn.Embedding(2 * ROWS, DIM)


def bag(**settings):
    return torch.nn.EmbeddingBag(ROWS, DIM, **settings)


def all_of_a_bag(model, ids):
    offsets = torch.arange(0, ids.numel(), 5)
    rows, _, sizes, _ = torch.embedding_bag(model.t.weight, ids.reshape(-1), offsets, mode=1)
    return rows * sizes.unsqueeze(1)


OBSTACLES = {
    "its ids are computed by op remainder": lambda: Two(lambda m, ids: m.t(ids * 31 % ROWS), t=table()),
    "its ids are computed by op floor_divide": lambda: Two(lambda m, ids: m.t((ids // 7).unsqueeze(1)), t=table()),
    "to its ids constants are added that are not the same in every sample": lambda: Two(
        lambda m, ids: m.t((ids + torch.arange(5)).reshape(-1)).reshape(-1, 5 * DIM), t=larger()
    ),
    "its ids are computed by op add": lambda: Two(lambda m, ids: m.t(ids + ids), t=larger()),
    "its ids are computed by op mul": lambda: Two(lambda m, ids: m.t(ids * 2), t=larger()),
    "its ids are constants, arange": lambda: Two(lambda m, ids: m.t(torch.arange(5)).sum() + ids, t=table()),
    "its ids are cast to uint8": lambda: Two(lambda m, ids: m.t(ids.to(torch.uint8).int()), t=table()),
    "its rows are float64; a cube's are float32": lambda: Two(lambda m, ids: m.t(ids), t=table(dtype=torch.float64)),
    "its table is no parameter but computed": lambda: Two(
        lambda m, ids: torch.nn.functional.embedding(ids, m.t.weight * 2), t=table()
    ),
    "its output 2 is used too": lambda: Two(all_of_a_bag, t=bag(mode="mean")),
    "its mean is rounded to float16 on the way": lambda: Two(
        lambda m, ids: m.t(ids), t=bag(mode="mean", dtype=torch.float16)
    ),
    "its weights are computed by op softmax": lambda: Two(
        lambda m, ids: m.t(ids, per_sample_weights=ids.float().softmax(1)), t=bag(mode="sum")
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_lookup_that_cannot_be_cut_stays_with_its_reason_and_the_rest_goes(tmp_path, obstacle):
    report, said, _ = pruned(saved(tmp_path / "model", OBSTACLES[obstacle](), *COLUMNS))
    stays = [candidate for candidate in report.candidates if not candidate.is_cut]
    assert len(stays) == 1
    assert stays[0].reason.startswith(obstacle)
    assert list(said.tables) == ["plain.weight"]
    assert report.largest_difference == 0
    with pytest.raises(BadData, match=r"--only, lookup .*: found .*expected a lookup that can be cut"):
        prune(tmp_path / "model", tmp_path / "other", Options(rules=Rules(only=[stays[0].lookup.name])))


# ---- what a predictor cannot tell apart by samples ----


class SomeBags(Bag):
    """Bags that do not belong to samples."""

    def forward(self, x, ids, offsets):
        return {"score": x.sum(1) + self.bag(ids, offsets).sum()}


UNSERVABLE = {
    "its bags have the fixed shape [8], and a request any number of samples": (
        lambda: (Rows(mode="sum"), (ids(8, 5),), None)
    ),
    "its ids have shape [5*s": lambda: (
        Rowwise(lambda ids: ids.reshape(-1), lambda rows: rows.reshape(-1, 5 * DIM)), *COLUMNS
    ),
    "its ids have shape [s": lambda: (Rowwise(pool=lambda rows: rows.sum(0)), *TIME_MAJOR),
    "its ids are a single number": lambda: (Rowwise(pool=lambda rows: rows.unsqueeze(0)), (ids(),), None),
    "output 'score' has shape [5*s": lambda: (Rowwise(pool=lambda rows: rows.flatten(0, 1)), *COLUMNS),
    "its bags have shape [s": lambda: (
        SomeBags(), (torch.zeros(3, 5), ids(9), ids(4)), ({0: B}, {0: K}, {0: L})
    ),
}  # fmt: skip


@pytest.mark.parametrize("made", [table, bag])
def test_what_every_run_would_change_is_refused(tmp_path, made):
    """max_norm scales rows of the table in place, and two requests at once scale them twice."""
    model = saved(tmp_path / "model", Two(lambda m, ids: m.t(ids), t=made(max_norm=1.0)), *COLUMNS)
    with pytest.raises(BadData, match=r"changes its own parameters \(max_norm\)"):
        prune(model, tmp_path / "out", ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    reasons = [candidate.reason for candidate in survey(model, ALL) if not candidate.is_cut]
    assert reasons == ["max_norm: a lookup changes its table"]


RANDOM = {
    "dropout (dropout)": lambda rows: torch.dropout(rows.flatten(1), 0.5, True),
    "rand_like (rand_like)": lambda rows: rows.flatten(1) + torch.rand_like(rows.flatten(1)),
    "bernoulli (bernoulli)": lambda rows: torch.bernoulli(torch.sigmoid(rows.flatten(1))),
}


@pytest.mark.parametrize("samples", [0, 256])
@pytest.mark.parametrize("op", RANDOM)
def test_a_program_that_computes_something_else_in_every_run_is_told_from_a_wrong_result(tmp_path, op, samples):
    model = saved(tmp_path / "model", Rowwise(pool=RANDOM[op]), *COLUMNS)
    why = rf"a program whose own outputs differ from run to run \(random ops: {re.escape(op)}\)"
    with pytest.raises(BadData, match=rf"program\.pt2: found {why}, expected one exported to serve: after model\.eval"):
        prune(model, tmp_path / "out", replace(ALL, verify_samples=samples))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_random_ops_that_no_output_to_serve_depends_on_go(tmp_path):
    class Noisy(Rowwise):
        def forward(self, ids):
            return {**super().forward(ids), "noise": torch.rand_like(self.table(ids))}

    model = saved(tmp_path / "model", Noisy(), *COLUMNS)
    assert prune(model, tmp_path / "out", replace(ALL, fetch=["score"])).largest_difference == 0
    assert torch_export.TorchProgram(torch_export.load(tmp_path / "out" / "program.pt2")).random_ops() == []


def test_dropout_that_is_off_is_no_random_op(tmp_path):
    pool = lambda rows: torch.dropout(rows.flatten(1), 0.5, False)  # noqa: E731
    program = torch_export.load(saved(tmp_path / "model", Rowwise(pool=pool), *COLUMNS) / "program.pt2")
    assert torch_export.TorchProgram(program).random_ops() == []


def test_a_program_of_a_fixed_number_of_samples_is_served_as_it_is(tmp_path):
    report, said, program = pruned(saved(tmp_path / "model", Rowwise(), (ids(8, 5),), None))
    assert report.largest_difference == 0
    assert "takes 8 samples at a time, and no requests are merged: export it with" in report.candidates[0].reason
    assert said.lookups[0].feed_shape == [8, 5, DIM]
    assert not torch_export.TorchProgram(program).lookups()


def test_what_a_fixed_number_of_samples_makes_may_have_any_size(tmp_path):
    """A mark for each word of one sentence; requests are of sentences, each for itself."""
    model = saved(tmp_path / "model", Rowwise(pool=lambda rows: rows[0]), (ids(1, 5),), ({1: L},))
    report, said, _ = pruned(model)
    assert report.largest_difference == 0
    assert [tensor.shape for tensor in said.outputs] == [[-1]]
    lane, answers = served(tmp_path / "out", *({"ids": np.ones((1, n), np.uint64)} for n in (4, 9)))
    assert not lane.batcher.limits.is_on
    assert [answer.outputs["score"].shape for answer in answers] == [(4,), (9,)]


@pytest.mark.parametrize("finding", UNSERVABLE)
def test_what_does_not_go_by_samples_is_refused_before_anything_is_written(tmp_path, finding):
    model = saved(tmp_path / "model", *UNSERVABLE[finding]())
    with pytest.raises(BadData, match=f"no lookup to cut: .* stays: {re.escape(finding)}"):
        prune(model, tmp_path / "out", ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (candidate,) = survey(model, ALL)
    assert not candidate.is_cut
    assert candidate.reason.startswith(finding)


class Branches(torch.nn.Module):
    """A lookup that is always done, and one in each of two branches."""

    def __init__(self):
        super().__init__()
        self.plain, self.t = table(), table()

    def forward(self, ids):
        first, second = lambda ids: self.t(ids).sum((1, 2)), lambda ids: -self.t(ids).sum((1, 2))
        return {"score": self.plain(ids).sum((1, 2)) + torch.cond(ids.sum() > 3, first, second, (ids,))}


def test_lookups_in_branches_stay(tmp_path):
    report, said, _ = pruned(saved(tmp_path / "model", Branches(), *COLUMNS))
    assert [(c.is_cut, c.reason) for c in report.candidates] == [
        (True, "60 rows of 4"),
        (False, "it is inside a loop or a branch"),
        (False, "it is inside a loop or a branch"),
    ]
    assert (list(said.tables), report.largest_difference) == (["plain.weight"], 0)


class Summed(torch.nn.Module):
    """Bags by lengths, which the program sums up to offsets."""

    def __init__(self):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(ROWS, DIM)

    def forward(self, ids, lengths):
        return self.bag(ids, torch.cumsum(lengths, 0) - lengths)


def test_offsets_that_are_computed_are_an_obstacle(tmp_path):
    model = saved(tmp_path / "model", Summed(), (ids(6), ids(3)), ({0: K}, {0: B}))
    with pytest.raises(BadData, match="no lookup to cut: embedding_bag stays: its offsets are computed by op sub"):
        prune(model, tmp_path / "out", ALL)


def test_a_small_table_stays_where_nobody_names_it(tmp_path):
    model = saved(tmp_path / "model", Rowwise(), *COLUMNS)
    with pytest.raises(BadData, match="embedding stays: 60 rows, fewer than --min-rows 1,000"):
        prune(model, tmp_path / "out")


def test_a_program_that_random_ids_do_not_suit_is_written_only_without_proof(tmp_path):
    model = saved(tmp_path / "model", Two(lambda m, ids: m.t(ids * ROWS), t=table()), *COLUMNS)
    with pytest.raises(BadData, match=r"proof: found inputs the program does not run on .*--verify 0"):
        prune(model, tmp_path / "out", ALL)
    report = prune(model, tmp_path / "out", Options(rules=ALL.rules, verify_samples=0))
    assert "nothing was compared (--verify 0)" in str(report)


# ---- size ----

MEASURE = """
import resource, sys
from pathlib import Path
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

small, wide = map(Path, sys.argv[1:])
prune(small, small.with_name("small.out"), Options(rules=Rules(min_rows=1)))  # what torch and kernels take once
before = peak()
prune(wide, wide.with_name("wide.out"))
print(peak() - before)
"""


class Wide(torch.nn.Module):
    """A table and next to nothing else."""

    def __init__(self, rows):
        super().__init__()
        self.table = torch.nn.Embedding(rows, 64)

    def forward(self, ids):
        return self.table(ids).sum((1, 2))


@pytest.mark.slow
def test_a_table_is_in_memory_less_than_twice(tmp_path):
    rows = 500_000
    models = [saved(tmp_path / name, Wide(size), *COLUMNS) for name, size in (("small", 10), ("wide", rows))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *models], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < 2 * rows * 64 * 4
