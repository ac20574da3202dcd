"""prune-program: real torch programs in, dense program and rows out, the same scores; nothing unsafe, nothing torn."""

import errno
import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from places import ROOT
from torch.export import Dim
from two_towers import DIM, Net, export, written

from cube.client import LocalCube
from cube.errors import BadData, DataCorrupt
from trainer_tools import manifest
from trainer_tools.export_rows import rows_of
from trainer_tools.programs import torch_export
from trainer_tools.programs.detect import format_of
from trainer_tools.programs.program import Rules
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return written(tmp_path_factory.mktemp("trained") / "two-towers")


@pytest.fixture
def model(trained, tmp_path):
    """A trained model of two tables; prune it into tmp_path / "out"."""
    return shutil.copytree(trained, tmp_path / "two-towers")


def change(model, edit):
    path = model / "signature.json"
    said = json.loads(path.read_text())
    edit(said)
    path.write_text(json.dumps(said))


def test_scores_of_pruned_program_and_rows_are_the_original_ones_to_the_bit(model, tmp_path):
    report = prune(model, tmp_path / "out")
    assert report.largest_difference == 0
    assert report.compared == 256
    assert report.ops[1] < report.ops[0]
    assert "largest difference 0" in str(report)


def test_the_pruned_program_holds_no_table_and_takes_pooled_rows_instead(model, tmp_path):
    prune(model, tmp_path / "out")
    program = torch_export.load(tmp_path / "out" / "program.pt2")
    assert set(program.state_dict) == {"top.weight", "top.bias"}
    assert not torch_export.TorchProgram(program).lookups()
    inputs = {t.name: (t.datatype, t.shape) for t in torch_export.inputs_of(program)}
    assert inputs == {
        "x": ("FP32", [-1, 5]),
        "embedding_bag_pooled": ("FP32", [-1, DIM]),
        "embedding_bag_1_pooled": ("FP32", [-1, 2]),
    }


def test_rows_and_local_cube_hold_the_tables_under_their_keys(model, tmp_path):
    prune(model, tmp_path / "out")
    original = torch_export.load(model / "program.pt2")
    keys = np.load(model / "user.npy")
    weight = torch_export.TorchProgram(original).table("users.weight")
    assert np.array_equal(np.load(tmp_path / "out" / "rows" / "users" / "keys.npy"), keys)
    assert np.array_equal(np.load(tmp_path / "out" / "rows" / "users" / "rows.npy"), weight[:10])
    cube = LocalCube(tmp_path / "out" / "cube")
    assert np.array_equal(cube.rows("users", None, keys).rows, weight[:10])
    assert cube.rows("items", None, np.array([5, 6], np.uint64)).found.tolist() == [True, False]


def test_the_manifest_ties_program_and_tables_together(model, tmp_path):
    prune(model, tmp_path / "out")
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert (said.name, said.version) == ("two-towers", 42)
    assert {name: (t.version, t.dim, t.rows) for name, t in said.tables.items()} == {
        "users": ("42@0", DIM, 10),
        "items": ("42@0", 2, 6),
    }
    assert [(k.keys, k.lengths, k.pooling) for k in said.lookups] == [
        ("user_ids_keys", "user_ids_lengths", "mean"),
        ("item_ids_keys", "item_ids_lengths", "sum"),
    ]
    assert [t.name for t in said.outputs] == ["score"]


def test_pruning_again_replaces_what_it_wrote_and_nothing_else(model, tmp_path):
    before = {p: p.read_bytes() for p in model.iterdir()}
    prune(model, tmp_path / "out")
    change(model, lambda said: said.update(version=43))
    prune(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["version"] == 43
    other = tmp_path / "precious"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(BadData, match="precious: found an existing path that prune-program did not write"):
        prune(model, other)
    assert {p: p.read_bytes() for p in model.iterdir() if p.name != "signature.json"}.items() <= before.items()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious", "two-towers"]


def test_a_wrong_result_is_not_written(model, tmp_path, monkeypatch):
    real = LocalCube.rows
    monkeypatch.setattr(LocalCube, "rows", lambda *args: real(*args)._replace(rows=real(*args).rows + 1))
    with pytest.raises(DataCorrupt, match="proof: found outputs that differ by"):
        prune(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two-towers"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("name"), r"signature\.json: found JSON that does not fit \(.*`name`"),
        (lambda s: s.update(nmae="x"), "nmae"),
        (lambda s: s.update(version="1"), r"\$\.version"),
        (lambda s: s.update(schema=2), "schema"),
        (lambda s: s.update(sign="md5"), "sign: found 'md5'"),
        (lambda s: s["lookups"].append(s["lookups"][0]), "found one that is named before"),
        (
            lambda s: s["lookups"][0].update(ids="x"),
            r"lookup of 'x': found ids x, .* expected one of the program's lookups",
        ),
        (lambda s: s["lookups"][0].update(offsets="item_offsets"), "expected one of the program's lookups, once"),
        (lambda s: s["lookups"][0].update(parameter="items.weight"), "expected one of the program's lookups, once"),
        (lambda s: s["lookups"][0].update(table="items"), "expected one parameter"),
        (lambda s: s["lookups"][0].update(vocabulary="nowhere.npy"), r"nowhere\.npy: found No such file"),
        (
            lambda s: s["lookups"][0].update(vocabulary="item.npy"),
            "rows 6 to 10: found numbers other than 0, expected zeros",
        ),
        (lambda s: s["lookups"][0].update(vocabulary="signature.json"), r"signature\.json: found"),
        (lambda s: s.update(program="../program.pt2"), "program: found '../program.pt2', expected a path inside"),
        (lambda s: s["lookups"][0].update(vocabulary="/etc/passwd"), "vocabulary: found '/etc/passwd'"),
        (lambda s: s["lookups"][0].update(table="../../escaped"), "table name: found '../../escaped'"),
        (lambda s: s["lookups"][0].update(slots=[]), r"slots"),
        (lambda s: s["lookups"][0]["slots"].pop(), "slots: found 2, expected 3 in signature.json"),
        (lambda s: s.update(version=-1), r"\$\.version"),
        (lambda s: s.update(program="nowhere.pt2"), r"nowhere\.pt2: found no such file"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused_and_nothing_is_written(model, tmp_path, edit, message):
    change(model, edit)
    with pytest.raises(BadData, match=message):
        prune(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Fields(torch.nn.Module):
    """A weight and a vector for each id of one matrix, and a table that nobody names."""

    def __init__(self):
        super().__init__()
        self.weights, self.vectors = torch.nn.Embedding(12, 1), torch.nn.Embedding(12, DIM)
        self.days = torch.nn.Embedding(7, DIM)
        with torch.no_grad():
            self.weights.weight[10:], self.vectors.weight[10:] = 0, 0

    def forward(self, fields, day):
        return {"score": self.weights(fields).sum((1, 2)) + (self.vectors(fields).sum(1) * self.days(day)).sum(1)}


def fields(directory, *lookups):
    """A model whose signature says this."""
    directory.mkdir()
    ids, dims = torch.zeros(3, 2, dtype=torch.int64), ({0: Dim("B")}, {0: Dim("B")})
    program = torch.export.export(Fields().eval(), (ids, ids[:, 0]), dynamic_shapes=dims)
    torch.export.save(program, directory / "program.pt2")
    np.save(directory / "keys.npy", np.random.default_rng(1).integers(0, 2**64, 10, dtype=np.uint64))
    np.save(directory / "more.npy", np.arange(10, dtype=np.uint64))
    said = {"schema": 1, "name": "fields", "version": 3, "program": "program.pt2", "sign": "none", "lookups": lookups}
    (directory / "signature.json").write_text(json.dumps(said))
    return directory


def field(name, **changes):
    slots = [{"name": slot, "number": number} for number, slot in enumerate(("user", "item"))]
    said = {"ids": "fields", "slots": slots, "table": name.split(".")[0], "parameter": name}
    return {key: value for key, value in (said | changes).items() if value is not None}


def test_a_signature_may_name_lookups_without_bags_that_share_ids(tmp_path):
    vocabulary = {"vocabulary": "keys.npy"}
    model = fields(tmp_path / "m", field("weights.weight", **vocabulary), field("vectors.weight", **vocabulary))
    report = prune(model, tmp_path / "out")
    assert (report.largest_difference, report.rows) == (0, 20)
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert [(k.keys, k.lengths, k.table, k.feed_shape, len(k.slots)) for k in said.lookups] == [
        ("fields_keys", None, "weights", [-1, 2, 1], 2),
        ("fields_keys", None, "vectors", [-1, 2, DIM], 2),
    ]
    assert [t.name for t in said.inputs] == ["day"]
    assert report.candidates[-1].reason == "signature.json does not name it"


def test_a_table_without_a_vocabulary_has_row_numbers_for_keys(tmp_path):
    day = field("days.weight", ids="day", slots=[{"name": "day", "number": 0}])
    report = prune(fields(tmp_path / "m", day), tmp_path / "out")
    assert (report.largest_difference, report.rows) == (0, 7)
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert [(k.keys, k.feed_shape) for k in said.lookups] == [("keys", [-1, DIM])]
    assert np.load(tmp_path / "out" / "rows" / "days" / "keys.npy").tolist() == list(range(7))


@pytest.mark.parametrize(
    ("lookups", "message"),
    [
        ([field("weights.weight", parameter=None)], "found parameters weights.weight, vectors.weight, expected `param"),
        ([field("days.weight")], "expected one of the program's lookups, once"),
        ([field("weights.weight"), field("vectors.weight", table="weights")], "table 'weights': found parameters"),
        (
            [field("weights.weight", vocabulary="keys.npy"), field("vectors.weight", vocabulary="more.npy")],
            "vocabulary: found another than that of embedding",
        ),
        (
            [field("vectors.weight", slots=[{"name": str(n), "number": n} for n in range(3)])],
            "slots: found 3, expected 1, or 2",
        ),
    ],
)
def test_a_signature_of_lookups_without_bags_that_does_not_fit_is_refused(tmp_path, lookups, message):
    with pytest.raises(BadData, match=message):
        prune(fields(tmp_path / "m", *lookups), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_an_absent_key_counts_so_padding_without_a_key_is_refused(model, tmp_path):
    export(Net(padding_idx=10), model / "program.pt2")
    with pytest.raises(BadData, match="padding_idx: found row 10, which has no key, expected a row with a key"):
        prune(model, tmp_path / "out")
    export(Net(padding_idx=10, mode="sum"), model / "program.pt2")
    assert prune(model, tmp_path / "out").largest_difference == 0


@pytest.mark.parametrize("net", [(), (torch.nn.Linear(16, 4000),)], ids=["for rows", "for the program"])
def test_a_full_disk_leaves_nothing(tmp_path, net):
    """Every file the tool writes is cut off at 64 KiB, which the kernel reports as it does a full disk."""
    (tmp_path / "big").mkdir()
    ids, dims = torch.zeros(3, dtype=torch.int64), ({0: Dim("B")},)
    model = torch.nn.Sequential(torch.nn.Embedding(5000, 16), *net)
    program = torch.export.export(model, (ids,), dynamic_shapes=dims)
    torch.export.save(program, tmp_path / "big" / "program.pt2")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from trainer_tools.prune_program import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "big")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"prune-program: .*/big\.pruned: found .*, expected .*: --out\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize(
    ("place", "out", "found"),
    [
        ("two-towers", "two-towers/sub", "inside"),
        ("two-towers", "link/sub", "inside"),
        ("two-towers/program.pt2", "two-towers", "that holds"),
        ("link", "two-towers/sub", "inside"),
        ("two-towers", ".", "that holds"),
        ("two-towers/program.pt2", ".", "that holds"),
        ("link/program.pt2", ".", "that holds"),
        ("file.pt2", "link", "that holds"),
        ("two-towers/program.pt2", "two-towers/program.pt2", "that holds"),
        ("links", "two-towers", "that holds"),
    ],
)
def test_a_result_neither_lies_in_the_trained_model_nor_around_it(model, tmp_path, place, out, found):
    """It would be part of it, or replace it. Links are followed."""
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "links").mkdir()
    for link in (tmp_path / "file.pt2", tmp_path / "links" / "program.pt2"):
        link.symlink_to(model / "program.pt2")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(BadData, match=f"found a path {found} the trained model, expected another: --out"):
        prune(tmp_path / place, tmp_path / out)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_result_may_lie_beside_the_file_it_is_made_of(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    here = tmp_path.relative_to(tmp_path)
    prune(here / "program.pt2", here / "out")
    assert (tmp_path / "here" / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("which", ["program", "program/program.pt2"])
def test_what_was_pruned_is_not_pruned_in_place(model, tmp_path, which):
    """The result would take the place of its input, tables that stayed in it included."""
    prune(model, tmp_path / "out")
    (tmp_path / "out" / "program").mkdir()
    shutil.copy(model / "program.pt2", tmp_path / "out" / "program")
    with pytest.raises(BadData, match="found a path that holds the trained model"):
        prune(tmp_path / "out" / which, tmp_path / "out", Options(rules=Rules(min_rows=1)))
    assert (tmp_path / "out" / "program" / "program.pt2").is_file()


def test_a_lookup_that_the_signature_does_not_name_stays(tmp_path):
    report = prune(fields(tmp_path / "m", field("vectors.weight", vocabulary="keys.npy")), tmp_path / "out")
    assert [(c.is_cut, c.reason) for c in report.candidates] == [
        (False, "signature.json does not name it"),
        (True, "12 rows of 4"),
        (False, "signature.json does not name it"),
    ]
    assert report.largest_difference == 0


@pytest.mark.parametrize("drop", [lambda said: said["lookups"].pop(), lambda said: said["lookups"].pop(0)])
def test_bags_that_stay_are_refused_for_samples_do_not_come_first_in_their_ids(model, tmp_path, drop):
    change(model, drop)
    why = r"and it is read by .* over (users|items)\.weight, which stays \(signature.json does not name it\)"
    with pytest.raises(BadData, match=rf"input '(user|item)_ids': found shape \[s\d+\], {why}, expected samples first"):
        prune(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bags_to_keep_are_refused_with_the_flag_that_keeps_them(model, tmp_path):
    (model / "signature.json").unlink()
    options = Options(rules=Rules(min_rows=1, keep=["items.weight"]))
    with pytest.raises(BadData, match=r"which stays \(--keep names it\), expected .*lookups cut: without --keep, with"):
        prune(model, tmp_path / "out", options)


def test_without_a_signature_requests_name_keys_as_the_program_names_ids(model, tmp_path):
    (model / "signature.json").unlink()
    report = prune(model, tmp_path / "out", Options(rules=Rules(min_rows=1)))
    assert (report.largest_difference, report.rows, report.name) == (0, 18, "two-towers")
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert (said.sign, said.version) == ("none", int((model / "program.pt2").stat().st_mtime))
    assert [(k.keys, k.text, k.lengths, len(k.slots), k.table) for k in said.lookups] == [
        ("user_ids", "user_ids.text", "user_ids.lengths", 3, "users.weight"),
        ("item_ids", "item_ids.text", "item_ids.lengths", 1, "items.weight"),
    ]


def test_vocabularies_may_come_from_the_command_line(model, tmp_path):
    (model / "signature.json").unlink()
    given = {"users.weight": model / "user.npy", "items.weight": model / "item.npy"}
    options = Options(rules=Rules(min_rows=1), vocabularies=given)
    assert prune(model, tmp_path / "out", options).largest_difference == 0
    assert manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json").sign != "none"
    keys = np.load(tmp_path / "out" / "rows" / "users.weight" / "keys.npy")
    assert np.array_equal(keys, np.load(model / "user.npy"))
    del given["items.weight"]
    with pytest.raises(BadData, match=r"--vocabulary: found users\.weight, expected one for each table that goes"):
        prune(model, tmp_path / "out", options)


def test_two_programs_and_no_signature_are_refused(model, tmp_path):
    (model / "signature.json").unlink()
    shutil.copy(model / "program.pt2", model / "other.pt2")
    with pytest.raises(BadData, match=r"found other.pt2, program.pt2, expected one \*.pt2"):
        prune(model, tmp_path / "out")


def test_the_trained_model_is_not_written_into(model):
    with pytest.raises(BadData, match="found a path inside the trained model"):
        prune(model, model / "out")


def test_lookups_to_keep_stay_and_the_report_says_why(tmp_path):
    model = fields(tmp_path / "m")
    (model / "signature.json").unlink()
    report = prune(model, tmp_path / "out", Options(rules=Rules(min_rows=8, keep=["weights.weight"])))
    assert [(c.lookup.table, c.is_cut, c.reason) for c in report.candidates] == [
        ("weights.weight", False, "--keep names it"),
        ("vectors.weight", True, "12 rows of 4"),
        ("days.weight", False, "7 rows, fewer than --min-rows 8"),
    ]
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert [t.name for t in said.inputs] == ["fields", "day"]
    assert list(said.tables) == ["vectors.weight"]
    with pytest.raises(BadData, match="--only: found 'nobody', expected a lookup or table"):
        prune(model, tmp_path / "out", Options(rules=Rules(only=["nobody"])))
    with pytest.raises(BadData, match="embedding, embedding_1 stay: 12 rows, fewer than --min-rows 13; embedding_2 s"):
        prune(model, tmp_path / "out", Options(rules=Rules(min_rows=13)))


def test_a_program_without_lookups_is_refused(model, tmp_path):
    net = torch.nn.Linear(3, 1)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3),)), model / "program.pt2")
    with pytest.raises(BadData, match="found no lookup to cut, expected one"):
        prune(model, tmp_path / "out")


class Explosive:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def repacked(source, target, edit):
    """A copy of a .pt2 in which `edit(name, bytes)` changed some parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))


def test_nothing_of_a_program_is_unpickled(model, tmp_path):
    bomb, program = tmp_path / "exploded", model / "program.pt2"
    raw = pickle.dumps(Explosive(bomb))
    torch.save({"x": Explosive(bomb)}, tmp_path / "bomb.pt")
    original = shutil.copy(program, tmp_path / "original.pt2")

    def hidden_in_inputs(name, part):
        return (tmp_path / "bomb.pt").read_bytes() if "sample_inputs" in name else part

    def hidden_in_weights(name, part):
        if name.endswith("model_weights_config.json"):
            config = json.loads(part)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config)
        return (tmp_path / "bomb.pt").read_bytes() if name.endswith("weights/weight_0") else part

    def hidden_in_constants(name, part):
        if name.endswith("model_constants_config.json"):
            return json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}})
        return part

    for edit in (hidden_in_inputs, hidden_in_weights, hidden_in_constants):
        repacked(original, program, edit)
        with pytest.raises(BadData, match="found a pickle"):
            prune(model, tmp_path / "out")
    for whole in (raw, (tmp_path / "bomb.pt").read_bytes()):
        program.write_bytes(whole)
        with pytest.raises(BadData, match=r"program\.pt2: found"):
            prune(model, tmp_path / "out")
    assert not bomb.exists()


@pytest.mark.parametrize(
    "evil",
    [
        "__import__('pathlib').Path({bomb!r}).touch() or s0",
        "Symbol('s0').__class__",
        "Integer('open({bomb!r}, chr(119))')",
        "exec('x')",
        "(lambda: 0)()",
        "[open({bomb!r}, 'w') for x in [1]]",
    ],
)
def test_nothing_of_a_program_is_evaluated(model, tmp_path, evil):
    bomb, original = tmp_path / "exploded", shutil.copy(model / "program.pt2", tmp_path / "original.pt2")

    def hidden_in_a_size(name, part):
        if not name.endswith("models/model.json"):
            return part
        first = re.search(rb'"expr_str": ("[^"]*")', part)
        return part.replace(first[1], json.dumps(evil.format(bomb=str(bomb))).encode(), 1)

    repacked(original, model / "program.pt2", hidden_in_a_size)
    with pytest.raises(BadData, match=r"model\.json expression: found .*, expected arithmetic"):
        prune(model, tmp_path / "out")
    assert not bomb.exists()


def test_an_archive_that_two_readers_would_read_differently_is_refused(model, tmp_path):
    original = shutil.copy(model / "program.pt2", tmp_path / "original.pt2")
    for extra, message in (
        ("program/byteorder", "two parts of one name"),
        ("other/models/model.json", "of another kind"),
    ):
        shutil.copy(original, model / "program.pt2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile's own, of the second name
            with zipfile.ZipFile(model / "program.pt2", "a") as archive:
                archive.writestr(extra, b"little")
        with pytest.raises(BadData, match=message):
            prune(model, tmp_path / "out")


def test_damaged_programs_are_refused(model, tmp_path):
    whole = (model / "program.pt2").read_bytes()
    for broken in (b"", b"not a zip", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        (model / "program.pt2").write_bytes(broken)
        with pytest.raises(BadData, match=r"program\.pt2"):
            prune(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_more_keys_than_rows_are_refused():
    with pytest.raises(BadData, match="found 3 keys, expected at most the 2 rows"):
        rows_of("t", np.zeros((2, 1), np.float32), np.arange(3, dtype=np.uint64))


def test_the_command_says_what_it_did_and_exits_1_on_errors(model, command):
    done = command("prune-program", model)
    assert done.returncode == 0, done.stderr
    assert "largest difference 0" in done.stdout
    assert (model.parent / "two-towers.pruned" / "manifest.json").is_file()
    failed = command("prune-program", model.parent / "nowhere")
    assert failed.returncode == 1
    assert failed.stderr.startswith("prune-program: ")
    assert failed.stderr.count("\n") == 1


def test_outputs_to_fetch_stay_and_what_only_others_need_goes(tmp_path, command):
    class Tasks(Fields):
        def forward(self, fields, day):
            return super().forward(fields, day) | {"day": self.days(day).sum(1)}

    (tmp_path / "m").mkdir()
    ids, dims = torch.zeros(3, 2, dtype=torch.int64), ({0: Dim("B")}, {0: Dim("B")})
    program = torch.export.export(Tasks().eval(), (ids, ids[:, 0]), dynamic_shapes=dims)
    torch.export.save(program, tmp_path / "m" / "p.pt2")
    report = prune(tmp_path / "m", tmp_path / "out", Options(rules=Rules(min_rows=1), fetch=["day"]))
    assert ([c.lookup.table for c in report.candidates], report.largest_difference) == (["days.weight"], 0)
    said = manifest.read(manifest.Manifest, tmp_path / "out" / "manifest.json")
    assert ([t.name for t in said.outputs], said.inputs) == (["day"], [])
    failed = command("prune-program", tmp_path / "m", "--fetch", "nobody")
    assert "--fetch: found 'nobody', expected an output of the program: score, day" in failed.stderr


@pytest.mark.parametrize("how", ["by its path", "within its directory", "by a link"])
def test_a_program_named_by_its_file_is_pruned_beside_its_directory(model, command, how):
    """In the directory it would be part of the trained model, and the next run would find two programs."""
    before = sorted(path.name for path in model.iterdir())
    file = model / "program.pt2"
    if how == "within its directory":
        file = "program.pt2"
    elif how == "by a link":
        (model.parent / "links").mkdir()
        file = model.parent / "links" / "ranker.pt2"
        file.symlink_to(model / "program.pt2")
    done = command("prune-program", file, "--min-rows", "1", cwd=model if file == "program.pt2" else ROOT)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in model.iterdir()) == before
    name = "links.ranker.pruned" if how == "by a link" else "two-towers.program.pruned"
    assert (model.parent / name / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["program.pt2", "signature.json"])
def test_a_program_named_by_its_file_is_what_its_directory_says(model, tmp_path, name):
    report = prune(model / name, tmp_path / "out")
    assert (report.name, report.version, report.largest_difference) == ("two-towers", 42, 0)


def test_another_program_than_the_one_a_signature_explains_has_none(model, tmp_path):
    shutil.copy(model / "program.pt2", model / "second.pt2")
    report = prune(model / "second.pt2", tmp_path / "out", Options(rules=Rules(min_rows=1)))
    assert (report.name, report.largest_difference) == ("second", 0)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        (
            "m.pt",
            b"PK\3\4",
            r"found a zip archive of TorchScript or torch.save, which is not opened, expected .*export",
        ),
        ("m.pth", b"\x80\2}", r"found a pickle, which is not opened, expected .*torch\.export\.save"),
        ("m.json", b'{"base_code": {"magic": "pir"}}', r"found a program of Paddle 3's PIR"),
        ("m.txt", b"", r"m\.txt: found m\.txt, expected a torch\.export program"),
    ],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_what_is_read_by_nobody_is_refused_as_a_file_and_in_a_directory(
    tmp_path, command, name, head, message, is_named
):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(head)
    failed = command("prune-program", tmp_path / "m" / name if is_named else tmp_path / "m")
    assert failed.returncode == 1
    assert re.search(message if is_named else message.replace(r"m\.txt: ", ""), failed.stderr)
    assert failed.stderr.count("\n") == 1


def test_a_file_that_happens_to_be_called_model_makes_no_directory_paddles(model):
    (model / "model").touch()
    assert format_of(model) == "torch.export"
    (model / "signature.json").unlink()
    (model / "program.pt2").rename(model / "program.onnx")
    assert format_of(model) == "onnx"
    (model / "program.onnx").unlink()
    assert format_of(model) == "paddle"


@pytest.mark.parametrize(("picture", "found"), [("nowhere/p.svg", "no directory "), (".", "a directory")])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(model, tmp_path, command, picture, found):
    failed = command("prune-program", model, "--svg", tmp_path / picture)
    assert failed.returncode == 1
    assert f"found {found}" in failed.stderr
    assert "expected a file in a directory that exists" in failed.stderr
    assert not (tmp_path / "two-towers.pruned").exists()


def test_the_report_is_printed_though_its_picture_cannot_be_written(model, tmp_path, command):
    failed = command("prune-program", model, "--svg", "/dev/full")
    assert failed.returncode == 1
    assert "largest difference 0" in failed.stdout
    assert (
        failed.stderr
        == "prune-program: /dev/full: found No space left on device, expected a disk with more room: --svg\n"
    )
    assert (tmp_path / "two-towers.pruned" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "/x/y: found No space left on device, expected a disk",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "/x/y"),
            "/x/y: found Permission denied, expected a place that you",
        ),
        (OSError("5 requested and 3 written"), "OUT: found 5 requested and 3 written, expected a place to write to"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_named_with_what_to_do(
    model, tmp_path, command, monkeypatch, raised, said
):
    def failing(*args):
        raise raised

    monkeypatch.setattr("trainer_tools.prune_torch.write_rows", failing)
    failed = command("prune-program", model, "--out", tmp_path / "out")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"prune-program: {said.replace('OUT', str(tmp_path / 'out'))}")
    assert failed.stderr.endswith(": --out\n")
    assert [path.name for path in tmp_path.iterdir()] == ["two-towers"]


def test_the_readme_says_what_every_field_of_a_manifest_holds():
    rows = [
        line.split("|")[1] for line in (ROOT / "trainer_tools" / "README.md").read_text().splitlines() if "|" in line
    ]
    documented = {name for row in rows for name in re.findall(r"`\.?([a-zA-Z0-9_.]+)(?:\[\])?`", row)}
    known = {name.rpartition(".")[2] for name in documented} | documented
    for part in (manifest.Manifest, manifest.Lookup, manifest.Program):
        assert set(part.__struct_fields__) - {"program", "tables"} <= known, part
