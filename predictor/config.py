"""Which services, workflows and models a directory of configuration files describes.

    conf/service.prototxt          services, and the workflows of each     (also infer_service.prototxt)
    conf/workflow.prototxt         workflows, and the nodes of each
    conf/resource.prototxt         where the models are listed, where the cube is
    conf/model_toolkit.prototxt    models, and what runs each
    conf/gflags.conf               flags of the ancestor's server, one a line

The fields are described in proto/serving_config.proto. Each file may be YAML instead (service.yaml ...): the same
fields, and `config: {k: 3}` for a node's arguments. A relative path in a file is taken from the file's directory if
there is something at it, else from the working directory, as the ancestor does.

A file that says too much is refused; what the ancestor needed and we do not is read, and the log says that it changes
nothing.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import Message

from cube.config import nearest
from cube.errors import BadConfig
from predictor.config_files import Flags, one_of, read, resolved
from predictor.ops.infer import NAN_POLICIES, NanPolicy
from predictor.ops.op import Op
from predictor.pb.serving_config_pb2 import (
    DAGNode,
    EngineDesc,
    InferService,
    InferServiceConf,
    ModelToolkitConf,
    RequestInput,
    ResourceConf,
    Workflow,
    WorkflowConf,
)
from predictor.workflow import Dependency, Kind, Mode, Node, ordered
from trainer_tools.manifest import Tensor

log = logging.getLogger(__name__)

DEFAULT_PORT = 8010  # the ancestor's
_CONF = Path("conf")  # where files are, if no flag says it
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # of a service: it is a part of URLs
_TYPE = re.compile(r"FLUID_(CPU|GPU)_(?:NATIVE|ANALYSIS)(?:_DIR)?")
_TYPES = [f"FLUID_{d}_{api}{form}" for d in ("CPU", "GPU") for api in ("NATIVE", "ANALYSIS") for form in ("", "_DIR")]
_PART_ROWS = 32  # the ancestor's batch_infer_size

_OF_PROGRAMS = ("engine", "device", "threads", "compile", "memory_limit_mb", "type")  # what a callable has no use for
_WITHOUT_MEANING = {
    "services": ("merger",),
    "nodes": ("address",),
    "resource": (
        "general_model_path", "general_model_file", "cube_quant_bits", "cube_cache_path", "auth_product_name",
        "auth_container_id",
    ),
    "engines": (
        "reloadable_meta", "reloadable_type", "version_file", "version_type", "enable_batch_align", "enable_overrun",
        "allow_split_request", "sparse_param_service_type", "sparse_param_service_table_name",
        "enable_memory_optimization", "static_optimization", "force_update_static_cache", "enable_ir_optimization",
        "combined_model", "gpu_multi_stream", "gpu_memory_mb", "use_trt", "use_lite", "use_xpu", "use_ascend_cl",
        "use_ipu", "ipu_cfg_file", "trt_workspace_size", "trt_use_static", "min_subgraph_size", "min_input_shape",
        "max_input_shape", "opt_input_shape", "dist_carrier_id", "dist_cfg_file", "dist_nranks", "dist_endpoints",
        "dist_subgraph_index",
    ),
}  # fmt: skip


class EngineSettings(NamedTuple):
    """A model, and what runs it."""

    name: str  # as nodes call it
    directory: Path  # of the model; of a callable, where its module may be
    callable: str  # "module:function" instead of a directory's program; empty: none
    inputs: tuple[Tensor, ...]  # of a callable
    outputs: tuple[Tensor, ...]
    engine: str  # these five as predictor.engines.open.open_engine takes them
    device: str
    threads: int
    compile: str
    memory_limit_mb: int
    run_threads: int  # of one batch, which is run in parts of `part_rows`; 0: whole
    part_rows: int
    nan: NanPolicy
    warm_up: Path | None
    place: str  # for messages

    def of_the_net(self) -> tuple[object, ...]:
        """What makes one net another one in memory; how its op runs it does not."""
        net = self.directory.resolve(), self.callable, self.engine, self.device, self.threads, self.compile
        return *net, self.memory_limit_mb


class Settings(NamedTuple):
    """What the files say, checked as far as it can be without a model."""

    services: tuple[InferService, ...]
    workflows: Mapping[str, Workflow]  # by name
    engines: Mapping[str, EngineSettings]  # by name
    listen: str  # host:port
    cube: str  # path of a cube.prototxt or cube.conf; empty: none
    compute_threads: int  # 0: not said
    service_file: Path  # for messages
    workflow_file: Path


def load(directory: Path | None, flag_file: Path | None = None) -> Settings:
    """Read and check the files. Raises BadConfig naming file, place, what was found and what was expected.

    directory: where they are, unless flags say it; None: conf. flag_file: goes before gflags.conf in that directory.
    """
    if directory is not None and not directory.is_dir():
        raise BadConfig(str(directory), "no directory", "one with service.prototxt and workflow.prototxt")
    directory = directory or _CONF
    flags = Flags()
    for file in (directory / "gflags.conf", flag_file):
        if file is not None and (file == flag_file or file.is_file()):
            flags.read(file)
    service_file = flags.file("inferservice", directory)
    said = read(service_file, InferServiceConf())
    workflow_file = flags.file("workflow", directory)
    workflows = _workflows(workflow_file)
    engines, cube = _resources(flags, directory)
    return Settings(
        services=_services(service_file, said, workflows),
        workflows=workflows,
        engines=engines,
        listen=_listen(service_file, said, flags),
        cube=cube,
        compute_threads=flags.number("num_threads", 0, 4096),
        service_file=service_file,
        workflow_file=workflow_file,
    )


# ---- services and workflows ----


def _services(path: Path, said: InferServiceConf, workflows: Mapping[str, Workflow]) -> tuple[InferService, ...]:
    if not said.services:
        raise BadConfig(str(path), "no services", "services { name: ... workflows: ... }")
    used: set[str] = set()
    names: set[str] = set()
    for number, service in enumerate(said.services):
        place = f"{path} service {service.name!r}"
        if not _NAME.fullmatch(service.name):
            raise BadConfig(f"{path} services[{number}] name", repr(service.name), "letters, digits, _ . and -")
        if service.name in names:
            raise BadConfig(place, "a second service of this name", "every name once")
        names.add(service.name)
        if service.tracer_interval_s < 0 or service.slow_request_ms < 0:
            raise BadConfig(f"{place} tracer_interval_s and slow_request_ms", "a negative time", "0 or more")
        for workflow in _workflows_of(service, place):
            if workflow not in workflows:
                raise BadConfig(f"{place} workflows", repr(workflow), nearest(workflow, workflows))
            used.add(workflow)
        _log_what_is_idle(service, "services", place)
    for name in workflows.keys() - used:
        log.warning("workflow %s is used by no service", name)
    return tuple(said.services)


def _workflows_of(service: InferService, place: str) -> list[str]:
    """Names of the workflows of a service, checked against each other."""
    if not service.enable_map_request_to_workflow:
        if not service.workflows:
            raise BadConfig(f"{place} workflows", "none", "at least one")
        if len(set(service.workflows)) < len(service.workflows):
            raise BadConfig(f"{place} workflows", ", ".join(service.workflows), "every one once")
        return list(service.workflows)
    if service.workflows:
        raise BadConfig(f"{place} workflows", "some, and enable_map_request_to_workflow", "value_mapped_workflows")
    if not service.request_field_key or not service.value_mapped_workflows:
        raise BadConfig(place, "enable_map_request_to_workflow", "request_field_key and value_mapped_workflows with it")
    values = [mapped.request_field_value for mapped in service.value_mapped_workflows]
    if len(set(values)) < len(values):
        raise BadConfig(f"{place} value_mapped_workflows", ", ".join(map(repr, values)), "every value once")
    return [mapped.workflow for mapped in service.value_mapped_workflows]


def _workflows(path: Path) -> dict[str, Workflow]:
    by_name: dict[str, Workflow] = {}
    for number, workflow in enumerate(read(path, WorkflowConf()).workflows):
        place = f"{path} workflow {workflow.name!r}"
        if not workflow.name:
            raise BadConfig(f"{path} workflows[{number}] name", "none", "a name")
        if workflow.name in by_name:
            raise BadConfig(place, "a second workflow of this name", "every name once")
        _kind(workflow, place)
        nodes = []
        for node in workflow.nodes:
            _check_node(node, f"{place} node {node.name!r}")
            nodes.append(Node(node.name, Op(), dependencies_of(node, place)))
        ordered(place, nodes)  # before any model is loaded
        by_name[workflow.name] = workflow
    if not by_name:
        raise BadConfig(str(path), "no workflows", "workflows { name: ... nodes { ... } }")
    return by_name


def _check_node(node: DAGNode, place: str) -> None:
    if not node.type:
        raise BadConfig(f"{place} type", "none", "an op")
    if not 0 <= node.concurrency <= 1024 or not 0 <= node.queue_size <= 1 << 20:
        found = f"{node.concurrency} and {node.queue_size}"
        raise BadConfig(f"{place} concurrency and queue_size", found, f"0 to 1024 and 0 to {1 << 20}")
    if not node.deadline_ms >= 0:
        raise BadConfig(f"{place} deadline_ms", node.deadline_ms, "0 or more")
    if not node.concurrency and (node.executor == DAGNode.PROCESS or node.queue_size):
        raise BadConfig(f"{place} concurrency", 0, "at least 1 where there is an executor or a queue_size")
    seen: set[str] = set()
    for setting in node.config:
        if setting.key in seen:
            raise BadConfig(f"{place} config", f"{setting.key!r} twice", "once")
        seen.add(setting.key)
    for given in node.inputs:
        if not given.name or not getattr(given, "from"):
            raise BadConfig(f"{place} inputs", "one without name or from", "both")
    _log_what_is_idle(node, "nodes", place)


def _kind(workflow: Workflow, place: str) -> Kind:
    kinds = {kind.value: kind for kind in Kind}
    if workflow.workflow_type not in ("", *kinds):
        raise BadConfig(f"{place} workflow_type", repr(workflow.workflow_type), " or ".join(kinds))
    return kinds.get(workflow.workflow_type, Kind.SEQUENCE)


def kind_of(workflow: Workflow) -> Kind:
    """How the nodes of a checked workflow run."""
    return _kind(workflow, workflow.name)


def dependencies_of(node: DAGNode, place: str) -> tuple[Dependency, ...]:
    """The nodes that a node depends on; raises BadConfig for an unknown mode."""
    made = []
    for dependency in node.dependencies:
        if dependency.mode not in ("", *Mode.__members__):
            where = f"{place} node {node.name!r} dependency {dependency.name!r} mode"
            raise BadConfig(where, repr(dependency.mode), " or ".join(Mode.__members__))
        made.append(Dependency(dependency.name, Mode[dependency.mode or "RO"]))
    return tuple(made)


def settings_of(node: DAGNode, place: str) -> dict[str, Any]:
    """A node's arguments for its op; raises BadConfig for one that has values of two kinds, or none."""
    made: dict[str, Any] = {}
    for setting in node.config:
        given = [values for values in (setting.text, setting.integer, setting.number, setting.flag) if values]
        if len(given) > 1 or not (given or setting.list):
            found = "values of several kinds" if given else "no value"
            raise BadConfig(f"{place} config {setting.key!r}", found, "text, integer, number or flag")
        values: list[Any] = list(given[0]) if given else []
        made[setting.key] = values if setting.list or len(values) > 1 else values[0]
    return made


def _listen(path: Path, said: InferServiceConf, flags: Flags) -> str:
    if said.listen:
        return said.listen
    if said.HasField("port"):
        if not 0 <= said.port <= 65_535:
            raise BadConfig(f"{path} port", said.port, "0 to 65535")
        if flags.has("port"):
            log.info("port %d of %s is used, not that of the flags", said.port, path)
        return f"127.0.0.1:{said.port}"
    return f"127.0.0.1:{flags.number('port', 0, 65_535) if flags.has('port') else DEFAULT_PORT}"


# ---- models ----


def _resources(flags: Flags, directory: Path) -> tuple[dict[str, EngineSettings], str]:
    """The engines by name, and where the cube is. Workflows of ops alone need neither."""
    path = flags.file_or_none("resource", directory)
    cube = ""
    if path is None:
        found = one_of(directory, ["model_toolkit"])
        toolkits = [] if found is None else [found]
    else:
        said = read(path, ResourceConf())
        _log_what_is_idle(said, "resource", str(path))
        toolkits = _toolkits(path, said)
        if said.cube_config_path or said.cube_config_file:
            where = str(Path(said.cube_config_path) / said.cube_config_file)
            cube = str(resolved(where, path.parent))
            if not Path(cube).is_file():
                raise BadConfig(f"{path} cube_config_file", f"no file {where}", "a cube.prototxt or a cube.conf")
    engines: dict[str, EngineSettings] = {}
    for toolkit in toolkits:
        for number, engine in enumerate(read(toolkit, ModelToolkitConf()).engines):
            place = f"{toolkit} engine {engine.name!r}"
            if not engine.name:
                raise BadConfig(f"{toolkit} engines[{number}] name", "none", "a name")
            if engine.name in engines:
                raise BadConfig(place, "a second engine of this name", "every name once")
            engines[engine.name] = _engine(engine, toolkit.parent, place, flags)
    return engines, cube


def _toolkits(path: Path, said: ResourceConf) -> list[Path]:
    directories, files = list(said.model_toolkit_path), list(said.model_toolkit_file)
    if said.model_manager_path or said.model_manager_file:
        directories.append(said.model_manager_path)
        files.append(said.model_manager_file or "model_toolkit.prototxt")
    if not directories and not files:
        found = one_of(path.parent, ["model_toolkit"])
        return [] if found is None else [found]
    directories = directories or [""] * len(files)
    files = files or ["model_toolkit.prototxt"] * len(directories)
    if len(directories) != len(files):
        counts = f"{len(directories)} and {len(files)}"
        raise BadConfig(f"{path} model_toolkit_path and model_toolkit_file", counts, "as many of both")
    toolkits = []
    for directory, file in zip(directories, files, strict=True):
        toolkit = resolved(str(Path(directory) / file), path.parent)
        if not toolkit.is_file():
            # The ancestor is started beside conf/ and says ./conf; whoever starts us elsewhere means the same file.
            toolkit = path.parent / file
        if not toolkit.is_file():
            raise BadConfig(f"{path} model_toolkit_file", f"no file {Path(directory) / file}", "the list of engines")
        toolkits.append(toolkit)
    return toolkits


def _engine(said: EngineDesc, base: Path, place: str, flags: Flags) -> EngineSettings:
    if said.model_dir and said.model_data_path and said.model_dir != said.model_data_path:
        raise BadConfig(f"{place} model_dir and model_data_path", "two directories", "one")
    where = said.model_dir or said.model_data_path
    if bool(where) == bool(said.callable):
        found = "both" if where else "neither"
        raise BadConfig(f"{place} model_dir and callable", found, "the model's directory, or a function instead")
    directory = resolved(where, base) if where else base
    if not directory.is_dir():
        raise BadConfig(f"{place} model_dir", f"no directory {where}", f"one in {base} or {Path.cwd()}")
    if said.callable and (idle := [n for n in _OF_PROGRAMS if getattr(said, n)]):
        raise BadConfig(f"{place} {idle[0]}", repr(getattr(said, idle[0])), "nothing beside callable")
    if (said.inputs or said.outputs) and not said.callable:
        raise BadConfig(f"{place} inputs and outputs", "those of a program", "none: the program says them")
    if said.encrypted_model or said.enable_dist_model:
        what = "encrypted_model" if said.encrypted_model else "enable_dist_model"
        raise BadConfig(f"{place} {what}", "true", "a plain model on one machine: this is not implemented")
    nan = next((policy for policy in NAN_POLICIES if policy == (said.nan_policy or "pass")), None)
    if nan is None:
        raise BadConfig(f"{place} nan_policy", repr(said.nan_policy), " or ".join(NAN_POLICIES))
    if not 0 <= said.memory_limit_mb <= 1 << 30:
        raise BadConfig(f"{place} memory_limit_mb", said.memory_limit_mb, f"0 (none) to {1 << 30}")
    for name in ("threads", "cpu_math_thread_num", "runtime_thread_num", "batch_infer_size"):
        if not 0 <= getattr(said, name) <= 65_536:
            raise BadConfig(f"{place} {name}", getattr(said, name), "0 to 65536")
    warm_up = resolved(said.warm_up_file, base) if said.warm_up_file else None
    if warm_up is not None and not warm_up.is_file():
        raise BadConfig(f"{place} warm_up_file", f"no file {said.warm_up_file}", "an .npz file of requests")
    _log_what_is_idle(said, "engines", place)
    return EngineSettings(
        name=said.name,
        directory=directory,
        callable=said.callable,
        inputs=_tensors(said.inputs, f"{place} inputs"),
        outputs=_tensors(said.outputs, f"{place} outputs"),
        engine=said.engine or "AUTO",
        device=_device(said, place, flags),
        threads=said.threads or said.cpu_math_thread_num or 1,
        compile=said.compile or "none",
        memory_limit_mb=said.memory_limit_mb,
        run_threads=said.runtime_thread_num,
        part_rows=said.batch_infer_size or _PART_ROWS,
        nan=nan,
        warm_up=warm_up,
        place=place,
    )


def _tensors(said: Iterable[RequestInput], place: str) -> tuple[Tensor, ...]:
    """What a callable declares; its engine checks the datatypes."""
    made = tuple(Tensor(one.name, one.datatype, list(one.shape) or [-1]) for one in said)
    for tensor in made:
        if not tensor.name or sum(other.name == tensor.name for other in made) > 1:
            raise BadConfig(f"{place} {tensor.name!r}", "no name, or one that is there twice", "every name once")
    if any(one.ragged for one in said):
        raise BadConfig(place, "a ragged one", "arrays: an op of your own takes ragged values")
    return made


def _device(said: EngineDesc, place: str, flags: Flags) -> str:
    """cpu, or cuda:N."""
    match = _TYPE.fullmatch(said.type)
    if said.type not in ("", "PADDLE_INFER") and match is None:
        raise BadConfig(f"{place} type", repr(said.type), nearest(said.type, [*_TYPES, "PADDLE_INFER"]))
    if said.device:
        return said.device
    if said.use_gpu or (match is not None and match[1] == "GPU"):
        return f"cuda:{said.gpu_ids[0] if said.gpu_ids else flags.number('gpuid', 0, 999)}"
    return "cpu"


def _log_what_is_idle(said: Message, kind: str, place: str) -> None:
    """One line for the fields of a message that are read and change nothing."""
    names = {field.name for field, _ in said.ListFields()}
    if idle := [name for name in _WITHOUT_MEANING[kind] if name in names]:
        log.info("%s: has no meaning here: %s", place, ", ".join(idle))
