"""What a request must hold, found from what the nodes of a workflow take."""

import pytest

from cube.errors import BadConfig
from predictor.ops.op import Op, Port
from predictor.ops.values import Average, PassOn
from predictor.request_ports import request_ports
from predictor.workflow import Dependency, Node


class Takes(Op):
    """An op with these inputs, and an output `made`."""

    def __init__(self, **inputs):
        self._inputs = inputs

    def wanted(self):
        return self._inputs

    def bind(self, inputs):
        return {"made": Port("FP32")}


FLOATS, WORDS, WIDE = Port("FP32"), Port("BYTES"), Port("FP32", (-1, 4))


def found(*nodes, declared=None, of_lookups=()):
    return request_ports("workflow 'w'", nodes, declared or {}, of_lookups)


def after(*names):
    return tuple(map(Dependency, names))


def test_what_no_node_makes_is_the_requests():
    first, second = Node("a", Takes(x=FLOATS)), Node("b", Takes(made=FLOATS, y=WORDS), after("a"))
    assert found(first, second) == {"x": FLOATS, "y": WORDS}
    assert found(second, first) == {"x": FLOATS, "y": WORDS}  # whatever their order


def test_a_node_that_passes_a_request_on_is_looked_through():
    reader = Node("r", PassOn())
    assert found(reader, Node("a", Takes(x=FLOATS), after("r"))) == {"x": FLOATS}
    assert found(reader, Node("a", Takes(x=FLOATS), after("r"), inputs={"x": "r.z"})) == {"z": FLOATS}
    behind = Node("b", PassOn(), after("a"))
    assert found(reader, Node("a", Takes(x=FLOATS), after("r")), behind) == {"x": FLOATS}


def test_inputs_that_name_the_request_and_conditions_count():
    node = Node("a", Takes(x=FLOATS), inputs={"x": "request.price"}, when="!request.cheap")
    assert found(node) == {"price": FLOATS, "cheap": Port("BOOL")}
    assert found(Node("a", Takes(x=FLOATS)), Node("b", Takes(x=FLOATS), after("a"), {"x": "a.made"})) == {"x": FLOATS}


def test_a_shape_that_one_node_leaves_open_is_what_the_other_says():
    loose = Node("a", Takes(x=Port("FP32", (-1, -1))))
    assert found(loose, Node("b", Takes(x=WIDE))) == {"x": WIDE}
    assert found(Node("b", Takes(x=WIDE)), loose) == {"x": WIDE}
    for other in (Port("FP32", (-1, 5)), Port("FP64", (-1, 4)), FLOATS, Port("FP32", (-1, 4), ragged=True)):
        with pytest.raises(BadConfig, match=r"node 'b' input 'x': found .* and another node takes FP32"):
            found(Node("a", Takes(x=WIDE)), Node("b", Takes(x=other)))


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("n", Average())],
        [Node("r", PassOn()), Node("n", Average(), after("r"))],
        [Node("n", Average(["x"]))],
    ],
)
def test_what_cannot_be_known_is_to_be_declared(nodes):
    with pytest.raises(BadConfig, match=r"node 'n'.* expected inputs \{ name: \.\.\. datatype"):
        found(*nodes)
    assert found(*nodes, declared={"x": WIDE}) == {"x": WIDE}


def test_declared_inputs_are_all_but_those_of_lookups():
    nodes = [Node("a", Takes(keys=Port("UINT64", ragged=True, per_row=3), x=FLOATS))]
    declared = found(*nodes, declared={"x": WIDE}, of_lookups={"keys"})
    assert declared == {"keys": Port("UINT64", ragged=True, per_row=3), "x": WIDE}


def test_an_echo_takes_texts():
    assert found(Node("a", PassOn()), Node("b", PassOn(), after("a"))) == {"text": WORDS}
