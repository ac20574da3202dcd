"""A request's way through one workflow or several: what it gets back, and that company does not change it."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from one_shard import OneShard

from cube.client import Answer as Looked
from cube.client import Rows
from cube.errors import BadConfig, BadRequest, Internal, NotServed
from cube.rpc.calls import Call
from cube.version import Version
from predictor.apart import Gathered
from predictor.batching import Limits
from predictor.executor import Executor
from predictor.ops.gather import Gather
from predictor.ops.op import Op, Port
from predictor.ops.pool import Pool
from predictor.requests import Form
from predictor.service import InferenceService, Lane, Service
from predictor.workflow import Dependency, Node, plan
from trainer_tools.manifest import Lookup, Slot

X = Port("FP32", (-1, 2))
THREADS = ThreadPoolExecutor(2, "test-compute")
CALL = Call("/test")


class Apply(Op):
    """One output of one input."""

    def __init__(self, function, makes="y", out=X):
        self.inputs, self.outputs, self.function = {"x": X}, {makes: out}, function

    def run(self, batch):
        return {name: self.function(batch["x"]) for name in self.outputs}


class Slow(Apply):
    async def run(self, batch):
        await asyncio.sleep(0.1)
        return super().run(batch)


def service_of(*ops, limits=Limits(), **more):  # noqa: B008 - immutable
    """A workflow for each op."""
    form = Form({"x": X}, [], max_samples=100, max_keys=0, finite=False)
    lanes = [
        Lane(Executor(plan(f"w{number}", [Node("a", op)], form.ports), THREADS), limits)
        for number, op in enumerate(ops)
    ]
    return Service("s", "1", "test", form, lanes, **more)


def infer(service, wanted=(), **inputs):
    async def main():
        answer = service.infer(inputs, wanted, CALL, then=lambda answer: answer)
        return await answer if isinstance(answer, Awaitable) else answer

    return asyncio.run(main())


def rows(count):
    return np.arange(2 * count, dtype=np.float32).reshape(count, 2)


def test_the_replies_of_workflows_are_put_together():
    service = service_of(Apply(lambda x: 2 * x, "a"), Slow(lambda x: 3 * x, "b"))
    answer = infer(service, x=rows(3))
    assert {name: value.tolist() for name, value in answer.outputs.items()} == {
        "a": (2 * rows(3)).tolist(), "b": (3 * rows(3)).tolist()
    }  # fmt: skip
    assert list(infer(service, ["b"], x=rows(1)).outputs) == ["b"]


@pytest.mark.parametrize(("at_once", "least", "most"), [(False, 0.3, 9), (True, 0.1, 0.29)])
def test_workflows_run_one_after_the_other_or_at_once(at_once, least, most):
    service = service_of(*(Slow(lambda x: x, name) for name in "abc"), at_once=at_once)

    async def main():
        begin = asyncio.get_running_loop().time()
        await service.infer({"x": rows(1)}, (), CALL, then=lambda answer: answer)
        return asyncio.get_running_loop().time() - begin

    assert least <= asyncio.run(main()) < most


def test_one_workflow_that_fails_ends_the_others():
    class Fail(Apply):
        async def run(self, batch):
            raise BadRequest("x", 1, 2)

    service = service_of(Slow(lambda x: x, "a"), Fail(None, "b"), at_once=True)
    with pytest.raises(BadRequest, match="x: found 1, expected 2"):
        infer(service, x=rows(1))
    assert service.lanes[0].batcher.counters.in_flight == 0


def test_two_workflows_that_make_one_output_are_refused():
    with pytest.raises(BadConfig, match="service 's' workflow 'w1' output 'y': found another workflow makes it too"):
        service_of(Apply(lambda x: x), Apply(lambda x: x))


def test_an_output_that_is_not_made_is_refused():
    with pytest.raises(BadRequest, match="output 'z': found a name the model does not make, expected one of y"):
        infer(service_of(Apply(lambda x: x)), ["z"], x=rows(1))


def test_requests_are_merged_and_each_gets_its_own():
    sizes = []

    def look(x):
        sizes.append(len(x))
        return x + 1

    service = service_of(Apply(look))

    async def main():
        made = [service.infer({"x": rows(n)}, (), CALL, then=lambda answer: answer) for n in (1, 2, 3, 4)]
        return [await one if isinstance(one, Awaitable) else one for one in made]

    answers = asyncio.run(main())
    for n, answer in zip((1, 2, 3, 4), answers, strict=True):
        np.testing.assert_array_equal(answer.outputs["y"], rows(n) + 1)
    assert sizes in ([1, 9], [10])  # the first one, whose time is not known yet, may have been in a thread


LOOKUP = Lookup(keys="k", text="t", lengths="n", slots=[Slot("A", 1)], table="emb", pooling="sum", feed="f")


class Odd(OneShard):
    """Has the odd keys only."""

    def answer(self, asks):
        return Looked(
            [Rows(np.ones((keys.size, 2), np.float32), keys % 2 == 1, version) for _, keys, version in asks], {}
        )


@pytest.mark.parametrize("is_here", [False, True])
@pytest.mark.parametrize("max_rows", [2, 100])
@pytest.mark.parametrize("is_apart", [False, True])
def test_everybody_is_told_of_their_own_keys(is_here, max_rows, is_apart):
    gather = Gather([LOOKUP], {"emb": (Version(7), 2)}, Odd(is_here), 1.0)
    form = Form({}, [LOOKUP], max_samples=100, max_keys=1000, finite=True)
    nodes = [
        Node("gather", Gathered(gather, Limits()) if is_apart else gather, is_apart=is_apart),
        Node("pool", Pool([LOOKUP], {"emb": 2}), (Dependency("gather"),)),
    ]
    lane = Lane(Executor(plan("w", nodes, form.ports), THREADS), Limits(max_rows=max_rows))
    service = Service("s", "7", "test", form, [lane], tables={"emb": "7@0"})

    def request(*bags):
        keys = np.array([key for bag in bags for key in bag], np.uint64)
        return {"k": keys, "n": np.array([[len(bag)] for bag in bags], np.int32)}

    asked = [[[1, 2], [4]], [[2, 4, 6]], [[], [1], [3, 5]], [[]]]

    async def main():
        made = [service.infer(request(*bags), (), CALL, then=lambda answer: answer) for bags in asked]
        return [await one if isinstance(one, Awaitable) else one for one in made]

    for bags, answer in zip(asked, asyncio.run(main()), strict=True):
        flat = [key for bag in bags for key in bag]
        assert answer.facts == {
            "keys": len(flat), "keys_absent": sum(key % 2 == 0 for key in flat), "table.emb": "7@0"
        }  # fmt: skip
        assert answer.outputs["f"][:, 0].tolist() == [len(bag) for bag in bags]


# ---- company ----


@pytest.mark.parametrize(
    ("function", "is_merged"),
    [
        (lambda x: x * 2, True),
        (lambda x: x - x.mean(axis=0), False),  # as a batch norm that was left in training does
        (lambda x: np.exp(x) / np.exp(x).sum(axis=0), False),  # a softmax along the wrong axis
        (lambda x: np.flip(x, axis=0).copy(), False),
        (lambda x: np.float32(3e-5) * x / (1 + x.sum()), False),  # as small as click-through rates
    ],
)
def test_a_net_whose_rows_look_at_each_other_is_not_merged(function, is_merged, caplog):
    service = service_of(Apply(function))
    asyncio.run(service.try_company())
    assert service.lanes[0].batcher.limits.is_on is is_merged
    assert ("depends on the rows beside it" in caplog.text) is not is_merged


@pytest.mark.parametrize(
    ("function", "is_merged"),
    [
        (lambda x: x[:, 0].argsort(), False),  # an order of samples, in somebody else's request
        (lambda x: x[:, 0].argsort().argsort(), False),
        (lambda x: x.argmax(axis=1), True),
        (lambda x: (x > 0.5).sum(axis=1), True),
        (lambda x: (x[:, 0] + np.roll(x[:, 0], 1) > 1.7).astype(np.int64), False),  # tags, which are mostly 0
    ],
)
def test_whole_numbers_that_depend_on_other_rows_are_not_merged(function, is_merged):
    class Ranks(Op):
        inputs, outputs = {"x": X}, {"y": Port("INT64")}

        def run(self, batch):
            return {"y": function(batch["x"])}

    service = service_of(Ranks())
    asyncio.run(service.try_company())
    assert service.lanes[0].batcher.limits.is_on is is_merged


@pytest.mark.parametrize("most", [1, 1_000, 1 << 40])
@pytest.mark.parametrize(("mixes", "is_merged"), [(True, False), (False, True)])
def test_rows_of_integers_that_mix_are_found_within_what_an_op_takes(most, mixes, is_merged):
    class Shares(Op):
        inputs, outputs = {"ids": Port("INT64"), "word": Port("BYTES")}, {"y": Port("FP32")}

        def run(self, batch):
            if (batch["ids"] > most).any():
                raise BadRequest("ids", batch["ids"].max(), f"at most {most}")
            return {"y": (batch["ids"] - (batch["ids"].mean() if mixes else 0)).astype(np.float32)}

    form = Form({"ids": Port("INT64"), "word": Port("BYTES")}, [], max_samples=9, max_keys=0, finite=False)
    lane = Lane(Executor(plan("w", [Node("a", Shares())], form.ports), THREADS), Limits())
    service = Service("s", "1", "test", form, [lane])
    asyncio.run(service.try_company())
    assert lane.batcher.limits.is_on is is_merged


class Panic(BaseException):
    """As the Rust code of some packages raises it."""


@pytest.mark.parametrize("kind", [Apply, Slow])
@pytest.mark.parametrize("error", [Panic("!"), asyncio.CancelledError(), SystemExit(1)])
def test_whoever_makes_an_op_panic_fails_alone(kind, error):
    def fail(x):
        if (x == 13).any():
            raise error
        return x

    service = service_of(kind(fail))

    async def one(number):
        made = service.infer({"x": np.full((1, 2), number, np.float32)}, (), CALL, then=lambda answer: answer)
        return await made if isinstance(made, Awaitable) else made

    async def main():
        tasks = [asyncio.ensure_future(one(number)) for number in (1, 13, 2)]
        await asyncio.wait(tasks, timeout=60)
        return tasks

    first, second, third = asyncio.run(main())
    assert isinstance(second.exception(), Internal)
    assert [task.result().outputs["y"][0, 0] for task in (first, third)] == [1, 2]


@pytest.mark.parametrize(("mixes", "is_merged"), [(True, False), (False, True)])
def test_rows_that_mix_are_found_where_no_made_up_key_is_in_a_table(mixes, is_merged):
    class Empty(OneShard):
        def answer(self, asks):
            return Looked([Rows(np.zeros((a.keys.size, 2), np.float32), a.keys < 0, a.version) for a in asks], {})

    form = Form({}, [LOOKUP], max_samples=100, max_keys=1000, finite=True)
    net = Apply(lambda x: x - x.mean(axis=0) if mixes else 2 * x)
    net.inputs = {"x": Port("FP32", (-1, 2))}
    nodes = [
        Node("gather", Gather([LOOKUP], {"emb": (Version(7), 2)}, Empty(True), 1.0, "fail")),
        Node("pool", Pool([LOOKUP], {"emb": 2}), (Dependency("gather"),)),
        Node("net", net, (Dependency("pool"),), {"x": "pool.f"}),
    ]
    lane = Lane(Executor(plan("w", nodes, form.ports), THREADS), Limits())
    request = form.sample(3)
    service = Service("s", "7", "test", form, [lane], tables={"emb": "7@0"})

    async def main():
        with nodes[0].op.with_made_up_rows():
            await lane.check_company(request)

    asyncio.run(main())
    assert service.lanes[0].batcher.limits.is_on is is_merged


def test_values_that_do_not_go_by_rows_are_not_merged(caplog):
    form = Form({"x": X, "scale": Port("FP32", (1,))}, [], max_samples=9, max_keys=0, finite=False)
    lane = Lane(Executor(plan("w", [Node("a", Apply(lambda x: x))], form.ports), THREADS), Limits())
    assert not lane.batcher.limits.is_on
    assert "its values do not all go by rows" in caplog.text


# ---- the rest ----


def test_debug_shows_every_node():
    form = Form({"x": X}, [], max_samples=9, max_keys=0, finite=False)

    class Last(Op):
        inputs, outputs = {"y": X}, {"z": X}

        def run(self, batch):
            return {"z": batch["y"] + 1}

    nodes = [Node("a", Apply(lambda x: 2 * x)), Node("b", Last(), (Dependency("a"),))]
    service = Service("s", "1", "test", form, [Lane(Executor(plan("w", nodes, form.ports), THREADS), Limits())])
    told = asyncio.run(service.debug({"x": rows(2)}, CALL))["w"]
    np.testing.assert_array_equal(told["a"]["outputs"]["y"], 2 * rows(2))
    np.testing.assert_array_equal(told["b"]["outputs"]["z"], 2 * rows(2) + 1)
    assert told["b"]["began_us"] >= told["a"]["began_us"] >= 0
    assert told["a"]["took_us"] > 0


def test_services_are_found_by_name_and_version():
    services = InferenceService([service_of(Apply(lambda x: x))])
    assert services.service("s").name == services.service("s", "1").name == "s"
    with pytest.raises(NotServed, match="model 'other': not served here, which serves s"):
        services.service("other")
    with pytest.raises(NotServed, match="model 's' version '2'"):
        services.service("s", "2")
