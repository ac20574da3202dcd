"""Runs a Paddle program in numpy: the ops of the golden programs, in the order in which they stand."""

import itertools

import numpy as np

from trainer_tools.programs.paddle_desc import arguments, reads, writes


def attribute(op, name, default=None):
    for attr in op.attrs:
        if attr.name == name:
            fields = ("i", "f", "s", "ints", "floats", "strings", "b", "bools", "block_idx", "l", None, "longs")
            return getattr(attr, fields[attr.type])
    return default


def pooled(rows, offsets, how):
    counts = np.maximum(np.diff(offsets), 1) if how == b"AVERAGE" else np.ones(len(offsets) - 1)
    sums = [rows[start:end].sum(axis=0) for start, end in itertools.pairwise(offsets)]
    return np.array(sums, np.float32) / counts[:, None].astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def looked_up(op, table, ids, drop):
    rows = table[ids]
    rows[ids == attribute(op, "padding_idx", -1)] = 0
    return rows.reshape(*(ids.shape[:-1] if drop else ids.shape), -1)


def reshaped(op, x):
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(attribute(op, "shape"))])


def summed(op, x):
    axis = None if attribute(op, "reduce_all") else tuple(attribute(op, "dim"))
    return x.sum(axis=axis, keepdims=attribute(op, "keep_dim"))


def flattened(op, x):
    start, stop = attribute(op, "start_axis"), attribute(op, "stop_axis") % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[stop + 1 :])


COMPUTE = {
    "concat": lambda op, *xs: np.concatenate(xs, axis=attribute(op, "axis")),
    "mul": lambda op, x, y: x @ y,
    "matmul_v2": lambda op, x, y: x @ y,
    "elementwise_add": lambda op, x, y: x + y,
    "elementwise_sub": lambda op, x, y: x - y,
    "elementwise_mul": lambda op, x, y: x * y,
    "sum": lambda op, *xs: sum(xs),
    "scale": lambda op, x: x * np.float32(attribute(op, "scale")) + np.float32(attribute(op, "bias")),
    "relu": lambda op, x: np.maximum(x, 0),
    "sigmoid": lambda op, x: 1 / (1 + np.exp(-x)),
    "softmax": lambda op, x: softmax(x),
    "reshape2": reshaped,
    "reduce_sum": summed,
    "flatten_contiguous_range": flattened,
    "lookup_table": lambda op, w, ids: looked_up(op, w, ids, drop=True),
    "lookup_table_v2": lambda op, w, ids: looked_up(op, w, ids, drop=False),
}


def run(program, inputs, lods):
    """Outputs by name. inputs: arrays by name; lods: offsets of the ragged ones, to which others are added."""
    values = {n: p.array() for n, p in program.parameters.items()} | inputs
    outputs = {}
    for op in program.desc.blocks[0].ops:
        if op.type == "feed":
            (name,) = writes(op)
            assert name in inputs
        elif op.type == "fetch":
            (name,) = reads(op)
            outputs[name] = values[name]
        else:
            slots = {slot.parameter: list(slot.arguments) for slot in op.inputs}
            names = slots["W"] + slots["Ids"] if "Ids" in slots else slots["X"] + slots.get("Y", [])
            out = arguments(op.outputs, "Out")[0]
            if op.type == "sequence_pool":
                values[out] = pooled(values[names[0]], lods[names[0]], attribute(op, "pooltype"))
            else:
                values[out] = COMPUTE[op.type](op, *(values[name] for name in names))
                if ragged := [name for name in names if name in lods]:
                    lods[out] = lods[ragged[0]]
    return outputs
