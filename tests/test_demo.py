"""The whole path on real processes, and the commands as a user types them afterwards."""

import contextlib
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from places import BIN, ROOT
from processes import processes_that_name

from trainer_tools import criteo, synthetic
from trainer_tools import demo as whole_path


def test_served_scores_equal_the_trained_programs_in_both_cube_modes(demo):
    compared = re.findall(r"served against offline: largest difference (\S+), AUC (\S+) against (\S+)", demo.output)
    assert len(compared) == 2
    for difference, served, offline in compared:
        assert float(difference) <= 1e-5
        assert served == offline


def test_the_demo_prints_what_it_must(demo):
    for wanted in (
        "best possible 0.",
        "largest difference 0",
        "samples/s, p50",
        "looked up,",
        "absent (",
        "cube-server: shard 1 of 2 listening on",
        "predictor-server: listening on",
        "done: every served score equals the trained program's",
    ):
        assert wanted in demo.output
    assert re.search(r"server +shard +state", demo.output)
    assert re.search(r"table +version +current", demo.output)


def test_no_process_of_the_demo_is_left(demo):
    assert demo.processes_left == ""


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (np.full(10, 0.5 + 2e-5, np.float32), "served scores differ from offline ones by 2"),
        (np.full(10, np.nan, np.float32), "served scores differ from offline ones by nan"),
        (np.full(9, 0.5, np.float32), "9 served scores, 10 offline ones"),
    ],
)
def test_a_served_score_that_differs_fails_the_demo(monkeypatch, served, message):
    def client(tool, *args):
        np.save(args[-1], served)

    rows = criteo.CriteoRows(np.arange(10, dtype=np.int8) % 2, *[np.empty(0)] * 3)
    monkeypatch.setattr(whole_path, "run_tool", client)
    offline = np.full(10, 0.5, np.float32)
    with pytest.raises(whole_path.Failed, match=message):
        whole_path._score_and_compare("h:1", whole_path.Prepared(rows, rows, Path("x"), None), offline, 0.5)


def test_the_demo_removes_nothing_it_did_not_make(tmp_path):
    (tmp_path / "cube-data" / "mine").mkdir(parents=True)
    with pytest.raises(whole_path.Failed, match=r"cube-data is not of the demo's making"):
        whole_path.fresh(tmp_path / "cube-data")
    assert (tmp_path / "cube-data" / "mine").is_dir()
    for _ in range(2):
        whole_path.fresh(tmp_path / "new")
        (tmp_path / "new" / "file").write_text("x")


def test_a_tool_that_fails_fails_the_demo():
    with pytest.raises(whole_path.Failed, match="cube-ctl exited with 1"):
        whole_path.run_tool("cube-ctl", "verify", "/nowhere")
    starting = whole_path.started("cube-server", "--shard", "0", "--shards", "1", "--data", "/nowhere")
    with pytest.raises(whole_path.Failed, match="cube-server did not start: exit code 1"), starting:
        pass


def test_a_wrong_data_file_fails_the_demo_and_names_the_line(tmp_path):
    lines = tmp_path / "lines.tsv"
    synthetic.write(lines, 5, seed=1)
    lines.write_text(lines.read_text() + "1\tx\n")
    command = [sys.executable, "-m", "trainer_tools.demo", "--root", str(tmp_path), "--data", str(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "demo: FAILED: " + str(lines) + " line 6: found 2 columns, expected 40" in done.stderr


def test_a_given_gzip_with_a_header_goes_the_whole_way(tmp_path):
    lines = tmp_path / "plain.tsv"
    synthetic.write(lines, 400, seed=5)
    header = ",".join(["Id", "Label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))])
    rows = [f"{n}," + line.replace("\t", ",") for n, line in enumerate(lines.read_text().splitlines())]
    (tmp_path / "lines.csv.gz").write_bytes(gzip.compress("\n".join([header, *rows]).encode()))
    command = [sys.executable, "-m", "trainer_tools.demo", "--root", tmp_path, "--data", tmp_path / "lines.csv.gz"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "320 lines to train on, 80 to test on" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path, number):
    command = [sys.executable, "-m", "trainer_tools.demo", "--lines", "3000", "--root", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if "cube-server: shard 1" in line:  # two servers run, the third starts
                break
        os.kill(process.pid, number)
        assert process.wait(timeout=60) in (130, 143)
        assert not processes_that_name(tmp_path)


@pytest.fixture
def root(demo, tmp_path, reserve):
    """A working directory as `make demo` leaves it, with configuration on free ports."""
    for name in ("model", "model.pruned", "cube-data", "demo-data"):
        (tmp_path / name).symlink_to(demo.root / name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    free = [reserve() for _ in range(3)]
    for path in (tmp_path / "conf").iterdir():
        text = path.read_text()
        for port, other in zip(("8010", "8011", "8500"), free, strict=True):
            text = text.replace(f"127.0.0.1:{port}", other)
        path.write_text(text)
    return tmp_path


@contextlib.contextmanager
def started(root, tool, *args):
    """A server as a user starts it, and its first line."""
    with subprocess.Popen([BIN / tool, *args], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_the_commands_work_from_the_root_as_the_user_types_them(root, demo, process):
    with contextlib.ExitStack() as stack:
        processes = []
        for tool, *args in (
            ("cube-server", "--shard", "0"),
            ("cube-server", "--shard", "1"),
            ("predictor-server", "--cube", "conf/cube.prototxt"),
        ):
            running, line = stack.enter_context(started(root, tool, *args))
            processes.append(running)
            assert re.match(rf"{tool}: .*listening on 127\.0\.0\.1:\d+, serves ", line), line
            assert "@0" in line
        for given in ([], ["demo-data/test.tsv"], ["-"]):
            with (root / "demo-data" / "test.tsv").open() as lines:
                done = process("ctr-client", *given, "--scores", "scores.txt", cwd=root, stdin=lines)
            assert done.returncode == 0, done.stderr
            assert "ctr-client: 800 samples of" in done.stdout
            assert len(np.loadtxt(root / "scores.txt")) == 800
        assert process("cube-ctl", "status", cwd=root).returncode == 0
        for running in reversed(processes):
            begin = time.monotonic()
            running.send_signal(signal.SIGINT)
            assert running.wait(timeout=60) == 0
            assert time.monotonic() - begin < 30  # under a second where nothing else runs
    shutil.copytree(demo.model, root / "fresh")
    done = process("prune-program", "fresh/", cwd=root)
    assert done.returncode == 0, done.stderr
    assert (root / "fresh.pruned" / "manifest.json").is_file()


def test_the_predictor_alone_serves_from_the_local_cube(root, command):
    with started(root, "predictor-server") as (_, line):
        assert "from local cube model.pruned/cube" in line
        done = command("ctr-client", "demo-data/test.tsv", "--json", cwd=root)
        assert '"samples": 800' in done.stdout


def test_a_client_without_a_server_or_with_bad_lines_exits_1_with_one_line(root, command):
    done = command("ctr-client", "demo-data/test.tsv", "--target", "127.0.0.1:1", "--timeout-ms", 500, cwd=root)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ctr-client: ")
    (root / "empty.tsv").write_text("")
    assert "lines to score: found none" in command("ctr-client", "empty.tsv", cwd=root).stderr
    (root / "bad.tsv").write_text("0\t1\n")
    done = command("ctr-client", "bad.tsv", cwd=root)
    assert done.returncode == 1
    assert "bad.tsv line 1: found 2 columns, expected 40" in done.stderr
    assert "Traceback" not in done.stderr
