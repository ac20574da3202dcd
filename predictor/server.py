"""Composition root of predictor-server: settings → cube → models → service → doors → port."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor as Threads
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from cube.cluster import Access, open_cube
from cube.errors import BadConfig
from cube.rpc.process import DOORS, Process, run
from cube.rpc.router import Router
from cube.rpc.sockets import host_and_port
from predictor import models
from predictor.assembly import Assembly, described, in_flight_limits
from predictor.batching import Limits
from predictor.config import Settings
from predictor.doors.debug import DebugDoor
from predictor.doors.kserve import KServeDoor
from predictor.doors.rest import RestDoor
from predictor.executor import Executor
from predictor.pb import kserve_pb2
from predictor.pb.predictor_config_pb2 import PredictorConfig
from predictor.pb.serving_config_pb2 import InferService
from predictor.profile.metrics import Metrics
from predictor.profile.snapshot import snapshot
from predictor.profile.watch import Watch, watched
from predictor.service import InferenceService, Lane, Service
from predictor.warming import warm_up
from predictor.workflow import plan

log = logging.getLogger(__name__)

COMPUTE = "compute"  # name of the compute threads


def checked(config: PredictorConfig, said: Settings | None = None) -> PredictorConfig:
    """The settings with defaults filled in; raises BadConfig for what cannot be served.

    said: what a directory of configuration says beside them.
    """
    settled = PredictorConfig()
    settled.CopyFrom(config)
    if not config.model and said is None:
        raise BadConfig("model", "none", "a directory that prune-program wrote: --model DIR")
    settled.listen = config.listen or (said.listen if said else "127.0.0.1:8500")
    if not settled.listen.startswith("unix:"):
        host_and_port(settled.listen)
    settled.cube = config.cube or (said.cube if said else "")
    settled.max_samples = config.max_samples or 65_536
    settled.max_keys = config.max_keys or 4 << 20
    settled.cube_wait_s = config.cube_wait_s or 30
    settled.cube_timeout_ms = config.cube_timeout_ms or 2_000
    settled.compute_threads = config.compute_threads or (said.compute_threads if said else 0) or os.cpu_count() or 1
    settled.grpc = config.grpc or DOORS[0]
    if settled.grpc not in DOORS:
        raise BadConfig("grpc", repr(settled.grpc), " or ".join(DOORS))
    if settled.batching not in ("", "adaptive", "off"):
        raise BadConfig("batching", repr(settled.batching), "adaptive or off")
    return settled


def serve(config: PredictorConfig, said: Settings | None = None) -> None:
    """Serve until SIGINT or SIGTERM. `config` as `checked` returns it."""

    async def main(process: Process) -> None:
        async with _services(config, said) as services:
            inference = InferenceService([service for service, _ in services])
            router = Router()
            metrics = Metrics(
                lambda: snapshot(inference.services.values(), inference.not_served), lambda: process.listener
            )
            DebugDoor(inference, metrics, config.allow_recording).add_to(router)
            RestDoor(inference).add_to(router)
            watch_of = partial(_watch_of, config, said)
            async with watched(inference.services.values(), watch_of, config.otel_endpoint):
                await process.serve(
                    KServeDoor(inference).handlers(),
                    config.listen,
                    lambda bound: _announcement(bound, [told for _, told in services]),
                    door=config.grpc,
                    router=router,
                    described={"inference.GRPCInferenceService": kserve_pb2.DESCRIPTOR},
                )

    run(main)


def _watch_of(config: PredictorConfig, said: Settings | None, service: Service) -> Watch:
    """How a service is watched: as its own settings say, else as those of the process do."""
    own = {each.name: each for each in said.services}.get(service.name, InferService()) if said else InferService()
    return Watch(
        (own.slow_request_ms or config.slow_request_ms) / 1e3,
        own.tracer_interval_s or config.tracer_interval_s,
        Path(config.tracer_file) if config.tracer_file else None,
    )


async def check(config: PredictorConfig, said: Settings | None = None) -> list[Service]:
    """Load everything, serve nothing."""
    async with _services(config, said) as services:
        return [service for service, _ in services]


@asynccontextmanager
async def _services(config: PredictorConfig, said: Settings | None) -> AsyncIterator[list[tuple[Service, str]]]:
    """The services that `said` describes and one for each model that `config` names, warm, each with a line about it;
    released when the block ends."""
    cube = None
    if config.cube:
        tls = config.cube_tls_ca, config.cube_tls_cert, config.cube_tls_key
        cube = open_cube(config.cube, Access.of(config.cube_token_file, *tls), cache_bytes=config.cube_cache_mb << 20)
    threads = ThreadPoolExecutor(config.compute_threads, COMPUTE)
    settings = models.Settings(
        cube=cube,
        max_samples=config.max_samples,
        max_keys=config.max_keys,
        cube_timeout_s=config.cube_timeout_ms / 1e3,
        cube_wait_s=config.cube_wait_s,
        threads=threads,
    )
    async with AsyncExitStack() as stack:
        if cube:
            stack.push_async_callback(cube.close)
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        services: dict[str, tuple[Service, str]] = {}
        if said is not None:
            assembly = Assembly(said, settings, threads, _limits(config))
            await assembly.load(stack)
            made = asyncio.get_running_loop().run_in_executor(threads, assembly.services, stack)
            for service in await made:  # not on the loop, which hears signals meanwhile
                await assembly.warm_up(service)
                services[service.name] = service, described(service)
        for directory in config.model:
            log.info("loading %s", directory)
            model = await models.load(Path(directory), settings)
            stack.push_async_callback(model.close)
            if model.name in services:
                raise BadConfig(directory, f"model {model.name!r} again", "another name")
            service = _derived(model, settings, threads, config, stack)
            await warm_up(service, [model], threads, knows=bool(model.tables))
            services[model.name] = service, models.describe(model, service.inputs)
        yield list(services.values())


def _derived(
    model: models.Model, settings: models.Settings, threads: Threads, config: PredictorConfig, stack: AsyncExitStack
) -> Service:
    """The service of a model that no configuration says anything of."""
    form, nodes = model.form(settings), model.nodes(settings)
    for node in nodes:
        stack.callback(node.op.close)
        node.op.open()
    executor = Executor(plan(model.name, nodes, form.ports), threads)
    lane = Lane(executor, in_flight_limits(_limits(config), executor))
    return Service(model.name, model.version, model.engine.platform, form, [lane], tables=model.tables)


def _limits(config: PredictorConfig) -> Limits:
    """How requests become batches, where a workflow does not say it."""
    return Limits(
        max_rows=config.batch_max_samples or Limits.max_rows,
        max_delay_s=config.batch_max_delay_ms / 1e3,
        max_waiting_rows=max(config.max_samples, Limits.max_waiting_rows),
        max_in_flight=config.compute_threads,
        is_on=config.batching != "off",
    )


def is_computing() -> bool:
    """Whether a run goes on in a compute thread, for a caller whose call was given up when the drain was over."""
    workers = [thread for thread in threading.enumerate() if thread.name.startswith(COMPUTE)]
    for worker in workers:
        worker.join(0.1)
    return any(worker.is_alive() for worker in workers)


def _announcement(bound: str, served: list[str]) -> str:
    return f"predictor-server: listening on {bound}, serves {'; '.join(served)}"
