"""What tests share: one small run of the whole path, and real processes that do not outlive a test."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from places import BIN, ROOT

from trainer_tools.demo import started


class Demo(NamedTuple):
    """A finished run of the demo and what it left."""

    root: Path
    output: str

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
    """The whole path on 4,000 generated lines: files that other tests serve and break copies of."""
    root = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "trainer_tools.demo", "--lines", "4000", "--root", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(root, done.stdout)


@pytest.fixture
def command():
    """Run one of our commands to its end: command("cube-build", ...) → CompletedProcess."""

    def run(tool, *args, cwd=ROOT, env=None, stdin=subprocess.DEVNULL):
        return subprocess.run(
            [str(BIN / tool), *map(str, args)],
            cwd=cwd,
            env=os.environ | (env or {}),
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def server():
    """Start one of our servers on a free port: server("cube-server", ...) → address. All are stopped after the test."""
    with contextlib.ExitStack() as processes:
        yield lambda tool, *args: processes.enter_context(started(tool, *args))
