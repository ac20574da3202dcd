"""One small net, as a program of each format that an engine runs, and as a function.

shifted = x + table[ids]    score = sigmoid(shifted @ weight)    best = argmax(shifted)
"""

import numpy as np

from trainer_tools.manifest import Tensor

INPUTS = [Tensor("x", "FP32", [-1, 4]), Tensor("ids", "INT64", [-1])]
OUTPUTS = [Tensor("score", "FP32", [-1, 1]), Tensor("best", "INT64", [-1])]
ROWS = 10
_rng = np.random.default_rng(7)
TABLE = _rng.standard_normal((ROWS, 4), np.float32)
WEIGHT = _rng.standard_normal((4, 1), np.float32)
PARAMETERS = {"table": TABLE, "weight": WEIGHT}
TERABYTES = 1 << 45  # elements that a row of what `greedy` nets make has


def feeds(samples, seed=0):
    """Inputs for the net: read-only, as those over a request's bytes are."""
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal((samples, 4), np.float32), rng.integers(0, ROWS, samples)]
    for array in made:
        array.flags.writeable = False
    return made


def by_numpy(x, ids):
    """The net."""
    shifted = x + TABLE[ids]
    return (1 / (1 + np.exp(-(shifted @ WEIGHT)))).astype(np.float32), shifted.argmax(1)


def greedy_by_numpy(x, ids):
    """A function that needs more memory than there is."""
    return np.zeros((len(x), TERABYTES), np.float32), ids


def torch_net():
    """The net as a module."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.from_numpy(TABLE))
            self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT))

        def forward(self, x, ids):
            shifted = x + self.table(ids)
            return {"score": torch.sigmoid(shifted @ self.weight), "best": shifted.argmax(1)}

    return Net().eval()


def greedy_torch_net():
    """A module that needs more memory than there is."""
    import torch

    class Net(torch.nn.Module):
        def forward(self, x, ids):
            wide = x.new_ones((x.shape[0], TERABYTES)).sort(1).values  # a sum alone may be compiled to a loop
            return {"score": wide[:, :1], "best": ids}

    return Net().eval()


def write_torch(path, net):
    """Export a module of `x` and `ids`, any number of samples."""
    import torch

    samples = torch.export.Dim("samples", min=0)
    examples = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    torch.export.save(torch.export.export(net, examples, dynamic_shapes=({0: samples}, {0: samples})), path)
    return path


def write_onnx(path, *, greedy=False):
    """The net, or one that needs more memory than there is, as an ONNX program."""
    from onnx import TensorProto, helper, numpy_helper, save

    kinds = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}

    def described(tensors):
        return [helper.make_tensor_value_info(t.name, kinds[t.datatype], ["samples", *t.shape[1:]]) for t in tensors]

    weights = PARAMETERS
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "weight"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
        helper.make_node("ArgMax", ["shifted"], ["best"], axis=1, keepdims=0),
    ]
    if greedy:
        weights = {"width": np.array([TERABYTES]), "axes": np.array([1])}
        nodes = [
            helper.make_node("Shape", ["x"], ["samples"], end=1),
            helper.make_node("Concat", ["samples", "width"], ["size"], axis=0),
            helper.make_node("ConstantOfShape", ["size"], ["wide"]),
            helper.make_node("ReduceSum", ["wide", "axes"], ["score"]),
            helper.make_node("Identity", ["ids"], ["best"]),
        ]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", described(INPUTS), described(OUTPUTS), stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_paddle(directory, *, greedy=False):
    """The same by Paddle, for a Python that has it, with FLAGS_enable_pir_api=0; returns the program's file."""
    import paddle

    paddle.enable_static()
    main, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(main, startup):
        x = paddle.static.data("x", [None, 4], "float32")
        ids = paddle.static.data("ids", [None], "int64")
        if greedy:
            wide = paddle.expand(paddle.reshape(x, [-1, 1, 1, 4]), [-1, 1 << 30, TERABYTES >> 30, 4])
            first = paddle.slice(wide, axes=[1, 2, 3], starts=[0, 0, 0], ends=[1, 1, 1])
            score, best = paddle.static.nn.fc(paddle.reshape(first, [-1, 1]), 1), ids
        else:
            held = {n: paddle.ParamAttr(n, initializer=paddle.nn.initializer.Assign(a)) for n, a in PARAMETERS.items()}
            rows = paddle.static.nn.embedding(ids, [ROWS, 4], param_attr=held["table"])
            shifted = x + rows
            score = paddle.static.nn.fc(shifted, 1, weight_attr=held["weight"], bias_attr=False, activation="sigmoid")
            best = paddle.reshape(paddle.topk(shifted, 1)[1], [-1])
        outputs = []
        for tensor, made in zip(OUTPUTS, (score, best), strict=True):
            outputs.append(main.global_block().create_var(name=tensor.name, dtype=made.dtype, shape=tensor.shape))
            paddle.assign(made, output=outputs[-1])
    executor = paddle.static.Executor(paddle.CPUPlace())
    executor.run(startup)
    paddle.static.save_inference_model(str(directory / "net"), [x, ids], outputs, executor, program=main)
    return directory / "net.pdmodel"
