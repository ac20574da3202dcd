"""What runs before the first caller comes: recorded requests, made-up ones, and what is decided by them."""

import asyncio
import contextlib
import textwrap
from concurrent.futures import ThreadPoolExecutor

import dense_programs
import numpy as np
import pytest
import torch
from torch.export import Dim

from cube.errors import BadData
from cube.rpc.calls import Call
from predictor import models
from predictor.assembly import Assembly
from predictor.batching import Limits
from predictor.config import load
from predictor.engines.warm_up import save
from predictor.tensors import Texts, decode, encode, texts

SHARED = models.Settings(cube=None, max_samples=1_000, max_keys=1_000, cube_timeout_s=1, cube_wait_s=1)
SERVICE = 'services { name: "S" workflows: "main" }'
OPS = """
    import time
    from predictor.ops.op import Op, Port

    class SlowAtFirst(Op):
        inputs = {"x": Port("FP32", (-1, 4))}
        outputs = {"x": Port("FP32", (-1, 4))}
        runs = 0

        def run(self, batch):
            self.runs += 1
            time.sleep(0.2 if self.runs == 1 else 0)
            return dict(batch)

    class ByWord(Op):
        inputs = {"word": Port("BYTES")}
        outputs = {"size": Port("FP32", (-1,))}
        seen = []

        def run(self, batch):
            words = batch["word"]
            self.seen.append(words.sizes.tolist())
            if not words.sizes.all():
                raise ValueError("an empty word")
            return {"size": words.sizes.astype("float32")}

    def root(x):
        return x**0.5

    class OfTheBatch(Op):
        inputs = {"pixels": Port("FP32", (-1, 3, 8, 8))}
        outputs = {"y": Port("FP32", (-1,))}

        def run(self, batch):
            return {"y": batch["pixels"].mean(axis=(1, 2, 3)) - batch["pixels"].mean()}
"""
NET = 'nodes { name: "net" type: "infer" }'


class Doubled(torch.nn.Module):
    """The net of dense_programs, so that its ONNX form answers the same, or nearly."""

    def __init__(self, by):
        super().__init__()
        self.net, self.by = dense_programs.torch_net(), by

    def forward(self, x, ids):
        made = self.net(x, ids)
        return {"score": made["score"] * self.by, "best": made["best"]}


@pytest.fixture
def conf(tmp_path):
    """conf(nodes, toolkit) → a directory of configuration."""

    def write(nodes=NET, toolkit="", service=SERVICE):
        (tmp_path / "service.prototxt").write_text(service)
        (tmp_path / "workflow.prototxt").write_text(f'workflows {{ name: "main" {nodes} }}')
        (tmp_path / "model_toolkit.prototxt").write_text(toolkit)
        (tmp_path / "warming_ops.py").write_text(textwrap.dedent(OPS))
        return tmp_path

    return write


@contextlib.asynccontextmanager
async def built(directory):
    """The service of a configuration, warm, and its models."""
    with ThreadPoolExecutor(2) as threads:
        async with contextlib.AsyncExitStack() as stack:
            assembly = Assembly(load(directory), SHARED, threads, Limits(max_in_flight=2))
            await assembly.load(stack)
            (service,) = assembly.services(stack)
            await assembly.warm_up(service)
            yield service


async def asked(service, inputs):
    made = service.infer(inputs, (), Call("test"), then=lambda answer: answer.outputs)
    return await made if asyncio.isfuture(made) or asyncio.iscoroutine(made) else made


def seen_by(directory, look):
    async def main():
        async with built(directory) as service:
            return look(service)

    return asyncio.run(main())


def net(directory, onnx=True, by=1.0):
    directory.mkdir()
    dense_programs.write_torch(directory / "net.pt2", Doubled(by))
    if onnx:
        dense_programs.write_onnx(directory / "net.onnx")
    return directory


def requests(*sizes):
    return [dict(zip(("x", "ids"), dense_programs.feeds(size, size), strict=True)) for size in sizes]


# ---- recorded requests ----


def test_real_requests_are_recorded_and_run_before_the_first_caller_comes(conf, tmp_path):
    """From the bytes of requests on the wire to a file, and from it through the whole workflow."""
    sent = [{"word": encode(texts([b"ab", b"c"]))}, {"word": encode(texts([b"def"]))}]
    received = [
        {"word": decode("BYTES", [count], one["word"], "word")} for one, count in zip(sent, (2, 1), strict=True)
    ]
    save(tmp_path / "words.npz", received)
    nodes = """
        nodes { name: "a" type: "warming_ops:ByWord" }
        nodes { name: "root" type: "infer" dependencies { name: "a" } inputs { name: "x" from: "a.size" } }
    """
    toolkit = """
        engines {
          name: "n" callable: "warming_ops:root" warm_up_file: "words.npz"
          inputs { name: "x" datatype: "FP32" shape: -1 } outputs { name: "y" datatype: "FP32" shape: -1 }
        }
    """
    place = conf(nodes, toolkit)
    seen = seen_by(place, lambda service: list(service.lanes[0].plan.steps[0].node.op.seen))
    assert seen[:2] == [[2, 1], [3]]
    assert [2, 1, 3] in seen  # in company, to see whether rows mix


@pytest.mark.parametrize("named", [True, False])
def test_engines_are_timed_on_what_was_recorded_and_the_log_says_it(conf, tmp_path, caplog, named):
    caplog.set_level("INFO")
    net(tmp_path / "net")
    save(tmp_path / "some.npz" if named else tmp_path / "net/warm_up.npz", requests(3, 40))
    said = 'warm_up_file: "some.npz"' if named else ""
    place = conf(toolkit=f'engines {{ name: "n" model_dir: "net" {said} }}')
    platform = seen_by(place, lambda service: service.platform)
    (line,) = (r.getMessage() for r in caplog.records if " chosen, " in r.getMessage())
    assert "by runs of 3, 40, 3, 1, 1, 1 rows: torch " in line  # and those that tell whether rows mix
    assert "; onnxruntime " in line
    assert platform == ("onnxruntime_onnx" if line.startswith("engine onnxruntime") else "torch_export")


def test_without_any_configuration_a_recording_in_the_models_directory_will_do(tmp_path, command):
    save(net(tmp_path / "net") / "warm_up.npz", requests(5))
    done = command("predictor-server", "--model", tmp_path / "net", "--check")
    assert done.returncode == 0, done.stderr
    assert " chosen, by runs of 5, 3, 1, 1, 1 rows: torch " in done.stderr
    save(tmp_path / "net/warm_up.npz", [{"x": np.ones((3, 4), np.float32)}])
    done = command("predictor-server", "--model", tmp_path / "net", "--check")
    assert done.returncode == 1
    assert "warm_up.npz: found input 'ids': found nothing" in done.stderr.splitlines()[-1]


def test_an_engine_that_answers_recorded_requests_otherwise_is_not_used(conf, tmp_path, caplog):
    net(tmp_path / "net", by=1.5)
    save(tmp_path / "net/warm_up.npz", requests(3))
    place = conf(toolkit='engines { name: "n" model_dir: "net" }')
    assert seen_by(place, lambda service: service.platform) == "torch_export"
    assert "engine onnxruntime is not used: output 'score' of request 0 differs by" in caplog.text


def test_a_program_of_two_formats_is_timed_without_a_recording_too(conf, tmp_path, caplog):
    caplog.set_level("INFO")
    net(tmp_path / "net")
    place = conf(toolkit='engines { name: "n" model_dir: "net" }')

    async def main():
        async with built(place) as service:
            (request,) = requests(7)
            return await asked(service, request), dense_programs.by_numpy(request["x"], request["ids"])

    outputs, wanted = asyncio.run(main())
    np.testing.assert_allclose(outputs["score"], wanted[0], rtol=1e-5)
    assert "chosen, by runs of 1, 8, 64 rows: torch " in caplog.text


@pytest.mark.parametrize(("engine", "platform"), [("TORCH", "torch_export"), ("ONNXRUNTIME", "onnxruntime_onnx")])
def test_of_two_formats_one_may_be_insisted_on(conf, tmp_path, engine, platform):
    net(tmp_path / "net")
    place = conf(toolkit=f'engines {{ name: "n" model_dir: "net" engine: "{engine}" }}')
    assert seen_by(place, lambda service: service.platform) == platform


def test_a_recording_that_the_service_refuses_is_told_with_its_file(conf, tmp_path):
    net(tmp_path / "net", onnx=False)
    save(tmp_path / "net/warm_up.npz", [{**requests(3)[0], "ids": np.full(3, 99)}])
    place = conf(toolkit='engines { name: "n" model_dir: "net" }')
    with pytest.raises(BadData, match=r"warm_up.npz: found .*index out of range.*expected requests that S answers"):
        seen_by(place, lambda service: None)


def test_what_is_saved_is_what_is_read(tmp_path):
    from predictor.engines.warm_up import recorded
    from trainer_tools.manifest import Tensor

    known = [Tensor("x", "FP32", [-1, 2]), Tensor("t", "BYTES", [-1, 2])]
    given = [{"x": np.ones((n, 2), np.float32), "t": texts([b"", b"abc"] * n, (n, 2))} for n in (1, 3)]
    save(tmp_path / "r.npz", given)
    for one, other in zip(given, recorded(tmp_path / "r.npz", known), strict=True):
        assert np.array_equal(one["x"], other["x"])
        assert isinstance(other["t"], Texts)
        assert bytes(encode(one["t"])) == bytes(encode(other["t"]))
    with pytest.raises(BadData, match=r"'t/0'.*: found a text with a zero at its end"):
        save(tmp_path / "r.npz", [{"t": texts([b"a\0"])}])


def test_recorded_requests_of_a_service_with_a_key_go_where_it_says(conf, tmp_path):
    for by in (1, 2):
        net(tmp_path / f"net{by}", onnx=False, by=by)
    asked_for = [{**one, "variant": texts([b"b"] * len(one["ids"]))} for one in requests(3, 4)]
    save(tmp_path / "r.npz", asked_for)
    service = """
        services {
          name: "S" enable_map_request_to_workflow: true request_field_key: "variant"
          value_mapped_workflows { request_field_value: "a" workflow: "main" }
          value_mapped_workflows { request_field_value: "b" workflow: "other" }
        }
    """
    node = 'nodes {{ name: "net" type: "infer" config {{ key: "model" text: "{}" }} }}'
    nodes = node.format("one") + ' } workflows { name: "other" ' + node.format("two")
    toolkit = """
        engines { name: "one" model_dir: "net1" }
        engines { name: "two" model_dir: "net2" warm_up_file: "r.npz" }
    """
    place = conf(nodes, toolkit, service)
    runs = seen_by(place, lambda service: [lane.batcher.counters.requests for lane in service.lanes])
    assert runs == [1, 2]  # the other one, of which nothing was recorded, was tried with made-up rows


# ---- made-up requests ----


def test_the_first_run_may_take_longer_than_a_nodes_deadline(conf):
    place = conf('nodes { name: "a" type: "warming_ops:SlowAtFirst" deadline_ms: 50 }')

    async def main():
        async with built(place) as service:
            assert service.lanes[0].plan.steps[0].node.op.runs > 0
            return await asked(service, {"x": np.ones((1, 4), np.float32)})

    assert asyncio.run(main())["x"].shape == (1, 4)


@pytest.mark.parametrize("extra", ["", "concurrency: 1 executor: PROCESS"])
def test_images_are_made_up_and_tell_whether_rows_mix(conf, caplog, extra):
    pytest.importorskip("PIL")
    size = 'config { key: "height" integer: 8 } config { key: "width" integer: 8 }'
    image = f'nodes {{ name: "image" type: "image" {size} {extra} }}'
    place = conf(image)
    assert seen_by(place, lambda service: service.lanes[0].batcher.limits.is_on)
    assert "warm-up failed" not in caplog.text
    mixing = 'nodes { name: "mix" type: "warming_ops:OfTheBatch" dependencies { name: "image" } }'
    assert not seen_by(conf(image + mixing), lambda service: service.lanes[0].batcher.limits.is_on)
    assert "requests are not merged into batches: output 'y' of a row depends on the rows beside it" in caplog.text


# ---- weights ----


def test_engines_of_one_model_share_its_weights(conf, tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(50_000_000))  # 200 MB

        def forward(self, x):
            return {"y": x[:, :1] + self.table[0]}

    (tmp_path / "wide").mkdir()
    program = torch.export.export(Wide(), (torch.zeros(3, 4),), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, tmp_path / "wide/net.pt2")
    del program
    engines = "".join(
        f'engines {{ name: "{name}" model_dir: "wide" {more} }}'
        for name, more in (("a", ""), ("b", 'nan_policy: "fail"'), ("c", "runtime_thread_num: 2"))
    )
    nodes = "".join(
        f'nodes {{ name: "{name}" type: "infer" config {{ key: "model" text: "{name}" }} }}'
        f'nodes {{ name: "{name}y" type: "select" config {{ key: "names" text: "{name}=y" list: true }}'
        f' dependencies {{ name: "{name}" }} }}' for name in "abc"
    )  # fmt: skip
    place = conf(nodes, engines)

    async def main():
        before = resident_bytes()
        async with built(place) as service:
            made = await asked(service, {"x": np.zeros((2, 4), np.float32)})
            return made, resident_bytes() - before

    made, grown = asyncio.run(main())
    assert {name: value.tolist() for name, value in made.items()} == {key: [[1], [1]] for key in "abc"}
    assert grown < 300 << 20


def resident_bytes():
    import gc
    import mmap
    from pathlib import Path

    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
