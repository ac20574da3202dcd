"""prune-program --format and --check: rows in fewer bits, and what that does to scores, or nothing is written."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from places import GOLDEN
from sklearn.metrics import roc_auc_score
from torch.export import Dim
from two_towers import DIM, SLOTS, written

from cube.client import LocalCube
from cube.errors import BadData
from cube.rows import RowFormat
from trainer_tools import accuracy, manifest, synthetic, train_ctr
from trainer_tools.accuracy import Wanted
from trainer_tools.programs import torch_export
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

SAMPLES = 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return written(tmp_path_factory.mktemp("trained") / "two-towers")


@pytest.fixture
def model(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "two-towers")


@pytest.fixture(scope="module")
def said(trained, tmp_path_factory):
    """The manifest of the two towers."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(trained, out, asking("f32"))
    return manifest.read(manifest.Manifest, out / "manifest.json")


@pytest.fixture
def request_arrays(trained):
    """A request of 200 samples to the two towers, one key in ten unknown."""
    rng = np.random.default_rng(3)
    made = {"x": rng.random((SAMPLES, 5), dtype=np.float32)}
    for name, slots in (("user", SLOTS), ("item", 1)):
        lengths = rng.integers(0, 4, (SAMPLES, slots))
        keys = rng.choice(np.append(np.load(trained / f"{name}.npy"), np.uint64(12345)), lengths.sum())
        made |= {f"{name}_ids_keys": keys, f"{name}_ids_lengths": lengths}
    return made


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def asking(row_format="i8", data=None, most=None):
    return Options(verify_samples=8, wanted=Wanted(RowFormat.parse(row_format), data, most))


def scores(out, arrays, decoded=lambda rows: rows):
    """The slow twin: rows looked up one by one, changed as a format does, pooled by numpy, run by torch."""
    said = manifest.read(manifest.Manifest, out / "manifest.json")
    feeds = [torch.from_numpy(arrays["x"])]
    for lookup in said.lookups:
        keys, rows = (np.load(out / "rows" / lookup.table / f"{part}.npy") for part in ("keys", "rows"))
        table = dict(zip(keys.tolist(), decoded(rows), strict=True))
        ends = np.cumsum(arrays[lookup.lengths])
        bags = [
            [table.get(key, np.zeros(rows.shape[1], np.float32)) for key in bag.tolist()]
            for bag in np.split(arrays[lookup.keys], ends)[:-1]
        ]
        sums = np.array([np.sum(bag, 0) if bag else np.zeros(rows.shape[1]) for bag in bags], np.float32)
        counts = np.maximum(1, arrays[lookup.lengths].ravel())[:, None] if lookup.pooling == "mean" else 1
        feeds.append(torch.from_numpy(np.float32(sums / counts)))
    (score,) = torch_export.runnable(torch_export.load(out / "program.pt2"))(*feeds)
    return score.detach().numpy().ravel()


def as_i8(rows):
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    scale = np.where(high > low, (high - low) / np.float32(255), 1)
    return (np.round((rows - low) / scale) * scale + low).astype(np.float32)


@pytest.mark.parametrize(
    ("row_format", "decoded", "most"),
    [("f32", lambda rows: rows, 0), ("f16", lambda rows: np.float32(np.float16(rows)), 1e-3), ("i8", as_i8, 2e-2)],
    ids=["f32", "f16", "i8"],
)
def test_scores_and_auc_with_a_row_format_are_those_of_a_slow_twin(
    model, tmp_path, request_arrays, row_format, decoded, most
):
    labels = np.random.default_rng(1).integers(0, 2, SAMPLES)
    data = saved(tmp_path / "data.npz", request_arrays | {"label": labels})
    report = prune(model, tmp_path / "out", asking(row_format, data))
    found = report.accuracy
    exact, coded = scores(tmp_path / "out", request_arrays), scores(tmp_path / "out", request_arrays, decoded)
    assert found.samples == SAMPLES
    assert found.largest_change == pytest.approx(np.abs(exact - coded).max(), abs=2e-7)
    assert found.mean_change == pytest.approx(np.abs(exact - coded).mean(), abs=2e-7)
    assert (found.largest_change > 0) == (row_format != "f32")
    assert found.largest_change <= most
    assert found.auc == pytest.approx((roc_auc_score(labels, exact), roc_auc_score(labels, coded)), abs=1e-3)
    assert report.largest_difference == 0, "the proof is of exact rows"
    assert f"{row_format} rows on 200 samples of {data}: scores change by at most" in str(report)
    assert json.loads(report.json())["accuracy"]["samples"] == SAMPLES


@pytest.mark.parametrize("row_format", ["f32", "f16", "bf16", "i8"])
def test_the_local_cube_has_the_format_and_the_rows_for_cube_build_are_exact(model, tmp_path, row_format):
    report = prune(model, tmp_path / "out", asking(row_format))
    keys, rows = (np.load(tmp_path / "out" / "rows" / "users" / f"{part}.npy") for part in ("keys", "rows"))
    assert np.array_equal(
        rows, torch_export.TorchProgram(torch_export.load(model / "program.pt2")).table("users.weight")[:10]
    )
    cube = LocalCube(tmp_path / "out" / "cube")
    coded = RowFormat.parse(row_format).encode(rows)
    assert np.array_equal(cube.rows("users", None, keys).rows, decoded_rows(RowFormat.parse(row_format), coded))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cube",
        "manifest.json",
        "program.pt2",
        "rows",
    ]
    assert ("not known (--check)" in str(report)) == (row_format != "f32")


def decoded_rows(row_format, coded):
    from cube.rows import decode

    out = np.empty((len(coded), DIM), np.float32)
    decode(row_format, coded, out)
    return out


def test_scores_do_not_depend_on_how_the_data_are_split(model, tmp_path, request_arrays, monkeypatch):
    data = saved(tmp_path / "data.npz", request_arrays)
    whole = prune(model, tmp_path / "out", asking(data=data)).accuracy
    monkeypatch.setattr(accuracy, "BATCH", 7)
    split = prune(model, tmp_path / "out", asking(data=data)).accuracy
    assert split.samples == whole.samples
    assert split.largest_change == pytest.approx(whole.largest_change, abs=1e-6)  # torch adds up batches differently
    assert split.mean_change == pytest.approx(whole.mean_change, abs=1e-7)
    assert whole.auc is None


def spoil(model, path):
    """Give every row of the first table one large element, beside which i8 tells the others no longer apart."""
    program = torch_export.load(model / "program.pt2")
    with torch.no_grad():
        program.state_dict["users.weight"][:10, 0] = 1e4
        program.state_dict["top.weight"][:, ::DIM] = 0
    torch_export.save(program, model / "program.pt2")


def test_an_auc_that_falls_too_far_is_refused_and_nothing_is_written(model, tmp_path, request_arrays):
    spoil(model, tmp_path)
    prune(model, tmp_path / "exact", asking("f32"))
    exact = scores(tmp_path / "exact", request_arrays)
    labels = (exact > np.median(exact)).astype(np.float32)
    data = saved(tmp_path / "data.npz", request_arrays | {"label": labels})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BadData, match=r"out accuracy: found an AUC of 0\.\d+ with i8 rows, 1\.0+ with those trained"):
        prune(model, tmp_path / "out", asking("i8", data, 0.01))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert prune(model, tmp_path / "out", asking("f16", data, 0.01)).accuracy.auc_loss <= 0.01


def test_a_number_beyond_a_format_is_refused_by_table(model, tmp_path):
    program = torch_export.load(model / "program.pt2")
    with torch.no_grad():
        program.state_dict["users.weight"][3, 1] = 1e6
    torch_export.save(program, model / "program.pt2")
    with pytest.raises(
        BadData, match=r"table 'users' key \d+: found 1e\+06, expected a number within the range of f16"
    ):
        prune(model, tmp_path / "out", asking("f16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.pop("x"), "found no 'x', expected the inputs of a request: x, user_ids_keys"),
        (lambda a: a.update(lable=a["x"]), "found an array 'lable'"),
        (lambda a: a.update(x=a["x"][:, :4]), r"'x': found float32 \[200, 4\], expected FP32 \[-1, 5\]"),
        (lambda a: a.update(x=a["x"] > 0), r"'x': found bool"),
        (lambda a: a.update(x=a["x"][:100]), "found 100 in 'x', 200 in 'user_ids_lengths'"),
        (lambda a: a.update(user_ids_keys=-np.ones(a["user_ids_keys"].size, int)), "found numbers from -1"),
        (lambda a: a.update(user_ids_keys=a["user_ids_keys"][1:]), "'user_ids_lengths': found lengths that sum to"),
        (lambda a: a["user_ids_lengths"].__setitem__((0, 0), -1), "'user_ids_lengths': found lengths that sum to"),
        (lambda a: a.update(label=np.arange(SAMPLES)), "'label': found int64 .*, expected 0 or 1 for each of 200"),
        (lambda a: a.update(label=np.ones(3)), "'label': found float64"),
        (lambda a: a.update(label=np.array([object()] * SAMPLES)), "Object arrays cannot be loaded|allow_pickle"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused(said, tmp_path, request_arrays, edit, message):
    edit(request_arrays)
    data = saved(tmp_path / "data.npz", request_arrays)
    with pytest.raises(BadData, match=message):
        accuracy.read(data, said)


@pytest.mark.parametrize("labels", [{}, {"label": np.ones(SAMPLES)}], ids=["none", "of one kind"])
def test_a_limit_needs_labels_and_without_them_nothing_is_written(model, tmp_path, request_arrays, labels):
    data = saved(tmp_path / "data.npz", request_arrays | labels)
    with pytest.raises(BadData, match=r"--max-auc-loss: found .* without labels of both kinds"):
        prune(model, tmp_path / "out", asking("i8", data, 0.5))
    assert not (tmp_path / "out").exists()


def test_data_without_a_sample_are_refused(said, tmp_path, request_arrays):
    data = accuracy.read(saved(tmp_path / "data.npz", {name: a[:0] for name, a in request_arrays.items()}), said)
    with pytest.raises(BadData, match=r"data\.npz: found no samples, expected at least one"):
        accuracy.measure("i8", data, len, len)


def test_files_that_are_no_data_are_refused(said, model, tmp_path, request_arrays):
    whole = saved(tmp_path / "data.npz", request_arrays).read_bytes()
    for name, content, message in (
        ("half.npz", whole[: len(whole) // 2], r"half\.npz: found .*, expected an \.npz of plain arrays"),
        (
            "lines.tsv",
            b"0\t1\t2\n",
            r"lines\.tsv: found a file that is no \.npz, for a program that does not take Criteo",
        ),
        ("empty", b"", "empty: found a file that is no .npz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadData, match=message):
            list(accuracy.read(tmp_path / name, said).batches)
    with pytest.raises(BadData, match="nowhere: found No such file"):
        prune(model, tmp_path / "out", asking("i8", tmp_path / "nowhere"))
    with pytest.raises(BadData, match="--max-auc-loss: found no data to find the AUC of, expected --check DATA"):
        prune(model, tmp_path / "out", asking("i8", None, 0.1))
    assert not (tmp_path / "out").exists()


def test_criteo_lines_are_data_for_a_program_that_takes_them(tmp_path, command):
    lines = tmp_path / "lines.tsv"
    synthetic.write(lines, 1500, 7, lambda rows: None)
    rows = accuracy.criteo.read(lines)
    (tmp_path / "ctr").mkdir()
    train_ctr.save(train_ctr.train(rows, 1), "ctr", 1, tmp_path / "ctr")
    done = command(
        "prune-program", tmp_path / "ctr", "--format", "bf16", "--check", lines, "--max-auc-loss", 0.01, "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    offline = train_ctr.score(tmp_path / "ctr", rows)
    assert said["row_format"] == "bf16"
    assert said["accuracy"]["samples"] == 1500
    assert said["accuracy"]["auc"][0] == pytest.approx(roc_auc_score(rows.labels, offline), abs=1e-9)
    assert 0 < said["accuracy"]["largest_change"] < 1e-2
    done = command("prune-program", tmp_path / "ctr", "--format", "i8", "--check", lines, "--max-auc-loss", -1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--max-auc-loss: found -1.0, expected 0 or more" in done.stderr


class Days(torch.nn.Module):
    """A lookup that goes and one that stays, whose ids the data may have wrong."""

    def __init__(self):
        super().__init__()
        self.items, self.days = torch.nn.Embedding(50, DIM), torch.nn.Embedding(7, DIM)

    def forward(self, item, day):
        return {"score": (self.items(item) * self.days(day)).sum(1)}


def test_data_on_which_the_program_does_not_run_are_refused(tmp_path):
    (tmp_path / "days").mkdir()
    example, dims = torch.zeros(3, dtype=torch.int64), ({0: Dim("B", min=1)},) * 2
    program = torch.export.export(Days().eval(), (example, example.clone()), dynamic_shapes=dims)
    torch.export.save(program, tmp_path / "days" / "program.pt2")
    data = saved(tmp_path / "data.npz", {"item": np.arange(9), "day": np.arange(9)})
    options = Options(rules=Rules(min_rows=10), wanted=Wanted(RowFormat.F16, data))
    with pytest.raises(BadData, match=r"the pruned program: found inputs that it does not run on \(index out of range"):
        prune(tmp_path / "days", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


class Sequence(torch.nn.Module):
    """Rows of a sequence, its mask, and two outputs of which one is a score."""

    def __init__(self):
        super().__init__()
        self.items, self.top = torch.nn.Embedding(50, DIM), torch.nn.Linear(DIM, 2)

    def forward(self, history):
        rows = self.items(history) * (history > 0).unsqueeze(-1)
        return {"rows": rows, "prob": self.top(rows.sum(1)).softmax(1)}


def test_ids_by_rows_of_a_matrix_are_measured_too(tmp_path):
    (tmp_path / "din").mkdir()
    torch.manual_seed(0)
    example = torch.zeros(3, 4, dtype=torch.int64)
    program = torch.export.export(Sequence().eval(), (example,), dynamic_shapes=({0: Dim("B", min=1)},))
    torch.export.save(program, tmp_path / "din" / "program.pt2")
    ids = np.random.default_rng(0).integers(0, 50, (SAMPLES, 4))
    data = saved(tmp_path / "data.npz", {"history": ids, "history.keys": ids, "label": ids[:, 0] % 2})
    options = Options(rules=Rules(min_rows=1), wanted=Wanted(RowFormat.I8, data))
    found = prune(tmp_path / "din", tmp_path / "out", options).accuracy
    assert (found.samples, found.largest_change > 0) == (SAMPLES, True)
    exact = program.module()(torch.from_numpy(ids))["prob"][:, 1].detach().numpy()
    assert found.auc[0] == pytest.approx(roc_auc_score(ids[:, 0] % 2, exact), abs=1e-9)


@pytest.mark.skipif("PADDLE_PYTHON" not in os.environ, reason="PADDLE_PYTHON names no Python with Paddle")
def test_paddle_programs_are_measured_too(tmp_path, command):
    model = shutil.copytree(GOLDEN / "paddle-331-ctr", tmp_path / "ctr")
    prune(model, tmp_path / "exact")
    said = manifest.read(manifest.Manifest, tmp_path / "exact" / "manifest.json")
    rng = np.random.default_rng(0)
    data = {tensor.name: rng.random((SAMPLES, *tensor.shape[1:]), dtype=np.float32) for tensor in said.inputs}
    for lookup in said.lookups:
        shape = [SAMPLES, *lookup.feed_shape[1:-1]]
        keys = rng.integers(0, min(table.rows for table in said.tables.values()), shape)
        data[lookup.keys] = keys if lookup.lengths is None else keys.ravel()
        if lookup.lengths is not None:
            data[lookup.lengths] = np.full((SAMPLES, 1), keys.size // SAMPLES)
    data["label"] = rng.integers(0, 2, SAMPLES)
    found = prune(model, tmp_path / "out", asking("i8", saved(tmp_path / "data.npz", data))).accuracy
    assert (found.samples, 0 < found.largest_change < 0.1) == (SAMPLES, True)
