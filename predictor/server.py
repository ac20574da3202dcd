"""Composition root of predictor-server: settings → cube → models → service → doors → port."""

import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from cube.cluster import Access, open_cube
from cube.errors import BadConfig
from cube.rpc.process import DOORS, Process, run
from predictor import models
from predictor.doors.kserve import KServeDoor
from predictor.pb import kserve_pb2
from predictor.pb.predictor_config_pb2 import PredictorConfig
from predictor.service import InferenceService

log = logging.getLogger(__name__)

COMPUTE = "compute"  # name of the compute threads


def checked(config: PredictorConfig) -> PredictorConfig:
    """The settings with defaults filled in; raises BadConfig for what cannot be served."""
    settled = PredictorConfig()
    settled.CopyFrom(config)
    if not config.model:
        raise BadConfig("model", "none", "a directory that prune-program wrote: --model DIR")
    settled.listen = config.listen or "127.0.0.1:8500"
    settled.max_samples = config.max_samples or 65_536
    settled.max_keys = config.max_keys or 4 << 20
    settled.cube_wait_s = config.cube_wait_s or 30
    settled.cube_timeout_ms = config.cube_timeout_ms or 2_000
    settled.compute_threads = config.compute_threads or os.cpu_count() or 1
    settled.grpc = config.grpc or DOORS[0]
    if settled.grpc not in DOORS:
        raise BadConfig("grpc", repr(settled.grpc), " or ".join(DOORS))
    return settled


def serve(config: PredictorConfig) -> None:
    """Serve until SIGINT or SIGTERM. `config` as `checked` returns it."""

    async def main(process: Process) -> None:
        async with _models(config) as loaded:
            handlers = KServeDoor(InferenceService(loaded)).handlers()
            await process.serve(
                handlers,
                config.listen,
                lambda bound: _announcement(bound, loaded),
                door=config.grpc,
                described={"inference.GRPCInferenceService": kserve_pb2.DESCRIPTOR},
            )

    run(main)


async def check(config: PredictorConfig) -> list[models.Model]:
    """Load everything, serve nothing."""
    async with _models(config) as loaded:
        return loaded


@asynccontextmanager
async def _models(config: PredictorConfig) -> AsyncIterator[list[models.Model]]:
    """The models that `config` names, loaded; released when the block ends."""
    cube = None
    if config.cube:
        tls = config.cube_tls_ca, config.cube_tls_cert, config.cube_tls_key
        cube = open_cube(config.cube, Access.of(config.cube_token_file, *tls), cache_bytes=config.cube_cache_mb << 20)
    loaded: list[models.Model] = []
    threads = ThreadPoolExecutor(config.compute_threads, COMPUTE)
    settings = models.Settings(
        threads=threads,
        cube=cube,
        max_samples=config.max_samples,
        max_keys=config.max_keys,
        cube_timeout_s=config.cube_timeout_ms / 1e3,
        cube_wait_s=config.cube_wait_s,
    )
    try:
        for directory in config.model:
            log.info("loading %s", directory)
            model = await models.load(Path(directory), settings)
            loaded.append(model)
            if any(model.name == other.name for other in loaded[:-1]):
                raise BadConfig(directory, f"model {model.name!r} again", "another name")
        yield loaded
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for model in loaded:
            await model.close()
        if cube:
            await cube.close()


def is_computing() -> bool:
    """Whether a run goes on in a compute thread, for a caller whose call was given up when the drain was over."""
    workers = [thread for thread in threading.enumerate() if thread.name.startswith(COMPUTE)]
    for worker in workers:
        worker.join(0.1)
    return any(worker.is_alive() for worker in workers)


def _announcement(bound: str, loaded: list[models.Model]) -> str:
    return f"predictor-server: listening on {bound}, serves {'; '.join(map(models.describe, loaded))}"
