"""What a configuration says → services that run: models, ops, workflows, executors behind batchers."""

import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as Threads
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cube.config import nearest
from cube.errors import BadConfig, ServingError
from predictor import models
from predictor.apart import Gathered, OwnThreads
from predictor.batching import Limits
from predictor.config import EngineSettings, Settings, dependencies_of, kind_of, settings_of
from predictor.config_files import resolved
from predictor.engines.callable_engine import CallableEngine
from predictor.engines.open import open_engine
from predictor.executor import Executor
from predictor.mapped_service import MappedService
from predictor.models import Model
from predictor.ops import registry
from predictor.ops.op import Op, Port
from predictor.pb.serving_config_pb2 import BatchLimits, DAGNode, InferService, Workflow
from predictor.processes import OwnProcesses
from predictor.request_ports import request_ports
from predictor.requests import Form, keys_port
from predictor.service import Lane, Service
from predictor.tensors import DTYPES, shape_text
from predictor.warming import warm_up
from predictor.workflow import Dependency, Node, Plan, Step, plan
from trainer_tools.manifest import Lookup

log = logging.getLogger(__name__)

MORE_WHERE_RUNS_WAIT = 8  # runs in flight, for a cube to answer while others compute
_QUEUE = 64  # batches that wait for a thread or process of a node's own
_MADE_APART = f"{__name__}:made_apart"


class Built(NamedTuple):
    """A workflow whose ops are made, and what a request for it must hold."""

    plan: Plan
    models: tuple[Model, ...]  # that its nodes use
    lookups: tuple[Lookup, ...]  # whose keys a request brings
    lengths: Mapping[str, str]  # of ragged inputs of a request: the input with their lengths


class Assembly:
    """Makes services one after the other, out of models that they share."""

    def __init__(self, said: Settings, shared: models.Settings, threads: Threads, usual: Limits):
        """threads: where all workflows compute. usual: limits of a workflow that computes only and says nothing."""
        self._said, self._shared, self._threads, self._usual = said, shared, threads, usual
        self._models: dict[str, Model] = {}
        self._used: dict[str, set[str]] = {}  # names of models, by service

    async def load(self, stack: AsyncExitStack) -> None:
        """Load all models; `stack` closes them. Raises BadConfig, BadData, DataCorrupt, ShardUnavailable."""
        for name, settings in self._said.engines.items():
            log.info("loading %s from %s", name, settings.callable or settings.directory)
            shared = [n for n in self._models if _is_shared(settings, self._said.engines[n])]
            if shared:
                model = replace(self._models[shared[0]], name=name)
            else:
                model = await _loaded(settings, self._shared)
                stack.push_async_callback(model.close)
            self._models[name] = replace(model, recording=settings.warm_up or model.recording)
            log.info("engine %s: %s on %s", name, model.engine.platform, settings.device)

    def services(self, stack: AsyncExitStack) -> list[Service]:
        """All services, their ops open; `stack` closes these. Raises BadConfig naming file, workflow and node."""
        _import_from(self._said.workflow_file.parent, self._said.workflows.values())
        return [self._service(service, stack) for service in self._said.services]

    async def warm_up(self, service: Service) -> None:
        """Run what was recorded for the models of a service, and requests of zeros. Raises what they do, BadData."""
        used = [self._models[name] for name in sorted(self._used[service.name])]
        parts = service.services if isinstance(service, MappedService) else ()
        others = {model for other, models in self._used.items() if other != service.name for model in models}
        await warm_up(service, used, self._threads, parts=parts, elsewhere=others)

    def _service(self, said: InferService, stack: AsyncExitStack) -> Service:
        place = f"{self._said.service_file} service {said.name!r}"
        if not said.enable_map_request_to_workflow:
            built = [self._workflow(self._said.workflows[name]) for name in said.workflows]
            return self._of(said, built, place, stack)
        names = dict.fromkeys(mapped.workflow for mapped in said.value_mapped_workflows)
        built_by_name = {name: self._workflow(self._said.workflows[name]) for name in names}
        by_name = {name: self._of(said, [built], place, stack) for name, built in built_by_name.items()}
        by_value = {mapped.request_field_value: by_name[mapped.workflow] for mapped in said.value_mapped_workflows}
        key = said.request_field_key
        form = self._form(list(built_by_name.values()), place, {key: Port("BYTES")})
        return MappedService(key, by_value, form)

    def _of(self, said: InferService, built: Sequence[Built], place: str, stack: AsyncExitStack) -> Service:
        """A service that runs all of these workflows for a request."""
        used = {model.name: model for each in built for model in each.models}
        self._used.setdefault(said.name, set()).update(used)
        only = next(iter(used.values())) if len(used) == 1 else None
        tables = {
            table if only else f"{model.name}.{table}": version
            for model in used.values()
            for table, version in model.tables.items()
        }
        form, lanes = self._form(built, place), [self._lane(each.plan, stack) for each in built]
        version = said.version or (only.version if only else "1")
        platform = only.engine.platform if only else "workflow"
        try:
            return Service(said.name, version, platform, form, lanes, tables=tables, at_once=said.parallel)
        except BadConfig as error:
            raise BadConfig(f"{self._said.service_file} {error.place}", error.found, error.expected) from error

    def _lane(self, made: Plan, stack: AsyncExitStack) -> Lane:
        for step in made.steps:
            stack.callback(step.node.op.close)
            try:
                step.node.op.open()
            except BadConfig as error:
                place = self._place_of(made, step)
                raise BadConfig(f"{place} {error.place}", error.found, error.expected) from error
            except ServingError:
                raise
            except Exception as error:  # the op may be the user's
                place = self._place_of(made, step)
                log.exception("%s cannot be opened", place)
                raise BadConfig(place, f"{type(error).__name__}: {error}", "an op that opens") from error
        executor = Executor(made, self._threads)
        place = f"{self._said.workflow_file} workflow {made.name!r} batch"
        usual = in_flight_limits(self._usual, executor)
        return Lane(executor, limits_of(self._said.workflows[made.name].batch, place, usual))

    def _place_of(self, made: Plan, step: Step) -> str:
        return f"{self._said.workflow_file} workflow {made.name!r} node {step.node.name!r}"

    def _form(self, built: Sequence[Built], place: str, more: Mapping[str, Port] | None = None) -> Form:
        """What a request of a service must hold: what any of its workflows takes, and more."""
        ports: dict[str, Port] = dict(more or {})
        lookups: dict[tuple[str, str], Lookup] = {}  # by keys and feed: several may be of the same keys
        lengths: dict[str, str] = {}
        for each in built:
            for name, port in each.plan.request.items():
                if ports.setdefault(name, port) != port:
                    raise BadConfig(
                        f"{place} input {name!r}", f"{ports[name]}, and {port}", "the same in all workflows"
                    )
            lookups |= {(lookup.keys, lookup.feed): lookup for lookup in each.lookups}
            lengths |= each.lengths
        of_lookups = {name for lookup in lookups.values() for name in (lookup.keys, lookup.weights)}
        return Form(
            {name: port for name, port in ports.items() if name not in of_lookups},
            list(lookups.values()),
            max_samples=self._shared.max_samples,
            max_keys=self._shared.max_keys,
            finite=bool(lookups),
            lengths=lengths,
        )

    def _workflow(self, said: Workflow) -> Built:
        file = self._said.workflow_file
        resources = _Resources(self._shared, self._said.engines, self._models, file.parent)
        place = f"workflow {said.name!r}"
        try:
            declared = _declared(said, place)
            # Without the file: what nodes say while they run is for callers, too, and where files lie is not.
            nodes = [made for node in said.nodes for made in self._nodes(node, place, resources)]
            used = tuple(resources.used.values())
            lookups = tuple({(k.keys, k.feed): k for model in used for k in model.lookups}.values())
            of_lookups = {lookup.keys for lookup in lookups} | {lookup.weights or "" for lookup in lookups}
            request = request_ports(place, nodes, declared, of_lookups)
            made = plan(said.name, nodes, request, kind_of(said), list(said.outputs) or None)
        except BadConfig as error:
            raise BadConfig(f"{file} {error.place}", error.found, error.expected) from error
        lengths = {name: f"{name}.lengths" for name, port in request.items() if port.ragged and name not in of_lookups}
        for model in used:
            lengths |= {name: length for name, length in model.lengths.items() if name in request}
        taken = tuple(lookup for lookup in lookups if request.get(lookup.keys) == keys_port(lookup))
        return Built(made, used, taken, lengths)

    def _nodes(self, said: DAGNode, workflow: str, resources: "_Resources") -> list[Node]:
        """The node that a configuration names, or the several that one of the ancestor's stands for."""
        place = f"{workflow} node {said.name!r}"
        config = settings_of(said, place)
        types = registry.series(said.type)
        if len(types) == 1:
            op = self._wrapped(said, self._op(said, types[0], config, place, resources), place)
            return [_node(said, said.name, op, dependencies_of(said, workflow))]
        model = {"model": config.pop("model")} if "model" in config else {}
        nodes: list[Node] = []
        given = dependencies_of(said, workflow)
        for at, type in enumerate(types):
            is_last = at == len(types) - 1
            one = DAGNode(name=said.name if is_last else f"{said.name}:{type}", type=type)
            op = self._op(one, type, {**model, **(config if is_last else {})}, place, resources)
            before = (Dependency(nodes[-1].name),) if nodes else ()
            nodes.append(_node(said, one.name, self._wrapped(said, op, place) if is_last else op, (*given, *before)))
        return nodes

    def _op(self, said: DAGNode, type: str, config: Mapping[str, Any], place: str, resources: "_Resources") -> Op:
        """type: said.type, by our own name."""
        apart = None
        if said.executor == DAGNode.PROCESS:
            told = {"type": said.type, "config": dict(config), "base": str(resources.base)}
            apart = OwnProcesses(_MADE_APART, told, said.concurrency, said.queue_size or _QUEUE, place=place)
        try:
            if apart is not None:
                apart.wanted()  # which makes the op: what its config lacks is told here, with the node
                return apart
            if type == "infer":
                config = {**resources.infer_config(config.get("model")), **config}
            return registry.make(said.type, config, resources)
        except BadConfig as error:
            raise BadConfig(f"{place} {error.place}", error.found, error.expected) from error

    def _wrapped(self, said: DAGNode, op: Op, place: str) -> Op:
        """The same, with threads of its own and batching where the node says so."""
        if said.concurrency and said.executor == DAGNode.THREAD:
            op = OwnThreads(op, said.concurrency, said.queue_size or _QUEUE, place=place)
        if said.HasField("batch"):
            usual = Limits(max_in_flight=said.concurrency or self._usual.max_in_flight)
            op = Gathered(op, limits_of(said.batch, f"{place} batch", usual), place=place)
        return op


def _node(said: DAGNode, name: str, op: Op, dependencies: tuple[Dependency, ...]) -> Node:
    inputs = {given.name: getattr(given, "from") for given in said.inputs}
    if (wanted := op.wanted()) is not None and name != said.name:
        inputs = {given: source for given, source in inputs.items() if given in wanted}
    return Node(
        name,
        op,
        dependencies,
        inputs=inputs,
        when=said.when,
        deadline_s=said.deadline_ms / 1e3 or None,
        is_apart=isinstance(op, OwnThreads | OwnProcesses | Gathered),
    )


def in_flight_limits(usual: Limits, executor: Executor) -> Limits:
    """The same, with more runs at once where some of them only wait."""
    more = MORE_WHERE_RUNS_WAIT if executor.can_wait else 0
    return replace(usual, max_in_flight=usual.max_in_flight + more)


def limits_of(said: BatchLimits, place: str, usual: Limits) -> Limits:
    """How requests become batches; raises BadConfig. usual: what is not said."""
    return Limits(
        max_rows=said.max_rows or usual.max_rows,
        max_delay_s=said.max_delay_ms / 1e3 if said.HasField("max_delay_ms") else usual.max_delay_s,
        preferred_rows=tuple(said.preferred_rows),
        allowed_rows=tuple(said.allowed_rows),
        max_waiting_rows=said.max_waiting_rows or usual.max_waiting_rows,
        max_in_flight=said.max_in_flight or usual.max_in_flight,
        is_on=usual.is_on and not said.off,
    ).checked(place)


def described(service: Service) -> str:
    """A service on one line, for people."""
    workflows = ", ".join(lane.plan.name for lane in service.lanes)
    takes = ", ".join(f"{tensor.name} {tensor.datatype} {shape_text(tensor.shape)}" for tensor in service.inputs)
    return f"{service.name} {service.version} ({workflows}; takes {takes})"


def outlined(service: Service) -> list[str]:
    """A service in lines: its workflows with the nodes of each stage, and what it takes and makes."""
    lines = [described(service)]
    for lane in service.lanes:
        stages = " → ".join(", ".join(step.node.name for step in stage) for stage in lane.plan.stages)
        lines.append(f"  workflow {lane.plan.name}, {lane.plan.kind.value}: {stages}")
    lines.append(f"  makes {', '.join(f'{name} {port}' for name, port in service.outputs.items())}")
    return lines


def _declared(said: Workflow, place: str) -> dict[str, Port]:
    """The inputs that a workflow declares; raises BadConfig."""
    ports: dict[str, Port] = {}
    for given in said.inputs:
        where = f"{place} input {given.name!r}"
        shape = tuple(given.shape) or (-1,)
        if not given.name or given.name in ports:
            raise BadConfig(where, "the name twice" if given.name else "no name", "every name once")
        if given.datatype not in (*DTYPES, "BYTES"):
            raise BadConfig(f"{where} datatype", repr(given.datatype), nearest(given.datatype, [*DTYPES, "BYTES"]))
        if any(size < -1 for size in shape):
            raise BadConfig(f"{where} shape", list(shape), "sizes, -1 where one varies")
        ports[given.name] = Port(given.datatype, shape, given.ragged)
    return ports


def _is_shared(settings: EngineSettings, other: EngineSettings) -> bool:
    """Whether one net in memory will do for two engines: all that makes a net another one is the same."""
    return not settings.callable and settings.of_the_net() == other.of_the_net()


async def _loaded(settings: EngineSettings, shared: models.Settings) -> Model:
    if settings.callable:
        return _called(settings)
    opener = partial(
        open_engine,
        engine=settings.engine,
        device=settings.device,
        threads=settings.threads,
        compile=settings.compile,
        memory_limit_mb=settings.memory_limit_mb,
        undecided=settings.warm_up is not None,
    )
    try:
        return replace(await models.load(settings.directory, shared, opener), name=settings.name)
    except BadConfig as error:
        raise BadConfig(f"{settings.place} {error.place}", error.found, error.expected) from error


def _called(settings: EngineSettings) -> Model:
    """A function as a model."""
    _find_modules_in(settings.directory)
    try:
        engine = CallableEngine(settings.callable, settings.inputs, settings.outputs)
    except BadConfig as error:
        raise BadConfig(f"{settings.place} {error.place}", error.found, error.expected) from error
    ports = {tensor.name: Port(tensor.datatype, tuple(tensor.shape)) for tensor in settings.inputs}
    return Model(name=settings.name, version="1", engine=engine, inputs=ports)


class _Resources:
    """What the ops of a workflow share: see predictor.ops.registry.Resources."""

    def __init__(
        self, settings: models.Settings, engines: Mapping[str, EngineSettings], found: Mapping[str, Model], base: Path
    ):
        self.settings, self._engines, self._models, self.base = settings, engines, found, base
        self.used: dict[str, Model] = {}

    def model(self, name: str | None) -> Model:
        """See Resources."""
        name = self._name(name)
        self.used[name] = self._models[name]
        return self._models[name]

    def path(self, name: str) -> Path:
        """See Resources."""
        return resolved(name, self.base)

    def infer_config(self, name: Any) -> dict[str, Any]:
        """What a model's engine says of its infer op."""
        settings = self._engines[self._name(name)]
        return {"nan": settings.nan, "threads": settings.run_threads, "part_rows": settings.part_rows}

    def _name(self, name: Any) -> str:
        if name is None:
            if len(self._models) != 1:
                found = f"none, and engines {', '.join(self._models)}" if self._models else "no engines"
                raise BadConfig(
                    "config 'model'", found, "one of them" if self._models else "one in a model_toolkit file"
                )
            return next(iter(self._models))
        if name not in self._models:
            raise BadConfig("config 'model'", repr(name), nearest(str(name), self._models))
        return str(name)


class _NoModels:
    """The resources of an op in a process of its own."""

    def __init__(self, base: Path):
        self._base = base

    @property
    def settings(self) -> models.Settings:
        """See Resources."""
        raise BadConfig("executor", "PROCESS for an op that needs a model", "THREAD")

    def model(self, name: str | None) -> Model:
        """See Resources."""
        raise BadConfig("executor", "PROCESS for an op that needs a model", "THREAD")

    def path(self, name: str) -> Path:
        """See Resources."""
        return resolved(name, self._base)


def made_apart(type: str, config: dict[str, Any], base: str) -> Op:
    """The op of a node, in a process of its own. base: directory of the workflow file."""
    return registry.make(type, config, _NoModels(Path(base)))


def _import_from(directory: Path, workflows: Sequence[Workflow] | Any) -> None:
    """Have modules beside the workflow file found, where a node names one. What is installed goes before them."""
    if any(":" in node.type for workflow in workflows for node in workflow.nodes):
        _find_modules_in(directory)


def _find_modules_in(directory: Path) -> None:
    for place in (str(directory.resolve()), str(Path.cwd())):
        if place not in sys.path:
            sys.path.append(place)
