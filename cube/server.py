"""Composition root of cube-server: settings → tables → service → port."""

import logging
from pathlib import Path

import numpy as np

from cube import kernels
from cube.errors import BadConfig
from cube.pb import cube_pb2
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rpc.process import DOORS, Process, run
from cube.service import DEFAULT_MAX_KEYS, CubeService
from cube.storage import index
from cube.table import Table, Verification, open_tables

log = logging.getLogger(__name__)

VERIFY = ("background", "first", "off")


def checked(config: CubeConfig, shard: int) -> CubeConfig:
    """The settings with defaults filled in; raises BadConfig for what cannot be served."""
    settled = CubeConfig()
    settled.CopyFrom(config)
    if not 0 <= shard < len(config.shard):
        raise BadConfig("--shard", shard, f"0 to {len(config.shard) - 1}: the cube has {len(config.shard)} shards")
    settled.data = config.data or "cube-data"
    settled.listen = config.listen or config.shard[shard].address
    if not settled.listen:
        raise BadConfig(f"shard {shard}", "no address", "an address in the configuration, or --listen host:port")
    settled.keep_versions = config.keep_versions or 2
    settled.max_keys = config.max_keys or DEFAULT_MAX_KEYS
    settled.verify = config.verify or "background"
    if settled.verify not in VERIFY:
        raise BadConfig("verify", repr(settled.verify), " or ".join(VERIFY))
    settled.grpc = config.grpc or DOORS[0]
    if settled.grpc not in DOORS:
        raise BadConfig("grpc", repr(settled.grpc), " or ".join(DOORS))
    return settled


def serve(config: CubeConfig, shard: int, tables: dict[str, Table]) -> None:
    """Serve until SIGINT or SIGTERM. `config` as `checked` returns it."""

    async def main(process: Process) -> None:
        kernels.warm(index.KERNELS, lambda: _touch(tables), log.info)
        service = CubeService(tables, shard, len(config.shard), config.max_keys)
        verification = Verification(store for table in tables.values() for store in table.stores)
        if config.verify == "background":
            verification.start()
        try:
            await process.serve(
                service.handlers(),
                config.listen,
                lambda bound: _announcement(bound, service),
                door=config.grpc,
                described={"cube_serving.cube.Cube": cube_pb2.DESCRIPTOR},
            )
        finally:
            verification.stop()

    run(main)


def _announcement(bound: str, service: CubeService) -> str:
    tables = ", ".join(
        f"{s.about.table} {s.about.version} ({len(s):,} rows × {s.about.dim} {s.about.row_format.text})"
        for t in service.tables.values()
        for s in t.stores
    )
    return f"cube-server: shard {service.shard} of {service.shards} listening on {bound}, serves {tables}"


def _touch(tables: dict[str, Table]) -> None:
    """One lookup per store, straight at it so that nothing is counted. Keys are read-only as on the wire."""
    for table in tables.values():
        for store in table.stores:
            row = np.empty((1, store.about.dim), np.float32)
            store.lookup(np.frombuffer(bytes(8), np.uint64), row, np.empty(1, np.bool_))


def open_shard(config: CubeConfig, shard: int) -> dict[str, Table]:
    """The tables that `config` names, for one shard; raises DataCorrupt if they are to be verified first and fail."""
    tables = open_tables(Path(config.data), shard, len(config.shard), config.keep_versions)
    for store in (store for table in tables.values() for store in table.stores):
        if config.in_memory:
            store.load()
        if config.verify == "first" and store.capabilities.verify:
            store.verify()
    return tables
