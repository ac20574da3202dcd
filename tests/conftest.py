"""What tests share: one small run of the whole path, and real processes that do not outlive a test."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from places import BIN, ROOT
from ports import reserved_port
from processes import processes_that_name

import cube.cli
import cube.ctl
import predictor.cli
import predictor.client.cli
import trainer_tools.prune_program
from trainer_tools.demo import started

# The first example may wait for a compiler. What lands does not depend on luck: in CI the examples are always the same.
hypothesis.settings.register_profile(
    "kernels",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("kernels")

COMMANDS = {
    "cube-server": cube.cli.server,
    "cube-build": cube.cli.build,
    "cube-ctl": cube.ctl.ctl,
    "prune-program": trainer_tools.prune_program.main,
    "predictor-server": predictor.cli.server,
    "ctr-client": predictor.client.cli.main,
}


class Demo(NamedTuple):
    """A finished run of the demo and what it left."""

    root: Path
    output: str
    processes_left: str  # that named its files when it had ended

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def pruned(self) -> Path:
        return self.root / "model.pruned"

    @property
    def cube(self) -> Path:
        return self.root / "cube-data"

    @property
    def lines(self) -> Path:
        return self.root / "demo-data" / "test.tsv"


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    """The whole path on 4,000 generated lines: files that other tests serve and break copies of.

    Made once for all processes of a run (pytest -n): who comes second waits for it.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    root, output, left = place / "demo", place / "demo.output", place / "demo.left"
    with (place / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            shutil.rmtree(root, ignore_errors=True)  # what a process that was ended meanwhile has left
            root.mkdir()
            command = [sys.executable, "-m", "trainer_tools.demo", "--lines", "4000", "--root", str(root)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
            assert done.returncode == 0, done.stdout + done.stderr
            left.write_text("\n".join(processes_that_name(root)))  # now: soon other tests serve these files
            output.write_text(done.stdout)
    return Demo(root, output.read_text(), left.read_text())


@pytest.fixture
def process():
    """Run one of our commands to its end as a process: process("cube-build", ...) → CompletedProcess."""

    def run(tool, *args, cwd=ROOT, stdin=subprocess.DEVNULL):
        line = [str(BIN / tool), *map(str, args)]
        return subprocess.run(line, cwd=cwd, stdin=stdin, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture
def command(capfd, monkeypatch):
    """The same within this process, for the many tests that need no process of their own."""

    def run(tool, *args, cwd=ROOT):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        try:
            code = COMMANDS[tool](list(map(str, args)))
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess([tool, *args], code, out, err)

    return run


@pytest.fixture
def reserve():
    """Addresses at which nobody listens until the test does, and nobody else may: reserve() → "127.0.0.1:port"."""
    with contextlib.ExitStack() as held:
        yield lambda: held.enter_context(reserved_port())


@pytest.fixture
def server():
    """Start one of our servers on a free port: server("cube-server", ...) → address. All are stopped after the test."""
    with contextlib.ExitStack() as processes:
        yield lambda tool, *args: processes.enter_context(started(tool, *args))
