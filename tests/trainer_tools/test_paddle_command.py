"""prune-program as a command, on Paddle programs: flags, reports, a full disk, no Paddle."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from paddle_programs import QUICK, bytes_of
from places import ROOT

from cube.errors import BadData
from trainer_tools.prune_program import prune


def test_the_input_is_untouched_and_an_output_of_another_kind_too(model, tmp_path):
    place = model("331-ctr")
    before = bytes_of(place)
    for _ in range(2):  # the second replaces the first
        prune(place, tmp_path / "out", QUICK)
    assert bytes_of(place) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["331-ctr", "out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(BadData, match="other: found an existing path that prune-program did not write"):
        prune(place, tmp_path / "other", QUICK)


def test_the_command_reports_as_text_and_as_json(model, command, tmp_path):
    done = command("prune-program", model("185-tagger"), "--json", "--verify", 0)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["format"] == "paddle"
    assert [(k["name"], k["table"], k["is_cut"], k["rows"]) for k in said["lookups"]] == [
        ("embedding_0.tmp_0", "word_emb", True, 1001),
        ("embedding_1.tmp_0", "mark_emb", False, 2),
    ]
    assert said["ops"] == {"before": 11, "after": 10}
    assert said["proof"] == {"samples": 0, "reason": "--verify 0"}
    assert "cut    lookup_table embedding_0.tmp_0 over word_emb, ids words → input embedding_0.tmp_0" in done.stderr
    assert "stays  lookup_table embedding_1.tmp_0 over mark_emb (2 rows, fewer than --min-rows 1,000)" in done.stderr
    manifest_said = json.loads((tmp_path / "185-tagger.pruned" / "manifest.json").read_text())
    program = tmp_path / "185-tagger.pruned" / manifest_said["program"]["file"]
    assert manifest_said["program"]["sha256"] == hashlib.sha256(program.read_bytes()).hexdigest()


def test_checking_says_what_would_go_and_writes_nothing(model, command, tmp_path):
    done = command("prune-program", model("185-tagger"), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["cut", "lookup_table"],
        ["stays", "lookup_table"],
    ]
    done = command("prune-program", tmp_path / "185-tagger", "--dry-run", "--json", "--min-rows", 5000)
    assert done.returncode == 1
    assert [(said["table"], said["is_cut"]) for said in json.loads(done.stdout)] == [
        ("word_emb", False),
        ("mark_emb", False),
    ]
    done = command("prune-program", model("331-conv"), "--dry-run")
    assert (done.returncode, done.stdout) == (1, "  no lookups\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["185-tagger", "331-conv"]


def test_a_full_disk_leaves_nothing(model, tmp_path):
    """Every file the tool writes is cut off at 8 KiB, which the kernel reports as it does a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from trainer_tools.prune_program import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, str(model("331-ctr")), "--verify", "0"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"prune-program: .*/331-ctr.pruned: found File too large, expected .*: --out\n", done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["331-ctr"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lines", "x"], "--lines: found a Paddle program, expected a torch.export program"),
        (["--verify", "-1"], "--verify: found -1, expected 0 or more"),
        (["--min-rows", "-1"], "--min-rows: found -1, expected 0 or more"),
        (["--vocabulary", "t"], "--vocabulary: found 't', expected TABLE=FILE"),
        (
            ["--keep", "nobody"],
            "--keep: found 'nobody', expected a lookup or table: SparseFeatFactors, embedding_0.tmp_0",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(model, command, flags, message):
    done = command("prune-program", model("331-ctr"), *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"prune-program: {message}")
    assert done.stderr.count("\n") == 1


def test_without_paddle_nothing_is_proven_and_the_report_says_so(model, tmp_path, monkeypatch):
    monkeypatch.delenv("PADDLE_PYTHON", raising=False)
    report = prune(model("331-ctr"), tmp_path / "out")
    assert report.compared == 0
    assert "proof  none: nothing was compared (no Paddle here: --paddle PYTHON, one that has it)" in str(report)


def test_a_python_without_paddle_is_said_to_be_one(model, tmp_path, command):
    done = command("prune-program", model("331-ctr"), "--paddle", shutil.which("python3"))
    assert done.returncode == 1
    assert "proof: found Paddle could not run ctr.pdmodel (exit 1: ModuleNotFoundError" in done.stderr
    assert not (tmp_path / "331-ctr.pruned").exists()
