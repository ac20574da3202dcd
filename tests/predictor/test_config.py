"""Configuration of services and workflows: the manuals' samples as they stand, every mistake, what is built of it."""

import asyncio
import contextlib
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch.export import Dim

from cube.errors import BadConfig, BadRequest, ServingError
from cube.rpc.calls import Call
from predictor import models
from predictor.assembly import Assembly, limits_of, outlined
from predictor.batching import Limits
from predictor.config import load
from predictor.config_files import read
from predictor.pb import serving_config_pb2 as pb
from predictor.tensors import texts
from trainer_tools import criteo, train_ctr

SEEDS = Path(__file__).parent.parent / "golden" / "seeds"
SHARED = models.Settings(cube=None, max_samples=1_000, max_keys=100_000, cube_timeout_s=1, cube_wait_s=1)


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = torch.nn.Linear(4, 2)

    def forward(self, x):
        return {"y": torch.softmax(self.net(x), 1)}


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """A directory with one exported program and nothing else."""
    directory = tmp_path_factory.mktemp("models") / "mlp"
    directory.mkdir()
    program = torch.export.export(Mlp(), (torch.zeros(3, 4),), dynamic_shapes=({0: Dim("rows", min=1)},))
    torch.export.save(program, directory / "model.pt2")
    return directory


FILES = {
    "service.prototxt": 'services { name: "Score" workflows: "main" }',
    "workflow.prototxt": """
        workflows {
          name: "main"
          workflow_type: "Sequence"
          nodes { name: "reader" type: "ReaderOp" }
          nodes { name: "score" type: "ClassifyOp" dependencies { name: "reader" mode: "RO" } }
        }
    """,
    "resource.prototxt": 'model_toolkit_path: "."\nmodel_toolkit_file: "model_toolkit.prototxt"',
    "model_toolkit.prototxt": 'engines { name: "net" type: "FLUID_CPU_NATIVE_DIR" model_data_path: "mlp" }',
}
TRIPLE = """
    from predictor.ops.op import Op, Port

    class Triple(Op):
        inputs = {"x": Port("FP32", (-1, 4))}
        outputs = {"x": Port("FP32", (-1, 4))}

        def __init__(self, by: float = 3.0):
            self.by = by

        def run(self, batch):
            return {"x": batch["x"] * self.by}
"""


@pytest.fixture
def conf(tmp_path, mlp):
    """conf({"service.prototxt": text, ...}) → a directory with these files, and FILES for the others; None: no file."""

    def write(files=None):
        for name, text in {**FILES, "triple_op.py": TRIPLE, **(files or {})}.items():
            if text is not None:
                (tmp_path / name).write_text(textwrap.dedent(text))
        if not (tmp_path / "mlp").exists():
            (tmp_path / "mlp").symlink_to(mlp)
        return tmp_path

    return write


@contextlib.asynccontextmanager
async def built(said):
    """The services of a configuration, by name."""
    with ThreadPoolExecutor(2) as threads:
        async with contextlib.AsyncExitStack() as stack:
            assembly = Assembly(said, SHARED, threads, Limits(max_in_flight=2))
            await assembly.load(stack)
            services = assembly.services(stack)
            for service in services:
                await assembly.warm_up(service)
            yield {service.name: service for service in services}


def answers(directory, *requests, name="Score"):
    """Outputs of a service for each request, all at once."""

    async def run():
        async with built(load(directory)) as services:
            asked = [
                services[name].infer(request, (), Call("test"), then=lambda answer: answer) for request in requests
            ]
            return [(answer if isinstance(answer, tuple) else await answer).outputs for answer in asked]

    return asyncio.run(run())


def direct(x):
    with torch.inference_mode():
        return Mlp()(torch.from_numpy(x))["y"].numpy()


X = np.random.default_rng(1).standard_normal((5, 4), np.float32)


# ---- what the manuals print ----


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*/*.prototxt")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_sample_of_the_manuals_is_read_as_it_stands(path):
    kinds = {
        "service": pb.InferServiceConf, "service_two": pb.InferServiceConf, "workflow": pb.WorkflowConf,
        "resource": pb.ResourceConf, "model_toolkit": pb.ModelToolkitConf,
    }  # fmt: skip
    message = read(path, kinds[path.stem]())
    assert message.ListFields()


def test_the_manuals_image_service_is_served_where_its_model_is(tmp_path, monkeypatch, mlp):
    (tmp_path / "conf").symlink_to(SEEDS / "image")
    place = tmp_path / "data/model/paddle/fluid"
    place.mkdir(parents=True)
    (place / "SE_ResNeXt50_32x4d").symlink_to(mlp)
    monkeypatch.chdir(tmp_path)  # where the ancestor is started
    (outputs,) = answers(None, {"x": X}, name="ImageClassifyService")
    assert len(outputs) == 1  # a JSON text for each row
    assert load(None).listen == "127.0.0.1:8010"


def test_the_manuals_two_services_with_their_flags_and_cube(tmp_path, monkeypatch, mlp, caplog):
    caplog.set_level("INFO")
    conf = tmp_path / "conf"
    conf.mkdir()
    for path in sorted((SEEDS / "manual").iterdir()):
        (conf / path.name.replace("_two", "")).write_text(path.read_text())
    (conf / "cube.conf").write_text("[]")
    (tmp_path / "data/model/paddle/fluid").mkdir(parents=True)
    (tmp_path / "data/model/paddle/fluid/SE_ResNeXt50_32x4d").symlink_to(mlp)
    monkeypatch.chdir(tmp_path)
    said = load(Path("conf"))
    assert said.listen == "127.0.0.1:8010"  # the service file's, which goes before that of the flags
    assert said.cube == "conf/cube.conf"
    assert [service.name for service in said.services] == ["ImageClassifyService", "BuiltinEchoService"]
    assert "--enable_model_toolkit has no meaning here: models are those of the model_toolkit file" in caplog.text
    idle = "has no meaning here: reloadable_meta, reloadable_type, sparse_param_service_type, "
    assert idle in caplog.text

    async def echoed():
        async with built(said) as services:
            answer = services["BuiltinEchoService"].infer(
                {"text": texts([b"a", b"bc"])}, (), Call("test"), then=lambda answer: answer
            )
            return (answer if isinstance(answer, tuple) else await answer).outputs["text"]

    assert asyncio.run(echoed()).sizes.tolist() == [1, 2]


def test_the_port_of_the_flags_counts_where_the_service_file_has_none(conf, tmp_path):
    conf({"gflags.conf": (SEEDS / "replica/gflags.conf").read_text() + "--num_threads=3\n# a comment\n\n"})
    said = load(tmp_path)
    assert (said.listen, said.compute_threads) == ("127.0.0.1:8011", 3)
    (tmp_path / "other.flags").write_text("-port='8012'\n--nomax_concurrency\n")
    assert load(tmp_path, tmp_path / "other.flags").listen == "127.0.0.1:8012"


def test_flags_say_where_the_files_are(conf, tmp_path):
    conf({"service.prototxt": None, "gflags.conf": "--inferservice_path=sub\n--inferservice_file=mine.prototxt"})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.prototxt").write_text(FILES["service.prototxt"])
    assert load(tmp_path).services[0].name == "Score"


# ---- YAML ----


def test_yaml_says_the_same(conf, tmp_path):
    workflow = """
        workflows {
          name: "main"
          nodes {
            name: "triple" type: "triple_op:Triple"
            config { key: "by" number: 2.5 } config { key: "some" text: ["a", "b"] } config { key: "none" list: true }
            config { key: "is" flag: true } config { key: "one" integer: 1 list: true }
          }
          batch { max_rows: 64 preferred_rows: [8, 16] }
        }
    """
    in_yaml = """
        workflows:
        - name: main
          nodes:
          - name: triple
            type: triple_op:Triple
            config: {by: 2.5, some: [a, b], none: [], is: true, one: [1]}
          batch: {max_rows: 64, preferred_rows: [8, 16]}
    """
    from predictor.config import settings_of

    conf({"workflow.prototxt": workflow})
    by_text = load(tmp_path)
    conf({"workflow.prototxt": None, "workflow.yaml": in_yaml})
    (tmp_path / "workflow.prototxt").unlink()
    by_yaml = load(tmp_path)
    node, same = by_text.workflows["main"].nodes[0], by_yaml.workflows["main"].nodes[0]
    assert settings_of(node, "") == settings_of(same, "")
    assert settings_of(node, "") == {"by": 2.5, "some": ["a", "b"], "none": [], "is": True, "one": [1]}
    assert by_text.workflows["main"].batch == by_yaml.workflows["main"].batch


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "services: [{name: A, worklows: [main]}]",
            r"service.yaml services\[0\]: found unknown field 'worklows', expected 'workflows'",
        ),
        ("services: {name: A", r"service.yaml:1:19: found"),
        ("services: 3", "service.yaml"),
        ("- 1", "service.yaml: found a list, expected the fields of a InferServiceConf"),
        ("port: 8010\nport: 8011", "service.yaml:2: found 'port' twice, expected once"),
        ("port: !!python/object/apply:os.system ['true']", "service.yaml:1:7: found could not determine a constructor"),
        ("port: eight", "service.yaml port: found"),
    ],
)
def test_mistakes_in_yaml_name_the_place(conf, tmp_path, text, message):
    conf({"service.prototxt": None, "service.yaml": text})
    with pytest.raises(BadConfig, match=message):
        load(tmp_path)


# ---- mistakes ----

NODE = 'workflows {{ name: "main" nodes {{ name: "a" type: "echo" }} nodes {{ name: "b" type: "echo" {} }} }}'
ENGINE = 'engines {{ name: "net" model_dir: "mlp" {} }}'


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("service.prototxt", "", "service.prototxt: found no services"),
        ("service.prototxt", None, "found no service.prototxt or infer_service.prototxt"),
        (
            "service.prototxt",
            'services { nam: "a" }',
            r"service.prototxt:1:12: found unknown field 'nam', expected 'name'",
        ),
        ("service.prototxt", 'services { workflows: "main" }', r"services\[0\] name: found ''"),
        ("service.prototxt", 'services { name: "a/b" workflows: "main" }', r"services\[0\] name: found 'a/b'"),
        ("service.prototxt", 'services { name: "A" }', "service 'A' workflows: found none, expected at least one"),
        (
            "service.prototxt",
            'services { name: "A" workflows: "mian" }',
            "service 'A' workflows: found 'mian', expected 'main'",
        ),
        (
            "service.prototxt",
            'services { name: "A" workflows: ["main", "main"] }',
            "found main, main, expected every one once",
        ),
        (
            "service.prototxt",
            2 * 'services { name: "A" workflows: "main" }',
            "service 'A': found a second service of this name",
        ),
        (
            "service.prototxt",
            'port: 65536 services { name: "A" workflows: "main" }',
            "port: found 65536, expected 0 to 65535",
        ),
        (
            "service.prototxt",
            'port: -1 services { name: "A" workflows: "main" }',
            "port: found -1, expected 0 to 65535",
        ),
        ("service.prototxt", 'services { name: "A" workflows: "main" slow_request_ms: -1 }', "found a negative time"),
        (
            "service.prototxt",
            'services { name: "A" enable_map_request_to_workflow: true }',
            "expected request_field_key and value_mapped_workflows",
        ),
        ("workflow.prototxt", "", "workflow.prototxt: found no workflows"),
        (
            "workflow.prototxt",
            "workflows { nodes { typ: 1 } }",
            "workflow.prototxt:1:21: found unknown field 'typ', expected 'type'",
        ),
        ("workflow.prototxt", 'workflows { nodes { name: "a" type: "echo" } }', r"workflows\[0\] name: found none"),
        ("workflow.prototxt", 'workflows { name: "main" }', "workflow.prototxt workflow 'main': found no nodes"),
        ("workflow.prototxt", 2 * FILES["workflow.prototxt"], "workflow 'main': found a second workflow of this name"),
        (
            "workflow.prototxt",
            'workflows { name: "main" workflow_type: "Sequnce" }',
            "workflow_type: found 'Sequnce', expected Sequence or Parallel",
        ),
        (
            "workflow.prototxt",
            'workflows { name: "main" nodes { name: "a" } }',
            "node 'a' type: found none, expected an op",
        ),
        (
            "workflow.prototxt",
            NODE.format('dependencies { name: "c" }'),
            "workflow.prototxt workflow 'main' node 'b' dependency: found 'c', expected one of a",
        ),
        ("workflow.prototxt", NODE.format('dependencies { name: "b" }'), "found a cycle: b → b"),
        (
            "workflow.prototxt",
            NODE.format('dependencies { name: "a" mode: "WR" }'),
            "dependency 'a' mode: found 'WR', expected RO or RW",
        ),
        ("workflow.prototxt", NODE.format("concurrency: -1"), "node 'b' concurrency and queue_size: found -1 and 0"),
        ("workflow.prototxt", NODE.format("executor: PROCESS"), "node 'b' concurrency: found 0, expected at least 1"),
        ("workflow.prototxt", NODE.format("executor: FIBRE"), "workflow.prototxt:1:"),
        ("workflow.prototxt", NODE.format("deadline_ms: -1"), "node 'b' deadline_ms: found -1"),
        ("workflow.prototxt", NODE.format(2 * 'config { key: "k" integer: 1 }'), "node 'b' config: found 'k' twice"),
        ("workflow.prototxt", NODE.format('inputs { name: "x" }'), "node 'b' inputs: found one without name or from"),
        (
            "workflow.prototxt",
            'workflows { name: "main" nodes { name: "a" type: "echo" } nodes { name: "a" type: "echo" } }',
            "node 'a': found a second node of this name",
        ),
        (
            "resource.prototxt",
            'model_toolkit_file: "nowhere.prototxt"',
            "model_toolkit_file: found no file nowhere.prototxt",
        ),
        (
            "resource.prototxt",
            'model_toolkit_path: ["a", "b"] model_toolkit_file: "c"',
            "found 2 and 1, expected as many of both",
        ),
        ("resource.prototxt", 'cube_config_file: "nowhere.conf"', "cube_config_file: found no file nowhere.conf"),
        ("model_toolkit.prototxt", "engines { }", r"engines\[0\] name: found none"),
        ("model_toolkit.prototxt", 'engines { name: "net" }', "engine 'net' model_dir and callable: found neither"),
        (
            "model_toolkit.prototxt",
            'engines { name: "net" model_dir: "nowhere" }',
            "engine 'net' model_dir: found no directory nowhere",
        ),
        (
            "model_toolkit.prototxt",
            'engines { name: "net" model_dir: "mlp" model_data_path: "x" }',
            "found two directories",
        ),
        ("model_toolkit.prototxt", 2 * ENGINE.format(""), "engine 'net': found a second engine of this name"),
        (
            "model_toolkit.prototxt",
            ENGINE.format('type: "FLUID_CPU_NATIV"'),
            "engine 'net' type: found 'FLUID_CPU_NATIV', expected 'FLUID_CPU_NATIVE'",
        ),
        (
            "model_toolkit.prototxt",
            ENGINE.format('modle_dir: "x"'),
            "model_toolkit.prototxt:1:40: found unknown field 'modle_dir', expected 'model_dir'",
        ),
        (
            "model_toolkit.prototxt",
            ENGINE.format("encrypted_model: true"),
            "encrypted_model: found true, expected a plain model",
        ),
        (
            "model_toolkit.prototxt",
            ENGINE.format('nan_policy: "drop"'),
            "nan_policy: found 'drop', expected pass or replace or fail",
        ),
        ("model_toolkit.prototxt", ENGINE.format("threads: -1"), "engine 'net' threads: found -1"),
        ("model_toolkit.prototxt", ENGINE.format("memory_limit_mb: -1"), "memory_limit_mb: found -1, expected 0"),
        ("model_toolkit.prototxt", ENGINE.format('warm_up_file: "no.npz"'), "warm_up_file: found no file no.npz"),
        ("gflags.conf", "port=8011", "gflags.conf:1: found 'port=8011', expected --name=value"),
        ("gflags.conf", "\n--prot=8011", "gflags.conf:2: found unknown flag 'prot', expected 'port'"),
        ("gflags.conf", "--port=80110", "gflags.conf:1 --port: found '80110', expected a whole number from 0 to 65535"),
        ("gflags.conf", "--port", "found --port without a value"),
        ("gflags.conf", "--workflow_file=nowhere", "--workflow_file: found no file"),
    ],
)
def test_a_mistake_is_told_with_file_place_what_was_found_and_expected(conf, tmp_path, file, text, message):
    conf({file: text})
    with pytest.raises(BadConfig, match=message):
        load(tmp_path)


TWO = ENGINE.format("") + ' engines { name: "other" model_dir: "mlp" }'
DECLARED = 'inputs { name: "x" datatype: "FP32" shape: [-1, 4] }'
ONE_NODE = 'workflows {{ name: "main" nodes {{ name: "b" type: {} }} }}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"workflow.prototxt": ONE_NODE.format('"ClassifOp"')},
            "node 'b' type 'ClassifOp': found no such op, expected 'ClassifyOp'",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" config { key: "modle" text: "net" }')},
            "config 'modle': found no such key",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" config { key: "model" text: "nett" }')},
            "config 'model': found 'nett', expected 'net'",
        ),
        ({"workflow.prototxt": ONE_NODE.format('"infer" config { key: "nan" }')}, "config 'nan': found no value"),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" config { key: "nan" text: "a" integer: 1 }')},
            "found values of several kinds",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" inputs { name: "z" from: "request.x" }')},
            "workflow.prototxt workflow 'main' node 'b' input 'z': found no input of its op",
        ),
        ({"workflow.prototxt": ONE_NODE.format('"triple_op:Treble"')}, "found no Treble in module triple_op"),
        ({"workflow.prototxt": ONE_NODE.format('"nowhere_op:Treble"')}, "No module named 'nowhere_op'"),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer"').replace("nodes", 'outputs: "z" nodes')},
            "output 'z': found nothing that makes it, expected one of y",
        ),
        (
            {
                "workflow.prototxt": ONE_NODE.format('"infer"').replace(
                    "nodes", 'inputs { name: "x" datatype: "FP31" } nodes'
                )
            },
            "input 'x' datatype: found 'FP31', expected 'FP32'",
        ),
        (
            {
                "workflow.prototxt": ONE_NODE.format('"infer"').replace(
                    "nodes", 'inputs { name: "x" datatype: "FP32" shape: [-1, 5] } nodes'
                )
            },
            r"node 'b' input 'x': found FP32 \[-1, 5\], expected FP32 \[-1, 4\]",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" batch { max_rows: -1 }')},
            "node 'b' batch: found a limit below 1",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"average"')},
            "node 'b'.*expected inputs { name: ... datatype: ... } of the workflow",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" concurrency: 1 executor: PROCESS')},
            "found PROCESS for an op that needs a model, expected THREAD",
        ),
        ({"workflow.prototxt": ONE_NODE.format('"GeneralDistKVInferOp"')}, "model 'net': found no tables"),
        ({"model_toolkit.prototxt": ""}, "config 'model': found no engines, expected one in a model_toolkit file"),
        ({"model_toolkit.prototxt": TWO}, "config 'model': found none, and engines net, other, expected one of them"),
        (
            {"model_toolkit.prototxt": ENGINE.format('engine: "ONNXRUNTIME"')},
            "engine 'net' engine: found ONNXRUNTIME for",
        ),
        ({"model_toolkit.prototxt": ENGINE.format('device: "tpu"')}, "device: found 'tpu'"),
        (
            {"model_toolkit.prototxt": ENGINE.format("memory_limit_mb: 64")},
            "engine 'net' memory_limit_mb: found 64 for torch on the CPU",
        ),
        (
            {"workflow.prototxt": ONE_NODE.format('"infer" dependencies { name: "c" }')},
            "node 'b' dependency: found 'c', expected none: it is alone",
        ),
    ],
)
def test_a_mistake_that_takes_the_models_to_find_is_told_as_well(conf, tmp_path, files, message):
    conf(files)
    with pytest.raises(BadConfig, match=message):
        answers(tmp_path)


@pytest.mark.parametrize(
    ("declared", "apart"), [("", ""), (DECLARED, ""), (DECLARED, "concurrency: 1 executor: PROCESS")]
)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('"odd_ops:Unfinished" config { key: "at" text: "make" }', "op 'odd_ops:Unfinished' thing at make: found none"),
        ('"odd_ops:Unfinished" config { key: "at" text: "bind" }', "thing at bind: found none, expected one"),
        ('"odd_ops:Unfinished" config { key: "at" text: "open" }', "thing at open: found none, expected one"),
        (
            '"odd_ops:Unfinished" config { key: "too" text: "" }',
            "op 'odd_ops:Unfinished' config 'too': found no such key",
        ),
        ('"odd_ops:Nobody"', "op 'odd_ops:Nobody': found no Nobody in module odd_ops"),
    ],
)
def test_an_op_that_cannot_be_had_is_told_with_its_node_once(conf, tmp_path, declared, apart, config, message):
    node = f'nodes {{ name: "b" type: {config} {apart} }}'
    conf({"workflow.prototxt": f'workflows {{ name: "main" {declared} {node} }}'})
    with pytest.raises(BadConfig) as refused:
        answers(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/workflow.prototxt workflow 'main' node 'b' {message}")


@pytest.mark.parametrize(("at", "expected"), [("bind", "an op that takes its inputs"), ("open", "an op that opens")])
def test_a_fault_of_an_op_at_load_is_told_with_its_node(conf, tmp_path, at, expected):
    conf({"workflow.prototxt": ONE_NODE.format(f'"odd_ops:Unfinished" config {{ key: "at" text: "fault at {at}" }}')})
    with pytest.raises(BadConfig) as refused:
        answers(tmp_path)
    message = f"workflow 'main' node 'b': found ValueError: no good, expected {expected}"
    assert str(refused.value) == f"{tmp_path}/workflow.prototxt {message}"


@pytest.mark.parametrize(("said", "delay_s"), [("", 0.002), ("max_delay_ms: 0", 0.0), ("max_delay_ms: 5", 0.005)])
def test_a_delay_of_zero_goes_before_the_flags(said, delay_s):
    limits = text_format.Parse(said, pb.BatchLimits())
    assert limits_of(limits, "batch", Limits(max_delay_s=0.002)).max_delay_s == delay_s


def test_a_workflow_that_nobody_uses_is_worth_a_warning(conf, tmp_path, caplog):
    conf({"workflow.prototxt": FILES["workflow.prototxt"] + ONE_NODE.format('"echo"').replace("main", "spare")})
    load(tmp_path)
    assert "workflow spare is used by no service" in caplog.text


# ---- what is built ----


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "concurrency: 2",
        "concurrency: 2 executor: PROCESS queue_size: 4",
        "batch { max_rows: 4 }",
        "concurrency: 2 batch { max_rows: 2 }",
        'when: "request.chosen"',
    ],
)
def test_an_op_of_ones_own_before_a_net(conf, tmp_path, extra):
    workflow = f"""
        workflows {{
          name: "main" workflow_type: "Parallel"
          nodes {{ name: "triple" type: "triple_op:Triple" config {{ key: "by" number: 2 }} {extra} }}
          nodes {{ name: "score" type: "infer" dependencies {{ name: "triple" }} }}
        }}
    """
    conf({"workflow.prototxt": workflow})
    chosen = {"chosen": np.array([True, False, True, True, False])} if "when" in extra else {}
    requests = [{"x": X + i, **chosen} for i in range(6)]
    for i, outputs in enumerate(answers(tmp_path, *requests)):
        given = 2 * (X + i)
        if chosen:
            given = given * chosen["chosen"][:, None]
        assert np.allclose(outputs["y"], direct(given), atol=1e-6)


CALLED = """
    engines {{
      name: "sums" callable: "{target}"
      inputs {{ name: "x" datatype: "FP32" shape: [-1, 4] }}
      outputs {{ name: "y" datatype: "FP32" shape: -1 }}
      {more}
    }}
"""


def test_a_function_is_an_engine(conf, tmp_path):
    functions = "def add_up(x):\n    return x.sum(axis=1)\n"
    toolkit = CALLED.format(target="sums_of_rows:add_up", more="")
    conf({"model_toolkit.prototxt": toolkit, "sums_of_rows.py": functions})
    (outputs,) = answers(tmp_path, {"x": X})
    np.testing.assert_array_equal(outputs["y"], X.sum(axis=1))


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("sums", "", "callable sums: found 'sums', expected module:function"),
        ("nobody_has_this:f", "", "callable nobody_has_this:f: found ModuleNotFoundError"),
        ("json:loads", 'model_dir: "mlp"', "model_dir and callable: found both"),
        (
            "json:loads",
            'inputs { name: "x" datatype: "FP32" }',
            "inputs 'x': found no name, or one that is there twice",
        ),
        ("json:loads", 'outputs { name: "z" datatype: "FP23" }', "'z': found FP23"),
        ("json:loads", 'outputs { name: "z" datatype: "FP32" ragged: true }', "outputs: found a ragged one"),
    ],
)
def test_a_function_that_cannot_be_an_engine_is_refused(conf, tmp_path, target, more, message):
    conf({"model_toolkit.prototxt": CALLED.format(target=target, more=more)})
    with pytest.raises(BadConfig, match=message) as refused:
        answers(tmp_path, {"x": X})
    assert "model_toolkit.prototxt" in str(refused.value)


def test_several_engines_and_workflows_share_a_request_and_put_their_replies_together(conf, tmp_path):
    one = """
        workflows {{
          name: "{0}"
          nodes {{ name: "score" type: "infer" config {{ key: "model" text: "{0}" }} }}
          nodes {{
            name: "named" type: "select" config {{ key: "names" text: "{0}=y" list: true }}
            dependencies {{ name: "score" }}
          }}
        }}
    """
    for parallel in ("true", "false"):
        conf({
            "workflow.prototxt": one.format("net") + one.format("other"),
            "model_toolkit.prototxt": TWO,
            "service.prototxt": f'services {{ name: "Score" workflows: ["net", "other"] parallel: {parallel} }}',
        })  # fmt: skip
        (outputs,) = answers(tmp_path, {"x": X})
        assert np.allclose(outputs["net"], direct(X), atol=1e-6)
        assert np.array_equal(outputs["net"], outputs["other"])


def test_a_request_says_which_workflow_runs_it(conf, tmp_path):
    service = """
        services {
          name: "Score" enable_map_request_to_workflow: true request_field_key: "variant"
          value_mapped_workflows { request_field_value: "net" workflow: "plain" }
          value_mapped_workflows { request_field_value: "triple" workflow: "triple" }
        }
    """
    workflows = """
        workflows { name: "plain" nodes { name: "score" type: "infer" } }
        workflows {
          name: "triple"
          nodes { name: "triple" type: "triple_op:Triple" }
          nodes { name: "score" type: "infer" dependencies { name: "triple" } }
        }
    """
    conf({"service.prototxt": service, "workflow.prototxt": workflows})
    asked = [{"x": X, "variant": texts([name] * 5)} for name in (b"net", b"triple")]
    plain, tripled = answers(tmp_path, *asked)
    assert np.allclose(plain["y"], direct(X), atol=1e-6)
    assert np.allclose(tripled["y"], direct(3 * X), atol=1e-6)
    for variant, message in [
        ({"variant": texts([b"nett"])}, "input 'variant': found 'nett', expected one of 'net', 'triple'"),
        ({"variant": texts([b"net", b"nex"])}, "found different texts, expected"),
        ({"variant": texts([])}, "found no text"),
        ({"variant": texts([b"net" * 1000] * 3)}, "found 'netnetnet"),
        ({"variant": X}, "found FP32, expected BYTES"),
        ({}, "found nothing, expected BYTES"),
    ]:
        with pytest.raises(BadRequest, match=message):
            answers(tmp_path, {"x": X, **variant})


TABLES = """
    workflows {
      name: "one_node"
      nodes { name: "reader" type: "GeneralReaderOp" }
      nodes { name: "kv" type: "GeneralDistKVInferOp" dependencies { name: "reader" mode: "RO" } }
      nodes { name: "reply" type: "GeneralResponseOp" dependencies { name: "kv" mode: "RO" } }
    }
    workflows {
      name: "three_nodes"
      nodes { name: "rows" type: "gather" config { key: "model" text: "ctr" } }
      nodes { name: "vectors" type: "pool" dependencies { name: "rows" } }
      nodes { name: "net" type: "infer" dependencies { name: "vectors" } batch { max_rows: 16 } }
    }
"""


def test_a_model_with_tables_by_the_ancestors_one_op_and_by_three_of_ours(conf, tmp_path, demo):
    services = 'services { name: "A" workflows: "one_node" } services { name: "B" workflows: "three_nodes" }'
    engine = f'engines {{ name: "ctr" type: "PADDLE_INFER" model_dir: "{demo.pruned}" }}'
    conf({"workflow.prototxt": TABLES, "service.prototxt": services, "model_toolkit.prototxt": engine})
    rows = criteo.read(demo.lines)
    request = {"dense": rows.dense, "keys": rows.keys, "lengths": rows.lengths}
    want = train_ctr.score(demo.model, rows)
    for name in "AB":
        (outputs,) = answers(tmp_path, request, name=name)
        assert np.abs(outputs["prob"][:, 1] - want).max() <= 1e-5


def test_the_threads_and_the_nan_policy_of_an_engine_are_those_of_its_infer_op(conf, tmp_path):
    conf({"model_toolkit.prototxt": ENGINE.format('runtime_thread_num: 2 batch_infer_size: 2 nan_policy: "fail"')})
    (outputs,) = answers(tmp_path, {"x": X})
    assert np.allclose(outputs["y"], direct(X), atol=1e-6)
    with pytest.raises(ServingError, match="expected a number"):
        answers(tmp_path, {"x": np.full((1, 4), np.nan, np.float32)})


def test_declared_inputs_are_what_a_request_holds(conf, tmp_path):
    workflow = """
        workflows {
          name: "main"
          inputs { name: "features" datatype: "FP32" shape: [-1, 4] }
          nodes { name: "reader" type: "read" }
          nodes {
            name: "score" type: "infer" dependencies { name: "reader" }
            inputs { name: "x" from: "reader.features" }
          }
        }
    """
    conf({"workflow.prototxt": workflow})
    (outputs,) = answers(tmp_path, {"features": X})
    assert np.allclose(outputs["y"], direct(X), atol=1e-6)
    with pytest.raises(BadRequest, match="input 'x': found a name the model does not take, expected one of features"):
        answers(tmp_path, {"x": X})


def test_recorded_requests_warm_up_what_they_were_recorded_for(conf, tmp_path):
    np.savez(tmp_path / "warm.npz", x=X)
    conf({"model_toolkit.prototxt": ENGINE.format('warm_up_file: "warm.npz"')})

    async def run():
        async with built(load(tmp_path)) as services:
            return services["Score"].lanes[0].batcher.counters.requests

    assert asyncio.run(run()) == 1


def test_an_outline_shows_workflows_stages_and_ports(conf, tmp_path):
    conf()

    async def run():
        async with built(load(tmp_path)) as services:
            return outlined(services["Score"])

    assert asyncio.run(run()) == [
        "Score 1 (main; takes x FP32 [-1, 4])",
        "  workflow main, Sequence: reader → score",
        "  makes y FP32 [-1, 2]",
    ]


def test_check_prints_what_would_be_served(conf, tmp_path, command):
    conf()
    done = command("predictor-server", "--conf", tmp_path, "--check")
    assert done.returncode == 0, done.stderr
    assert "would serve Score 1 on 127.0.0.1:8010" in done.stdout
    assert "workflow main, Sequence: reader → score" in done.stdout
    conf({"service.prototxt": 'services { name: "A" workflows: "mian" }'})
    done = command("predictor-server", "--conf", tmp_path, "--check")
    assert done.returncode == 1
    assert "expected 'main'" in done.stderr
