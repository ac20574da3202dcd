"""The layout is a promise; this file keeps it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cube", "predictor", "trainer_tools")

# Who may import what of ours, beyond itself. The longest rule that fits a module counts.
CUBE_LIBRARY = {
    "cube.build", "cube.client", "cube.cluster", "cube.config", "cube.errors", "cube.kernels", "cube.keys",
    "cube.publish", "cube.rows", "cube.rpc", "cube.sources", "cube.version",
}  # fmt: skip
MAY_IMPORT = {
    "cube": set(),
    "predictor": {
        "cube.client", "cube.cluster", "cube.config", "cube.errors", "cube.kernels", "cube.keys", "cube.logs",
        "cube.rows", "cube.rpc", "cube.version",
        "trainer_tools.manifest",
    },
    "predictor.cli": {"cube.cli", "cube.config", "cube.logs", "cube.rpc.process"},
    "predictor.engines": {
        "cube.errors", "predictor.named", "predictor.tensors", "trainer_tools.manifest", "trainer_tools.programs",
    },
    "predictor.named": {"cube.errors"},
    "predictor.client": {
        "cube.errors", "cube.rpc.calls", "cube.rpc.channel", "predictor.pb", "predictor.tensors",
        "trainer_tools.criteo",
    },
    "predictor.client.cli": {"cube.cli", "cube.config", "cube.errors", "predictor.pb"},
    "trainer_tools": {
        "cube.build", "cube.client", "cube.errors", "cube.kernels", "cube.keys", "cube.publish", "cube.rows",
        "cube.sources", "cube.version",
    },
    "trainer_tools.manifest": {"cube.errors", "cube.version"},
    "trainer_tools.criteo": {"cube.errors", "cube.kernels", "cube.keys"},
}  # fmt: skip
# Modules that only the cube's own composition roots and services touch.
NEVER_OUTSIDE_CUBE = ("cube.server", "cube.service", "cube.storage", "cube.table")


def inside(module, name):
    return module == name or module.startswith(name + ".")


def our_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            yield from (node.module if "." in node.module else f"{node.module}.{a.name}" for a in node.names)


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.parent.name != "pb":
                yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_point_the_way_the_architecture_says():
    wrong = []
    for path, me in modules():
        rule = max((r for r in MAY_IMPORT if inside(me, r)), key=len)
        home = rule if rule not in ("predictor.cli", "predictor.client.cli") else rule.rpartition(".")[0]
        for name in our_imports(path):
            allowed = inside(name, home) or any(inside(name, a) for a in MAY_IMPORT[rule])
            foreign = not inside(me, "cube") and any(inside(name, n) for n in NEVER_OUTSIDE_CUBE)
            if not allowed or foreign:
                wrong.append(
                    f"{me} imports {name}; {rule} may import {', '.join(sorted(MAY_IMPORT[rule])) or 'nothing of ours'}"
                )
    assert not wrong, "\n".join(wrong)


def test_every_package_is_listed_in_pyproject():
    listed = (ROOT / "pyproject.toml").read_text()
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert f'"{".".join(init.parent.relative_to(ROOT).parts)}"' in listed


def test_top_level_is_what_the_user_fixed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {
        "cube",
        "predictor",
        "trainer_tools",
        "proto",
        "conf",
        "tests",
        "benchmarks",
        "deploy",
        "docs",
        "examples",
        ".ci",
    }


def test_no_module_has_a_name_that_says_nothing():
    vague = {"util", "utils", "common", "helper", "helpers", "misc", "base"}
    assert not [me for _, me in modules() if me.rpartition(".")[2] in vague]


@pytest.mark.parametrize(
    "module", ["cube.cli", "cube.ctl", "cube.server", "predictor.client", "predictor.client.cli", "predictor.cli"]
)
def test_servers_of_rows_and_clients_never_load_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", ["cube", "cube.rpc.process", "cube.rpc.listener", "cube.rpc.blocking_channel"])
def test_the_wire_does_not_wait_for_a_compiler_to_load(module):
    code = f"import {module}, sys; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", ["cube", "predictor.client", "trainer_tools"])
def test_importing_leaves_logging_signals_and_threads_alone(module):
    code = (
        "import logging, signal, threading; before = signal.getsignal(signal.SIGTERM)\n"
        f"import {module}\n"
        "assert not logging.getLogger().handlers and signal.getsignal(signal.SIGTERM) is before\n"
        "assert threading.active_count() == 1, threading.enumerate()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_is_exported_is_what_is_listed():
    import inspect

    import cube
    import predictor.client

    for package in (cube, predictor.client):
        assert all(hasattr(package, name) for name in package.__all__)  # and what comes when it is asked for has come
        visible = {n for n, v in vars(package).items() if not n.startswith("_") and not inspect.ismodule(v)}
        assert visible == set(package.__all__)
