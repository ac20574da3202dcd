"""predictor-server before it serves: what it refuses, and that it ends when it is told to."""

import select
import shutil
import signal
import subprocess
import textwrap
import time
from importlib.util import find_spec

import pytest
from places import BIN, GOLDEN

SLOW = """
    import time
    from predictor.ops.op import Op, Port

    class Slow(Op):
        inputs = outputs = {"x": Port("FP32", (-1, 4))}

        def __init__(self, at: str):
            self.at = at
            self.wait("make")

        def open(self):
            self.wait("open")

        def run(self, batch):
            self.wait("run")
            return dict(batch)

        def wait(self, at):
            if at == self.at:
                print("waiting", flush=True)
                time.sleep(60)
"""


def written(directory, at="nowhere"):
    (directory / "service.prototxt").write_text('services { name: "S" workflows: "main" }')
    node = f'nodes {{ name: "a" type: "slow_op:Slow" config {{ key: "at" text: "{at}" }} }}'
    (directory / "workflow.prototxt").write_text(f'workflows {{ name: "main" {node} }}')
    (directory / "slow_op.py").write_text(textwrap.dedent(SLOW))
    return directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", ["make", "open", "run"])
def test_a_signal_ends_it_at_once_while_it_loads(tmp_path, at, number):
    line = [BIN / "predictor-server", "--conf", written(tmp_path, at), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert select.select([server.stdout], [], [], 300)[0]
        assert server.stdout.readline() == "waiting\n"
        began = time.monotonic()
        server.send_signal(number)
        _, said = server.communicate(timeout=60)
        assert time.monotonic() - began < 30  # the op waits for a minute
        assert server.returncode == 0
        assert said.rstrip().endswith("stopped before it was done")


@pytest.mark.parametrize("listen", ["here", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", ":8500", "::1:8500", "a:b"])
def test_an_address_that_is_none_is_found_by_check_too(tmp_path, command, listen):
    done = command("predictor-server", "--conf", written(tmp_path), "--check", "--listen", listen)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"predictor-server: listen: found {listen!r}, expected host:port"


def test_one_in_the_service_file_is_looked_at_as_well(tmp_path, command):
    (written(tmp_path) / "service.prototxt").write_text('listen: "x" services { name: "S" workflows: "main" }')
    assert "listen: found 'x', expected host:port" in command("predictor-server", "--conf", tmp_path, "--check").stderr


@pytest.mark.parametrize("name", ["paddle-331-conv", "paddle-185-tagger"])
def test_a_directory_with_a_paddle_program_needs_no_manifest(tmp_path, command, name):
    shutil.copytree(GOLDEN / name, tmp_path / "net")
    done = command("predictor-server", "--model", tmp_path / "net", "--check")
    if find_spec("paddle"):
        assert done.returncode == 0, done.stderr
        assert "would serve net 1" in done.stdout
    else:
        assert done.returncode == 1
        assert "expected it installed: pip install 'cube-serving[paddle]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "found neither, expected manifest.json"),
        (("a.pt2", "b.pt2"), "found a.pt2, b.pt2, expected manifest.json"),
        (("a.pt2", "a.onnx", "b.onnx"), "found a.pt2, a.onnx, b.onnx, expected manifest.json"),
        (("a.pdmodel", "__model__"), "found a.pdmodel, __model__, expected manifest.json"),
    ],
)
def test_a_directory_whose_program_is_not_clear_is_refused(tmp_path, command, files, message):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    done = command("predictor-server", "--model", tmp_path, "--check")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
