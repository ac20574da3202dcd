"""An op outside any workflow, its answer held to its own ports."""

import asyncio
import inspect
import itertools

import numpy as np
from hypothesis import strategies as st

from predictor.ops.op import Batch, Ragged, port_of
from predictor.tensors import Texts, texts


def run(op, values, rows, ports=None):
    """What `op` makes of a batch, after what it makes has been bound. ports: of the values, by rows unless given."""
    ports = {name: port_of(value) for name, value in values.items()} | (ports or {})
    wanted = op.wanted()
    made_ports = op.bind({name: ports[name] for name in (wanted or ports)})
    batch = Batch({name: values[name] for name in (wanted or values)})
    batch.rows, batch.deadline = rows, None
    made = op.run(batch)
    if inspect.iscoroutine(made):
        made = asyncio.run(made)
    assert list(made) == list(made_ports)
    for name, port in made_ports.items():
        assert not port.misfit(made[name], rows), (name, port.misfit(made[name], rows))
    return made


def ragged(bags, dtype=np.int64):
    """Lists of numbers, or of bytes, as a Ragged."""
    offsets = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])]).astype(np.int64)
    flat = [value for bag in bags for value in bag]
    return Ragged(texts(flat) if dtype is bytes else np.array(flat, dtype), offsets)


def plain(value):
    """A value as Python objects: lists of rows, bags and bytes."""
    if isinstance(value, Ragged):
        flat, ends = plain(value.values), value.offsets.tolist()
        return [flat[start:stop] for start, stop in itertools.pairwise(ends)]
    if isinstance(value, Texts):
        each = [value.data[a : a + n].tobytes() for a, n in zip(value.starts, value.sizes, strict=True)]
        return np.array(each, object).reshape(value.shape).tolist()
    return value.tolist()


def bags(elements, rows, most=4):
    """Lists of lists, one for each row."""
    return st.lists(st.lists(elements, max_size=most), min_size=rows, max_size=rows)
