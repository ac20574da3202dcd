"""What a predictor refuses to start with, and says so: a manifest that lies, a cube that lacks what the model reads."""

import json
import shutil

import numpy as np
import pytest
import torch
import two_towers
from places import GOLDEN
from stores import built

from cube import build
from cube.sources import open_source
from cube.version import Version
from predictor.client import Client
from trainer_tools.programs import torch_export
from trainer_tools.prune_program import prune


@pytest.fixture
def broken(demo, tmp_path):
    """A copy of the pruned model to break: broken(edit) edits its manifest."""
    directory = shutil.copytree(demo.pruned, tmp_path / "ctr")

    def spoil(edit):
        path = directory / "manifest.json"
        said = json.loads(path.read_text())
        edit(said)
        path.write_text(json.dumps(said))
        return directory

    return spoil


def refused(command, *args, wait_s=60):
    done = command("predictor-server", *args, "--check", "--cube-wait-s", wait_s)
    assert done.returncode == 1, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("predictor-server: ")
    assert "Traceback" not in done.stderr
    return last


def rename_table(said):
    said["tables"]["nobody"] = said["tables"].pop("embedding")
    said["lookups"][0]["table"] = "nobody"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_table, "found tables embedding, expected table 'nobody', which the model reads"),
        (lambda s: s["tables"]["embedding"].update(version="7@0"), "expected 7@0, which the model was trained with"),
        (lambda s: s["tables"]["embedding"].update(version="seven"), "found 'seven', expected base@delta"),
        (lambda s: s["tables"]["embedding"].update(dim=11), "found rows of 10 elements, expected 11"),
        (lambda s: s["tables"].clear(), "found table 'embedding', expected one of none"),
        (lambda s: s["program"].update(sha256="0" * 64), "they were not written together"),
        (lambda s: s["program"].update(file="nowhere.pt2"), "nowhere.pt2: found No such file"),
        (lambda s: s["inputs"].clear(), "found inputs or outputs that are not the program's"),
        (lambda s: s.update(sign="md5"), "sign: found 'md5'"),
        (lambda s: s.update(cube=None), "cube: found no local cube, expected the address of a cube: --cube"),
        (lambda s: s.update(cube="nowhere"), "nowhere: found no such directory"),
        (
            lambda s: s.update(extra=1),
            "manifest.json: found JSON that does not fit (Object contains unknown field `extra`",
        ),
        (lambda s: s.update(schema=2), "manifest.json: found JSON that does not fit"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_at_start(broken, command, edit, message):
    assert message in refused(command, "--model", broken(edit))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda seg: seg.unlink(), "found no segments, expected 0-of-1.seg"),
        (lambda seg: seg.write_bytes(seg.read_bytes()[:5000]), "found 5000 bytes, expected"),
        (lambda seg: seg.write_bytes(b""), "0-of-1.seg: found b'' at the start"),
        (lambda seg: seg.rename(seg.with_name("0-of-2.seg")), "found the rows of shard 0 of 1"),
    ],
)
def test_a_local_cube_with_a_missing_or_damaged_segment_is_refused(broken, command, spoil, message):
    directory = broken(lambda said: None)
    spoil(next(directory.rglob("*.seg")))
    assert message in refused(command, "--model", directory)


def test_a_remote_cube_without_the_models_version_is_refused(demo, command, server, tmp_path):
    built(tmp_path, "embedding", Version(1), np.arange(5), np.zeros((5, 10)))
    address = server("cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path)
    said = refused(command, "--model", demo.pruned, "--cube", address)
    assert f"cube shard 0 at {address} table 'embedding': found versions 1@0, expected" in said


def test_a_cube_that_nobody_serves_is_named_after_the_wait(demo, command):
    assert "cube shard 0: no answer from 127.0.0.1:1" in refused(
        command, "--model", demo.pruned, "--cube", "127.0.0.1:1", wait_s=1
    )


@pytest.mark.parametrize("cube", ["nowhere.prototxt", "localhost", "a:1,,b:2", ","])
def test_a_cube_address_that_is_none_is_refused(demo, command, cube):
    said = refused(command, "--model", demo.pruned, "--cube", cube)
    assert "cube: found" in said or f"{cube}: found" in said or f"target {cube!r}: found" in said


def test_directories_that_hold_no_model_are_refused(demo, command, tmp_path):
    assert "found neither, expected manifest.json" in refused(command, "--model", tmp_path)
    assert "found no such directory" in refused(command, "--model", tmp_path / "nowhere")
    assert "a trained program with its tables, expected a pruned one: prune-program" in refused(
        command, "--model", demo.model
    )


def test_two_models_of_one_name_are_refused(demo, command):
    assert "found model 'ctr' again" in refused(command, "--model", demo.pruned, "--model", demo.pruned)


def test_check_loads_everything_and_says_what_would_be_served(demo, command):
    done = command("predictor-server", "--model", demo.pruned, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("predictor-server: would serve ctr ")


def test_a_model_of_two_tables_one_of_a_single_slot_scores_as_its_original(tmp_path, server):
    """The two-tower program of the prune tests, pruned and served from both kinds of cube."""
    directory = two_towers.written(tmp_path / "two-towers")
    assert prune(directory, tmp_path / "out").largest_difference == 0
    rng = np.random.default_rng(3)
    user_keys, item_keys = np.load(directory / "user.npy"), np.load(directory / "item.npy")
    inputs = {
        "x": rng.random((4, 5), dtype=np.float32),
        "user_ids_lengths": np.full((4, 3), 2, np.int32),
        "user_ids_keys": rng.choice(user_keys, 24),
        "item_ids_lengths": np.ones((4, 1), np.int32),
        "item_ids_keys": rng.choice(item_keys, 4),
    }
    program = torch_export.runnable(torch_export.load(directory / "program.pt2"))
    ids = [
        torch.from_numpy(np.array([np.flatnonzero(keys == key)[0] for key in asked]))
        for keys, asked in ((user_keys, inputs["user_ids_keys"]), (item_keys, inputs["item_ids_keys"]))
    ]
    with torch.inference_mode():
        x = torch.from_numpy(inputs["x"])
        (want,) = program(x, ids[0], torch.arange(0, 25, 2), ids[1], torch.arange(5))
    for table in ("users", "items"):
        rows = open_source([str(tmp_path / "out" / "rows" / table)])
        build.build(rows, tmp_path / "cube", table, Version(42), build.Options(shards=2))
    shards = [server("cube-server", "--shard", s, "--shards", 2, "--data", tmp_path / "cube") for s in range(2)]
    for cube in ([], ["--cube", ",".join(shards)]):
        with Client(server("predictor-server", "--model", tmp_path / "out", *cube)) as client:
            answer = client.infer("two-towers", inputs)
        assert np.allclose(answer.outputs["score"], want.numpy(), atol=1e-6)
        assert answer.facts["table.users"] == answer.facts["table.items"] == "42@0"


def test_a_manifest_shows_how_its_keys_were_signed(demo):
    said = json.loads((demo.pruned / "manifest.json").read_text())
    assert said["signature"] == "serving_default"
    vectors = said["sign_vectors"]
    features = [(vector["slot"], vector["text"]) for vector in vectors]
    assert {"", "élan", "日本語 click"} <= {text for _, text in features}
    assert {0, 2**53 - 1} <= {slot for slot, _ in features}
    assert max(len(text) for _, text in features) > 200
    golden = {(c["slot"], c["text"]): c["key"] for c in json.loads((GOLDEN / "signs.json").read_text())["signs"]}
    known = [vector for vector in vectors if (vector["slot"], vector["text"]) in golden]
    assert len(known) >= 3
    assert all(int(vector["key"], 16) == golden[vector["slot"], vector["text"]] for vector in known)


def test_a_manifest_of_before_there_were_vectors_and_signatures_is_served(broken, command):
    def older(said):
        for field in ("sign_vectors", "signature", "lod_levels"):
            del said[field]
        for lookup in said["lookups"]:
            del lookup["added"]

    done = command("predictor-server", "--model", broken(older), "--check")
    assert done.returncode == 0, done.stderr


SIGNED = {"slot": 1, "text": "68fd1e64", "key": f"{15196732269263980604:016x}"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s["sign_vectors"].append(SIGNED | {"key": "0" * 16}),
            "sign_vectors, '68fd1e64' in slot 1: found 0000000000000000, expected d2e5a37bb032083c, as this",
        ),
        (lambda s: s["sign_vectors"].append(SIGNED | {"key": 7}), "Expected `str`, got `int`"),
        (lambda s: s["sign_vectors"].append(SIGNED | {"key": "7"}), "Expected `str` matching regex"),
        (lambda s: s["sign_vectors"].append(SIGNED | {"slot": 1 << 53}), "Expected `int` <= 9007199254740991"),
        (
            lambda s: s["lookups"][0].update(added=[1, 2]),
            "added: found 2 numbers, expected one, or a multiple of the 26 slots",
        ),
        (lambda s: s["lookups"][0].update(added=[1 << 63]), "Expected `int` <= 9223372036854775807"),
    ],
)
def test_keys_that_would_be_other_keys_are_refused_at_start(broken, command, edit, message):
    assert message in refused(command, "--model", broken(edit))
