"""An answer must not depend on what else is in a batch: each op on a whole, and on its parts joined again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lone_op import plain, ragged, run

from predictor.ops.op import Port
from predictor.ops.rank import TopK
from predictor.ops.respond import Respond
from predictor.ops.text import Pad, Tokenise
from predictor.ops.values import Average, Cast, Choose, Concat, PassOn, Select
from predictor.rows import join_rows, slice_rows
from predictor.tensors import texts

PORTS = {
    "score": Port("FP32", (-1, 3)),
    "wide": Port("FP32", (-1, 5)),
    "other": Port("FP32", (-1, 3)),
    "condition": Port("BOOL"),
    "yes": Port("INT64", ragged=True),
    "no": Port("INT64", ragged=True),
    "text": Port("BYTES"),
    "words": Port("BYTES", ragged=True),
}


def batch(rows, seed):
    """A value of every port."""
    rng = np.random.default_rng(seed)

    def said(count):
        return [b" ".join([b"a", b"bb", b"?", b"A"][i] for i in rng.integers(0, 4, 3)) for _ in range(count)]

    return {
        "score": rng.integers(0, 4, (rows, 3)).astype(np.float32),
        "wide": rng.random((rows, 5), np.float32),
        "other": rng.random((rows, 3), np.float32),
        "condition": rng.random(rows) < 0.5,
        "yes": ragged([rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, rows)]),
        "no": ragged([rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, rows)]),
        "text": texts(said(rows)),
        "words": ragged([said(n) for n in rng.integers(0, 3, rows)], bytes),
    }


OPS = {
    "pass on": lambda path: PassOn(),
    "select": lambda path: Select(["s=score", "words"]),
    "columns": lambda path: Select(["s=score", "wide"], columns=[2], flat=True),
    "concat": lambda path: Concat(["wide", "score"]),
    "concat bags": lambda path: Concat(["yes", "no"]),
    "cast": lambda path: Cast("INT16", ["yes", "wide"]),
    "choose": lambda path: Choose(),
    "average": lambda path: Average(["score", "other"], weights=[1, 2]),
    "top k": lambda path: TopK(2, input="score"),
    "top k of bags": lambda path: TopK(2, input="yes"),
    "json": lambda path: Respond(["score", "words", "no", "text"], json=True),
    "pad": lambda path: Pad(2, input="yes", keep="last"),
    "tokenise": lambda path: Tokenise(path, unknown=""),
}


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=15)
@given(rows=st.integers(1, 9), cut=st.integers(0, 9), seed=st.integers(0, 1000))
def test_parts_of_a_batch_give_parts_of_its_answer(tmp_path_factory, name, rows, cut, seed):
    path = tmp_path_factory.getbasetemp() / "vocabulary.txt"
    path.write_text("a\nbb\n")
    op, values = OPS[name](path), batch(rows, seed)
    ports = {given: PORTS[given] for given in values}
    whole = run(op, values, rows, ports)
    made = op.bind({given: ports[given] for given in (op.wanted() or ports)})
    cuts = [(0, min(cut, rows)), (min(cut, rows), rows)]
    parts = [
        run(
            op,
            {given: slice_rows(value, ports[given], *part) for given, value in values.items()},
            part[1] - part[0],
            ports,
        )
        for part in cuts
        if part[0] < part[1]
    ]
    for output, port in made.items():
        assert plain(join_rows([part[output] for part in parts], port)) == plain(whole[output])
