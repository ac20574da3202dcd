"""prune-program on Paddle programs, for tests: programs made by hand, and what both kinds of test say."""

import numpy as np
import pytest

from cube.errors import BadData
from trainer_tools.pb.paddle_framework_pb2 import BLOCK, INT, OpDesc, ProgramDesc, VarDesc, VarType
from trainer_tools.programs import paddle
from trainer_tools.programs.program import Rules, decide
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options

QUICK = Options(verify_samples=0)
CTR = [f"embedding_{i}.tmp_0" for i in range(3)]


def bytes_of(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def variable(name, dims, kind=VarType.FP32, **fields):
    tensor = VarType.DenseTensorDesc(tensor=VarType.TensorDesc(data_type=kind, dims=dims))
    return VarDesc(name=name, type=VarType(type=VarType.DENSE_TENSOR, dense_tensor=tensor), **fields)


def op(kind, inputs, outputs, *attrs):
    return OpDesc(
        type=kind,
        inputs=[OpDesc.Var(parameter=k, arguments=v.split()) for k, v in inputs.items()],
        outputs=[OpDesc.Var(parameter=k, arguments=v.split()) for k, v in outputs.items()],
        attrs=attrs,
    )


def made(directory, ops, *more, tables=("t",), inner=()):
    """A program over ids `a`, `b` [-1, 1], tables [2000, 3] as parameter files, fetching `y`."""
    desc = ProgramDesc()
    block = desc.blocks.add(idx=0, parent_idx=-1)
    block.vars.extend([variable(name, [2000, 3], persistable=True) for name in tables])
    block.vars.extend([variable(name, [-1, 1], VarType.INT64) for name in ("a", "b")])
    block.vars.extend(more)
    block.vars.extend([variable(name, [-1, 3]) for name in ("x", "y", "z")])
    feeds = [op("feed", {"X": "feed"}, {"Out": n}, OpDesc.Attr(name="col", type=INT, i=i)) for i, n in enumerate("ab")]
    block.ops.extend([*feeds, *ops, op("fetch", {"X": "y"}, {"Out": "fetch"})])
    if inner:
        desc.blocks.add(idx=1, parent_idx=0).ops.extend(inner)
    directory.mkdir(exist_ok=True)
    (directory / "__model__").write_bytes(desc.SerializeToString())
    for name in tables:
        (directory / name).write_bytes(stream(np.arange(6000, dtype="<f4").reshape(2000, 3)))
    return directory


def stream(array):
    """A parameter as Paddle stores it."""
    kind = {"<f4": VarType.FP32, "<f2": VarType.FP16, "<f8": VarType.FP64, "<i8": VarType.INT64}[array.dtype.str]
    shape = VarType.TensorDesc(data_type=kind, dims=array.shape).SerializeToString()
    return bytes(16) + len(shape).to_bytes(4, "little") + shape + array.tobytes()  # versions and LoD levels are zeros


LOOKUP = op("lookup_table_v2", {"Ids": "a", "W": "t"}, {"Out": "x"})
INNER = OpDesc.Attr(name="sub_block", type=BLOCK, block_idx=1)
DOUBLED = op("scale", {"X": "x"}, {"Out": "y"})


def reason(directory):
    return [(c.lookup.name, c.is_cut, c.reason) for c in decide(paddle.load(directory).serving(), Rules())]


def refused(directory, tmp_path, message, options=QUICK):
    """prune-program says so, and neither writes nor changes anything."""
    before = bytes_of(directory)
    with pytest.raises(BadData, match=message):
        prune(directory, tmp_path / "out", options)
    assert bytes_of(directory) == before
    assert not (tmp_path / "out").exists()
