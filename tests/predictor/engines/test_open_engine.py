"""What cannot be opened is refused with what was found, what was expected, and what to install."""

import sys

import dense_programs
import numpy as np
import pytest
import torch
from dense_programs import INPUTS, OUTPUTS

from cube.errors import BadConfig, BadData, Internal, OutOfMemory, Unavailable
from predictor.engines.callable_engine import CallableEngine
from predictor.engines.onnx_engine import OnnxEngine
from predictor.engines.open import open_engine
from predictor.engines.torch_engine import TorchEngine
from trainer_tools.manifest import Tensor


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A program of each format that is here."""
    place = tmp_path_factory.mktemp("programs")
    net = dense_programs.write_torch(place / "net.pt2", dense_programs.torch_net())
    return {"torch.export": net, "onnx": dense_programs.write_onnx(place / "net.onnx")}


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        ("tensorflow", {}, "found a program of format 'tensorflow', expected torch.export or onnx or paddle"),
        ("onnx", {"engine": "TORCH"}, "engine: found TORCH for .*net.onnx, expected ONNXRUNTIME or AUTO"),
        ("torch.export", {"engine": "torch"}, "engine: found 'torch', expected AUTO or TORCH or ONNXRUNTIME or PADDLE"),
        ("onnx", {"compile": "aot"}, "compile: found 'aot' for .*net.onnx, expected none, for a onnx program"),
        ("torch.export", {"compile": "inductor"}, "compile: found 'inductor', expected none or aot"),
        (
            "torch.export",
            {"memory_limit_mb": 64},
            "memory_limit_mb: found 64 for torch on the CPU, expected 0: torch has",
        ),
        (
            "torch.export",
            {"memory_limit_mb": 64, "compile": "aot", "engine": "TORCH"},
            "memory_limit_mb: found 64 for a compiled program, expected 0",
        ),
        ("onnx", {"memory_limit_mb": -1}, "memory_limit_mb: found -1, expected 0 .none. or more"),
        ("torch.export", {"device": "gpu"}, "device: found 'gpu', expected cpu or cuda:N"),
        ("torch.export", {"device": "cuda"}, "device: found 'cuda', expected cpu or cuda:N"),
        ("torch.export", {"device": "cuda:99"}, "device: found cuda:99, expected one that torch sees: cpu"),
        (
            "torch.export",
            {"device": "cuda:0", "compile": "aot", "engine": "TORCH"},
            "device: found cuda:0 for a compiled",
        ),
        ("torch.export", {"threads": 0}, "threads: found 0, expected 1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(programs, format, settings, message):
    with pytest.raises(BadConfig, match=message):
        open_engine(programs.get(format, programs["onnx"]), format, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(programs):
    with pytest.raises(BadConfig, match=r"device: found cuda:0, expected one that torch sees: cpu$"):
        open_engine(programs["torch.export"], "torch.export", device="cuda:0")
    with pytest.raises(BadConfig, match=r"device: found cuda:0, expected cpu: .*pip install onnxruntime-gpu"):
        open_engine(programs["onnx"], "onnx", device="cuda:0")


@pytest.mark.parametrize(
    ("format", "package", "extra"), [("onnx", "onnxruntime", "onnx"), ("torch.export", "torch", "torch")]
)
def test_what_is_not_installed_is_named(programs, monkeypatch, format, package, extra):
    for module in ("onnx_engine", "torch_engine"):
        monkeypatch.delitem(sys.modules, f"predictor.engines.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(BadConfig, match=rf"net\..*: found no .* here .*pip install 'cube-serving\[{extra}\]'"):
        open_engine(programs[format], format)


@pytest.mark.parametrize(("format", "suffix"), [("torch.export", "pt2"), ("onnx", "onnx")])
@pytest.mark.parametrize("content", [None, b"", b"no program at all", "half"])
def test_files_that_are_no_programs_are_refused(programs, tmp_path, format, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    if content is not None:
        whole = programs[format].read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(BadData) as refused:
        open_engine(path, format)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("location", ["missing.bin", "../outside.bin", "/etc/hostname"])
def test_onnx_parameters_that_are_not_beside_the_program_are_refused(tmp_path, location):
    import onnx

    (tmp_path / "outside.bin").write_bytes(bytes(160))
    path = tmp_path / "m" / "net.onnx"
    path.parent.mkdir()
    model = onnx.load(dense_programs.write_onnx(path))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location, 0, 160)
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadData, match=r"net.onnx: found .*external data.*|net.onnx: found .*External data.*"):
        OnnxEngine(path)


def test_onnx_inputs_that_are_texts_are_refused(tmp_path):
    from onnx import TensorProto, helper, save

    described = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in ("words", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["words"], ["same"])], "g", described[:1], described[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "t.onnx")
    with pytest.raises(BadData, match=r"t.onnx input 'words': found tensor\(string\), expected a tensor of BOOL"):
        OnnxEngine(tmp_path / "t.onnx")


class Counter(torch.nn.Module):
    """Changes its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class Scribble(torch.nn.Module):
    """Changes its input, through a view of it."""

    def forward(self, x):
        x.view(-1)[:1].mul_(2)
        return x + 1


class Normed(torch.nn.Module):
    """Scales rows of its table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 2, max_norm=0.1)

    def forward(self, x):
        return self.table(x.long())


class InPlace(torch.nn.Module):
    """Changes a value of its own: no harm in that."""

    def forward(self, x):
        return (x + 1).mul_(2)


@pytest.mark.parametrize("net", [Counter, Scribble, Normed])
def test_a_torch_program_that_changes_itself_or_its_inputs_is_refused(tmp_path, net):
    torch.export.save(torch.export.export(net(), (torch.ones(2),)), tmp_path / "net.pt2")
    with pytest.raises(
        BadData, match=r"found a program that changes its own parameters \(max_norm\), buffers or inputs"
    ):
        TorchEngine(tmp_path / "net.pt2")


def test_a_torch_program_may_compute_in_place(tmp_path):
    torch.export.save(torch.export.export(InPlace(), (torch.ones(2),)), tmp_path / "net.pt2")
    x = np.array([1, 2], np.float32)
    assert TorchEngine(tmp_path / "net.pt2").run([x])[0].tolist() == [4, 6]
    assert x.tolist() == [1, 2]


def test_torch_weights_are_there_once_however_often_a_net_names_them(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
            self.inner = torch.nn.Module()
            self.inner.same = self.table

        def forward(self, x):
            return (x @ self.table) @ self.inner.same.T, x

    net = Tied()
    batch = torch.export.Dim("batch", min=0)
    exported = torch.export.export(net, (torch.zeros(2, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "tied.pt2")
    engine = TorchEngine(tmp_path / "tied.pt2", threads=2)
    x = np.ones((2, 3), np.float32)
    made, same = engine.run([x])
    assert np.array_equal(made, net(torch.from_numpy(x))[0].detach().numpy())
    assert np.array_equal(same, x)
    torch.set_num_threads(1)


def test_a_broken_compiler_is_named(programs, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(BadConfig, match=r"net.pt2 compile: found .*expected a program that torch can compile, and g"):
        open_engine(programs["torch.export"], "torch.export", engine="TORCH", compile="aot")


def write_wide(path):
    """An ONNX program whose run needs 4 MB for each of its rows."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("ReduceSum", ["wide", "axes"], ["y"], keepdims=1),
    ]
    stored = [numpy_helper.from_array(np.array(a), name) for name, a in (("shape", [1, 1 << 20]), ("axes", [1]))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_onnx_runs_that_need_more_than_their_limit_are_refused_and_the_next_is_as_good_as_any(tmp_path):
    program = write_wide(tmp_path / "wide.onnx")
    narrow, wide, free = (open_engine(program, "onnx", memory_limit_mb=mb) for mb in (16, 256, 0))
    few, many = np.ones((1, 1), np.float32), np.ones((20, 1), np.float32)
    for _ in range(2):
        with pytest.raises(OutOfMemory, match=r"program 'wide\.onnx': not enough memory for this request"):
            narrow.run([many])
        for engine, x in ((narrow, few), (wide, many), (free, many)):
            assert np.array_equal(engine.run([x])[0], np.full((len(x), 1), 1 << 20))


# ---- Python functions ----


def by_name(x, ids):
    """For the tests below: what it is told by the first id."""
    return ANSWERS[int(ids[0])](x, ids)


def refuse(x, ids):
    raise Unavailable("the other service: down")


ANSWERS = [
    dense_programs.by_numpy,
    lambda x, ids: x,
    lambda x, ids: (x[:, :1].astype(np.float64), ids),
    lambda x, ids: (x, ids),
    lambda x, ids: (x[:, :1].tolist(), ids),
    refuse,
    lambda x, ids: [x[:, :1], ids],
]


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (1, Internal, "made 1 outputs, not 2"),
        (2, Internal, r"output 'score' is float64 \[3, 1\], not FP32 \[-1, 1\]"),
        (3, Internal, r"output 'score' is float32 \[3, 4\], not FP32 \[-1, 1\]"),
        (4, Internal, "output 'score' is <class 'list'>, not FP32"),
        (5, Unavailable, "the other service: down"),
    ],
)
def test_a_function_that_answers_otherwise_than_declared_is_a_fault(monkeypatch, number, error, message):
    monkeypatch.setitem(sys.modules, "functions_of_this_test", sys.modules[__name__])
    engine = CallableEngine("functions_of_this_test:by_name", INPUTS, OUTPUTS)
    x = np.ones((3, 4), np.float32)
    with pytest.raises(error, match=message):
        engine.run([x, np.full(3, number)])
    assert np.array_equal(engine.run([x, np.full(3, 6)])[0], x[:, :1])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dense_programs", "callable dense_programs: found 'dense_programs', expected module:function"),
        ("os.path:join:x", "expected module:function"),
        ("__import__('os'):system", "expected module:function"),
        ("nowhere.at.all:f", "callable nowhere.at.all:f: found ModuleNotFoundError"),
        ("dense_programs:nobody", "found no nobody in module dense_programs, expected a function of this name"),
        ("dense_programs:ROWS", "dense_programs:ROWS: found a int, expected a function"),
    ],
)
def test_what_is_no_function_is_refused(target, message):
    with pytest.raises(BadConfig, match=message.replace("(", r"\(")):
        CallableEngine(target, INPUTS, OUTPUTS)


def test_datatypes_that_no_array_has_are_refused():
    with pytest.raises(BadConfig, match="'t': found BYTES, expected one of BOOL"):
        CallableEngine("dense_programs:by_numpy", [Tensor("t", "BYTES", [-1])], OUTPUTS)
