"""Which values go where, in which order, and what is refused at load."""

import pytest

from cube.errors import BadConfig
from predictor.ops.op import Op, Port
from predictor.workflow import Dependency, Mode, Node, plan

X = Port("FP32", (-1, 2))
REQUEST = {"x": X}


class Step(Op):
    """An op with these names: takes "a b", makes "c d"; all of one port."""

    def __init__(self, takes, makes, port=X):
        self.inputs = dict.fromkeys(takes.split(), port)
        self.outputs = dict.fromkeys(makes.split(), port)


class All(Op):
    """Takes whatever it is given, and makes the same."""

    def wanted(self):
        return None

    def bind(self, inputs):
        return inputs


def node(name, takes="", makes="", after="", **more):
    """after: "a b!", nodes it depends on; ! for RW."""
    dependencies = tuple(Dependency(d.rstrip("!"), Mode.RW if d.endswith("!") else Mode.RO) for d in after.split())
    return Node(name, Step(takes, makes), dependencies, **more)


def names(plan):
    return [step.node.name for step in plan.steps]


def takes(plan, name):
    """Name → (maker's name, is it copied) of one node's inputs."""
    makers = {make.place: f"{step.node.name}.{make.name}" for step in plan.steps for make in step.makes}
    makers |= {place: f"request.{name}" for place, name in enumerate(plan.request)}
    (step,) = [step for step in plan.steps if step.node.name == name]
    return {take.name: (makers[take.place], take.is_copied) for take in step.takes}


def frozen(plan, name):
    (step,) = [step for step in plan.steps if step.node.name == name]
    return {make.name: make.is_frozen for make in step.makes}


def test_nodes_run_after_those_they_depend_on_else_as_they_are_given():
    made = plan(
        "w",
        [node("d", "b c", "y", "b c"), node("c", "a", "c", "a"), node("b", "a", "b", "a"), node("a", "x", "a")],
        REQUEST,
    )
    assert names(made) == ["a", "c", "b", "d"]
    assert [[step.node.name for step in stage] for stage in made.stages] == [["a"], ["c", "b"], ["d"]]
    assert list(made.outputs) == ["y"]


def test_a_value_comes_from_a_dependency_before_the_request():
    made = plan("w", [node("a", "x", "x z"), node("b", "x z", "y", "a")], REQUEST)
    assert takes(made, "a") == {"x": ("request.x", False)}
    assert takes(made, "b") == {"x": ("a.x", False), "z": ("a.z", False)}


def test_every_node_may_read_the_request():
    made = plan("w", [node("a", "x", "z"), node("b", "z x", "y", "a")], REQUEST)
    assert takes(made, "b")["x"] == ("request.x", False)


def test_inputs_say_where_names_do_not():
    nodes = [node("a", "x", "v"), node("b", "x", "v"), node("c", "p q", "y", "a b", inputs={"p": "a.v", "q": "b.v"})]
    assert takes(plan("w", nodes, REQUEST), "c") == {"p": ("a.v", False), "q": ("b.v", False)}


def test_an_op_may_take_whatever_there_is():
    made = plan("w", [Node("all", All()), Node("more", All(), (Dependency("all"),))], {"x": X, "z": X})
    assert takes(made, "more") == {"x": ("all.x", False), "z": ("all.z", False)}
    assert list(made.outputs) == ["x", "z"]


def test_the_last_nodes_make_the_reply():
    nodes = [node("a", "x", "v"), node("b", "v", "p", "a"), node("c", "v", "q r", "a")]
    assert sorted(plan("w", nodes, REQUEST).outputs) == ["p", "q", "r"]
    assert list(plan("w", nodes, REQUEST, outputs=["r", "p"]).outputs) == ["r", "p"]


# ---- who may change a value ----


@pytest.mark.parametrize(
    ("nodes", "is_copied", "is_frozen"),
    [
        ([node("a", "x", "v"), node("b", "v", "y", "a!")], False, False),  # handed over
        ([node("a", "x", "v"), node("b", "v", "y", "a!"), node("c", "v", "z", "a")], True, True),
        ([node("a", "x", "v"), node("b", "v", "y", "a!"), node("c", "v", "z", "a!")], True, True),
        ([node("a", "x", "v"), node("b", "v", "y", "a")], False, True),
    ],
)
def test_a_writer_gets_a_copy_only_where_somebody_else_reads(nodes, is_copied, is_frozen):
    made = plan("w", nodes, REQUEST)
    assert takes(made, "b")["v"] == ("a.v", is_copied)
    assert frozen(made, "a") == {"v": is_frozen}


def test_the_request_is_copied_for_a_writer():
    made = plan("w", [Node("a", All()), Node("b", Step("x", "y"), (Dependency("a", Mode.RW),))], REQUEST)
    assert takes(made, "b") == {"x": ("a.x", False)}  # a's own value, whoever made it
    assert takes(made, "a") == {"x": ("request.x", False)}


# ---- conditions ----

IS = Port("BOOL", (-1,))


def test_a_condition_is_a_value_for_each_row():
    a = Node("a", Step("", "is", IS))
    made = plan("w", [a, node("b", "x", "y", "a", when="!a.is")], REQUEST)
    (_, b) = made.steps
    assert (b.guard, b.guard_value) == (1, False)


# ---- merging ----


@pytest.mark.parametrize(
    ("port", "can"),
    [
        (X, True),
        (Port("FP32", (-1,), ragged=True), True),
        (Port("FP32", (2, 2)), False),  # not by rows
        (Port("FP32", (-1, -1)), False),  # rows of two requests may not fit
    ],
)
def test_what_can_be_merged(port, can):
    assert plan("w", [Node("a", All())], {"x": port}).can_batch is can


# ---- what is refused ----


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "workflow 'w': found no nodes"),
        ([node("a", "x", "y"), node("a", "x", "z")], "workflow 'w' node 'a': found a second node of this name"),
        ([node("request", "x", "y")], "node 'request': found this name"),
        ([node("a.b", "x", "y")], "node 'a.b': found this name"),
        ([node("read", "x", "v"), node("b", "v", "y", "raed")], "node 'b' dependency: found 'raed', expected 'read'"),
        ([node("a", "x", "v"), node("b", "v", "y", "a a")], "'a' twice"),
        ([node("a", "v", "x", "c"), node("b", "x", "u", "a"), node("c", "u", "v", "b")], "a cycle: a → b → c → a"),
        ([node("a", "x", "y", "a")], "a cycle: a → a"),
        ([node("a", "z", "y")], r"node 'a' input 'z': found nothing that makes it \(request makes x\)"),
        (
            [node("a", "x", "u"), node("b", "v", "y", "a")],
            r"input 'v': found nothing that makes it \(request makes x; a makes u\)",
        ),
        ([node("a", "x", "v"), node("b", "x", "v"), node("c", "v", "y", "a b")], "input 'v': found made by a and b"),
        ([node("a", "x", "y", inputs={"z": "request.x"})], "input 'z': found no input of its op, expected one of x"),
        ([node("a", "x", "v"), node("b", "x", "y", inputs={"x": "a.v"})], "found 'a.v', expected request or a node it"),
        ([node("a", "x", "v"), node("b", "x", "y", "a", inputs={"x": "a.z"})], "found 'a.z', expected one of a.v"),
        ([node("a", "x", "y"), node("b", "x", "y")], "output 'y': found two of the last nodes that make it"),
        (
            [Node("a", Step("x", "y", Port("FP64", (-1, 2))))],
            r"node 'a' input 'x': found FP32 \[-1, 2\], expected FP64 \[-1, 2\]",
        ),
        ([Node("a", Step("x", "y", Port("FP32", (-1, 3))))], r"expected FP32 \[-1, 3\]"),
        (
            [node("a", "x", "v"), node("b", "x", "y", "a", when="a.v")],
            r"node 'b' when: found 'a.v': FP32 \[-1, 2\], expected BOOL",
        ),
    ],
)
def test_a_graph_that_cannot_run_is_refused(nodes, message):
    with pytest.raises(BadConfig, match=message):
        plan("w", nodes, REQUEST)


def test_outputs_that_nobody_makes_are_refused():
    with pytest.raises(BadConfig, match="workflow 'w' output 'z': found nothing that makes it, expected one of y"):
        plan("w", [node("a", "x", "y")], REQUEST, outputs=["z"])


def test_a_conditional_node_needs_outputs_that_go_by_rows():
    fixed = Node("b", Step("", "y", Port("FP32", (2,))), (Dependency("a"),), when="a.is")
    with pytest.raises(BadConfig, match="node 'b' when: found output 'y', which does not go by rows"):
        plan("w", [Node("a", Step("", "is", IS)), fixed], REQUEST)
