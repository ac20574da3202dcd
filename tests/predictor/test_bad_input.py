"""One predictor-server, everything a caller, an op or a net can do wrong, and after each a good answer."""

import math
import textwrap
from concurrent.futures import ThreadPoolExecutor

import dense_programs
import httpx
import pytest
import torch
from torch.export import Dim

from trainer_tools.demo import started

OPS = """
    import time
    import numpy as np
    from predictor.ops.op import Op, Port, Ragged

    X = Port("FP32", (-1, 2))

    class Wrong(Op):
        "What it makes, by the first number."
        inputs = {"x": X}
        outputs = {"y": X, "bags": Port("INT64", (-1,), ragged=True)}

        def run(self, batch):
            x = batch["x"]
            ones = np.ones(len(x), np.int64)
            bags = Ragged(ones, np.arange(len(x) + 1))
            made = {"y": x, "bags": bags}
            do = int(x[0, 0])
            if do == 1:
                raise ZeroDivisionError("the secret")
            changed = [
                {}, {}, {"y": x.astype(np.float64)}, {"y": x[:, :1]}, {"y": x[:0]}, {"y": x.tolist()},
                {"bags": Ragged(ones, np.arange(len(x) + 1)[::-1].copy())},
                {"bags": Ragged(ones, np.arange(len(x) + 1) * 2)},
                {"bags": ones},
                {"z": x},
            ]
            return [made] if do == 10 else made | changed[do]

    class Slow(Op):
        inputs = outputs = {"x": X}

        def run(self, batch):
            time.sleep(1)
            return dict(batch)
"""
WORKFLOW = 'workflows {{ name: "{0}" nodes {{ name: "n" type: {1} }} {2} }}\n'
SERVICE = 'services {{ name: "{0}" workflows: "{0}" }}\n'
WORKFLOWS = {
    "wrong": ('"bad_input_ops:Wrong"', ""),
    "slow": ('"bad_input_ops:Slow"', "batch { max_rows: 1 max_waiting_rows: 1 max_in_flight: 1 }"),
    "ragged": ('"echo"', 'inputs { name: "ids" datatype: "INT64" ragged: true }'),
    "greedy": ('"infer" config { key: "model" text: "greedy" }', ""),
    **{p: (f'"infer" config {{ key: "model" text: "{p}" }}', "") for p in ("pass", "replace", "fail")},
}


class Log(torch.nn.Module):
    """No number for 0 and below."""

    def forward(self, x):
        return {"y": torch.log(x)}


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    for name in ("log", "greedy"):
        (root / name).mkdir()
    program = torch.export.export(Log(), (torch.ones(3, 2),), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, root / "log/net.pt2")
    dense_programs.write_torch(root / "greedy/net.pt2", dense_programs.greedy_torch_net())
    engines = 'engines { name: "greedy" model_dir: "greedy" }\n'
    for policy in ("pass", "replace", "fail"):
        engines += f'engines {{ name: "{policy}" model_dir: "log" nan_policy: "{policy}" }}\n'
    (root / "model_toolkit.prototxt").write_text(engines)
    (root / "workflow.prototxt").write_text("".join(WORKFLOW.format(n, *said) for n, said in WORKFLOWS.items()))
    (root / "service.prototxt").write_text("".join(map(SERVICE.format, WORKFLOWS)))
    (root / "bad_input_ops.py").write_text(textwrap.dedent(OPS))
    with (
        started("predictor-server", "--conf", root, "--max-samples", 100) as address,
        httpx.Client(base_url=f"http://{address}", timeout=60) as client,
    ):
        yield client


def tensor(name, shape, data, datatype="FP32"):
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def x(*numbers):
    return [tensor("x", [len(numbers), 2], [n for number in numbers for n in (number, 1)])]


def ids(values, lengths, datatype="INT64"):
    return [tensor("ids", [len(values)], values, datatype), tensor("ids.lengths", [len(lengths)], lengths, "INT32")]


def asked(http, service, inputs, **more):
    return http.post(f"/v2/models/{service}/infer", json={"inputs": inputs, **more})


GOOD = {
    "wrong": x(0, 3), "slow": x(1), "ragged": ids([5, 6, 7], [2, 0, 1]), "pass": x(1), "replace": x(1), "fail": x(1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("service", "inputs", "status", "message"),
    [
        ("pass", [], 400, "input 'x': found nothing, expected FP32 [-1, 2]"),
        ("pass", [*x(1), tensor("z", [1], [1])], 400, "input 'z': found a name the model does not take"),
        ("pass", [tensor("x", [1, 2], [1, 2], "INT64")], 400, "input 'x' datatype: found INT64, expected FP32"),
        ("pass", [tensor("x", [1, 2], [1, 2], "FP33")], 400, "'FP33'"),
        ("pass", [tensor("x", [1, 2], ["a", "b"])], 400, "input 'x'"),
        ("pass", [tensor("x", [2, 1], [1, 2])], 400, "input 'x' shape: found [2, 1], expected [-1, 2]"),
        ("pass", [tensor("x", [2], [1, 2])], 400, "input 'x' shape: found [2]"),
        ("pass", [tensor("x", [2, 2], [1, 2])], 400, "input 'x'"),
        ("pass", [tensor("x", [-1, 2], [1, 2])], 400, "input 'x' shape"),
        ("pass", [*x(1), *x(1)], 400, "input 'x': found the name twice, expected once"),
        ("pass", [tensor("x", [0, 2], [])], 400, "request: found 0 samples, expected 1 to 100"),
        ("pass", x(*range(1, 102)), 400, "request: found 101 samples, expected 1 to 100"),
        ("ragged", ids([], []), 400, "request: found 0 samples"),
        ("ragged", ids([1, 2, 3], [4, -1]), 400, "input 'ids.lengths': found a length of -1, expected 0 or more"),
        ("ragged", ids([1, 2, 3], [2, 2]), 400, "input 'ids' shape: found [3], expected [4]: the sum of 'ids.lengths'"),
        ("ragged", ids([1, 2, 3], [1, 1]), 400, "found [3], expected [2]: the sum of 'ids.lengths'"),
        ("ragged", ids([1, 2, 3], [2**31 - 1, 2**31 - 1]), 400, "found [3], expected [4294967294]"),
        ("ragged", ids([1, 2, 3], [3])[:1], 400, "input 'ids.lengths': found nothing"),
        ("wrong", x(1), 500, "workflow 'wrong' node 'n': failed; the server's log has it"),
        ("wrong", x(2), 500, "node 'n' output 'y': found dtype float64, expected FP32 [-1, 2]"),
        ("wrong", x(3), 500, "node 'n' output 'y': found shape [1, 1], not 2 in dimension 1"),
        ("wrong", x(4), 500, "node 'n' output 'y': found shape [0, 2], not 1 in dimension 0"),
        ("wrong", x(5), 500, "node 'n' output 'y': found a list, not an array"),
        ("wrong", x(6), 500, "node 'n' output 'bags': found offsets that do not rise from 0 to 1"),
        ("wrong", x(7), 500, "node 'n' output 'bags': found offsets that do not rise from 0 to 1"),
        ("wrong", x(8), 500, "node 'n' output 'bags': found ndarray, not a Ragged"),
        ("wrong", x(9), 500, "node 'n' outputs: found y, bags, z, expected y, bags"),
        ("wrong", x(10), 500, "node 'n' outputs: found a list, expected y, bags"),
        ("greedy", [tensor("x", [1, 4], [0] * 4), tensor("ids", [1], [0], "INT64")], 429, "not enough memory"),
        ("fail", x(1, 0), 500, "output 'y'[1, 0]: found -inf, expected a number"),
    ],
)
def test_it_is_refused_with_what_is_wrong_and_the_next_request_is_answered(http, service, inputs, status, message):
    said = asked(http, service, inputs)
    assert (said.status_code, message in said.json()["error"]) == (status, True), said.text
    assert "secret" not in said.text
    for each in {service, "wrong"} & GOOD.keys():
        assert asked(http, each, GOOD[each]).status_code == 200


@pytest.mark.parametrize(("policy", "made"), [("pass", [None, None]), ("replace", [0.0, 0.0])])
def test_what_becomes_of_outputs_that_are_no_numbers_is_the_engines_policy(http, policy, made):
    (output,) = asked(http, policy, x(math.e, 0, -1)).json()["outputs"]
    assert output["data"][0] == pytest.approx(1)
    assert output["data"][2::2] == made  # JSON has no NaN: it is null there


def test_a_full_queue_refuses_and_a_deadline_that_passes_is_told(http):
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: asked(http, "slow", x(1)).status_code, range(8)))
    assert set(answers) == {200, 429}
    late = asked(http, "slow", x(1), parameters={"timeout": 20_000})
    assert late.status_code == 504
    assert asked(http, "slow", x(1), parameters={"timeout": 1}).status_code == 504
    assert asked(http, "wrong", GOOD["wrong"]).status_code == 200
