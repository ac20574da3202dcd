"""A node's type and config → its op."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lone_op import run
from own_ops import Plain
from places import ROOT

from cube.errors import BadConfig, BadData
from predictor.engines.callable_engine import CallableEngine
from predictor.models import Model, Settings
from predictor.ops import registry
from predictor.ops.infer import Infer
from predictor.ops.op import Op, Port
from predictor.ops.respond import Respond
from predictor.ops.values import PassOn
from trainer_tools.manifest import Tensor

OWN = "own_ops:Own"


class Resources:
    """One model, called halves, and a directory."""

    settings = Settings(None, 10, 10, 1.0, 1.0)

    def model(self, name):
        if name not in (None, "halves"):
            raise BadConfig("model", repr(name), "'halves'")
        engine = CallableEngine("own_ops:halves", [Tensor("x", "FP32", [-1])], [Tensor("y", "FP32", [-1])])
        return Model("halves", "1", engine, {"x": Port("FP32")})

    def path(self, name):
        return Path("/conf") / name


@pytest.mark.parametrize("kind", ["read", "ReaderOp", "GeneralReaderOp", "echo", "CommonEchoOp"])
def test_some_types_pass_values_on(kind):
    assert type(registry.make(kind, {})) is PassOn


@pytest.mark.parametrize("kind", ["infer", "ClassifyOp", "GeneralInferOp"])
@pytest.mark.parametrize("config", [{}, {"model": "halves", "nan": "fail"}])
def test_some_types_run_a_model(kind, config):
    op = registry.make(kind, config, Resources())
    assert type(op) is Infer
    assert run(op, {"x": np.array([3.0], np.float32)}, 1)["y"].tolist() == [1.5]


def test_the_ancestors_names_come_with_their_ways():
    assert registry.make("WriteJsonOp", {"names": ["x"]}).bind({"x": Port("FP32")}) == {"json": Port("BYTES")}
    assert registry.make("WriteJsonOp", {"json": False}).bind({"x": Port("FP32")}) == {"x": Port("FP32")}
    assert type(registry.make("GeneralResponseOp", {})) is Respond
    assert registry.series("GeneralDistKVInferOp") == ("gather", "pool", "infer")
    assert registry.series("ClassifyOp") == registry.series("infer") == ("infer",)


@pytest.mark.parametrize("kind", list(registry.TYPES))
def test_every_type_can_be_imported(kind):
    needed = {"select": {"names": ["x"]}, "cast": {"to": "FP32"}, "top_k": {"k": 1}, "pad": {"length": 3}}
    needed |= {"sign": {"slots": [1]}}
    if kind == "tokenise":
        needed[kind] = {"vocabulary": __file__, "unknown": "not_an_op = 3"}
        with pytest.raises(BadConfig, match="again, expected every token once"):
            registry.make(kind, needed[kind])
    else:
        assert isinstance(registry.make(kind, needed.get(kind, {})), Op)


def test_config_becomes_arguments():
    config = {
        "number": 1, "share": 2, "names": ["a", "b"], "on": True, "how": "b", "file": "f.txt", "more": 1,
        "untold": [1, "x"],
    }  # fmt: skip
    assert registry.make(OWN, config, Resources()).given == (
        1, 2, ["a", "b"], True, "b", Path("/conf/f.txt"), [1], [1, "x"],
    )  # fmt: skip
    assert registry.make(OWN, {"number": 0}).given == (0, 0.5, (), False, "a", None, (), None)
    assert isinstance(registry.make("own_ops:Plain", {}), Plain)
    assert registry.make("own_ops:Free", {"a": 1}).config == {"a": 1}


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("tokenize", {}, "type 'tokenize': found no such op, expected 'tokenise'"),
        ("ReadOp", {}, "type 'ReadOp': found no such op, expected 'ReaderOp'"),
        ("zzz", {}, "type 'zzz': found no such op, expected one of read, echo, .*, or module:Class"),
        ("GeneralDistKVInferOp", {}, "found one node, expected nodes gather → pool → infer"),
        ("os:system(1)", {}, r"found 'os:system\(1\)', expected module:class"),
        ("no.such.module:Op", {}, "found ModuleNotFoundError: No module named 'no'"),
        ("own_ops:Missing", {}, "found no Missing in module .*, expected a class of this name"),
        ("own_ops:not_an_op", {}, "found own_ops:not_an_op, which is no op, expected a subclass of predictor.ops.op"),
        ("pathlib:Path", {}, "found pathlib:Path, which is no op"),
        ("own_ops:Plain", {"x": 1}, "config 'x': found no such key, expected none"),
        (OWN, {}, "config 'number': found nothing, expected a whole number"),
        (OWN, {"number": 1, "nmes": []}, "config 'nmes': found no such key, expected 'names'"),
        (OWN, {"number": True}, "config 'number': found True, expected a whole number"),
        (OWN, {"number": 1.5}, "config 'number': found 1.5, expected a whole number"),
        (OWN, {"number": 1, "share": "x"}, "config 'share': found 'x', expected a number"),
        (OWN, {"number": 1, "names": ["a", 2]}, r"config 'names'\[1\]: found 2, expected a text"),
        (OWN, {"number": 1, "on": 1}, "config 'on': found 1, expected true or false"),
        (OWN, {"number": 1, "how": "c"}, "config 'how': found 'c', expected 'a' or 'b'"),
        (OWN, {"number": 1, "file": 3}, "config 'file': found 3, expected the path of a file"),
        (OWN, {"number": -1}, f"op '{OWN}' number: found -1, expected 0 or more"),
        (OWN, {"number": 99}, "found ZeroDivisionError: by 99, expected a class that can be made of its config"),
        ("infer", {"model": 3}, "op 'infer' config 'model': found 3, expected a text"),
        ("infer", {"model": "thirds"}, "model: found 'thirds', expected 'halves'"),
        ("infer", {"nan": "no"}, "op 'infer' config 'nan': found 'no', expected 'pass' or 'replace' or 'fail'"),
        ("infer", {"threads": -1}, "op 'infer' threads and part_rows: found -1 and 32"),
        ("gather", {}, "model 'halves': found no tables"),
    ],
)
def test_a_node_that_cannot_be_is_refused(kind, config, message):
    with pytest.raises(BadConfig, match=message):
        registry.make(kind, config, Resources())


def test_errors_of_other_kinds_stay_what_they_are():
    with pytest.raises(BadData, match="file"):
        registry.make(OWN, {"number": 13})


def test_without_models_there_is_no_infer():
    with pytest.raises(BadConfig, match="op 'infer': found no models here"):
        registry.make("infer", {})


def test_what_an_op_needs_and_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "predictor.ops.image", raising=False)
    with pytest.raises(BadConfig, match=r"op 'image': found no Pillow here, .* pip install 'cube-serving\[image\]'"):
        registry.make("image", {})


def test_an_op_that_nobody_asks_for_is_not_imported():
    code = (
        "import predictor.ops.registry, sys; sys.exit(bool({'PIL', 'torch', 'predictor.ops.image'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
