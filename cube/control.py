"""What operators do to a server that runs: load, switch and unload versions of tables, drain.

A command is carried out by all workers or by none (`Process.tell`): everything that takes time or can fail comes first,
in every worker and beside what is served; then all of them take it over, which is a matter of references. A reply comes
when that is done. There is one command at a time; a second one is refused at once, as Overloaded. A caller who goes
away, or whose deadline passes, does not stop a command.
"""

import asyncio
import logging
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cube.errors import BadRequest, DataCorrupt, FailedPrecondition, NotServed, Unavailable
from cube.keys import ShardRule
from cube.pb import cube_pb2 as pb
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rpc.calls import Buffer, Call, Handler, Method, parse
from cube.rpc.process import Command, Prepared, Process
from cube.service import CubeService
from cube.storage.store import Store
from cube.table import Table, Verification, open_version, touch
from cube.version import Version

log = logging.getLogger(__name__)

SERVICE = "cube_serving.cube.CubeControl"
REQUEST_BYTES = 64 << 10  # of a request: a name and two numbers
_BEGIN_S = 1.0  # by when a lookup that was asked for has begun
_DONE = {"load": "loaded", "switch": "is current now", "unload": "unloaded", "reload": "loaded, and is current now"}


class CubeControl:
    """The commands, as they come and as this process carries them out. Owned by the event loop."""

    def __init__(self, service: CubeService, config: CubeConfig, process: Process):
        """config: as `server.checked` returns it; process: this becomes the one that obeys in it."""
        self.busy = False  # a command is being prepared here
        self._service, self._config, self._process = service, config, process
        self._verifying: dict[Store, Verification] = {}  # until it is done with the store, which is held so long
        self._stop = threading.Event()
        process.obey(self._prepare, self._hear)

    def handlers(self) -> dict[str, Method]:
        """By gRPC path."""
        methods: dict[str, Handler] = {
            "Load": self._load,
            "Switch": self._switch,
            "Unload": self._unload,
            "Drain": self._drain,
        }
        return {f"/{SERVICE}/{name}": Method(do, max_request_bytes=REQUEST_BYTES) for name, do in methods.items()}

    # ---- commands ----

    async def load(self, table: str, version: Version) -> None:
        """Open a version beside the others, as the server's settings say; one that is open already is left as it is.

        Raises NotServed for a table that is not served here or a version that is not under `data`, BadConfig for one
        built for other shards, DataCorrupt, Overloaded; of another worker as StatusError. Then nothing has changed.
        """
        await self._tell("load", table, version)

    async def switch(self, table: str, version: Version) -> None:
        """Have lookups that name no version read this one, which must be open; raises NotServed, Overloaded."""
        await self._tell("switch", table, version)

    async def unload(self, table: str, version: Version) -> None:
        """Close a version once no lookup reads it. Raises NotServed, Overloaded, FailedPrecondition for
        the current one."""
        await self._tell("unload", table, version)

    async def reload(self, table: str, version: Version) -> None:
        """Load a version, switch to it and unload the one that was current, in one; raises as `load`."""
        await self._tell("reload", table, version)

    async def _tell(self, action: str, table: str, version: Version) -> None:
        self._table(table)  # before anybody is told: a name may be as long as a request
        await self._process.tell({"action": action, "table": table, "version": str(version)})
        log.info("table %s %s %s", table, version, _DONE[action])

    # ---- gRPC ----

    async def _load(self, message: Buffer, call: Call) -> bytes:
        await self.load(*_named(message))
        return self._service.facts().SerializeToString()

    async def _switch(self, message: Buffer, call: Call) -> bytes:
        await self.switch(*_named(message))
        return self._service.facts().SerializeToString()

    async def _unload(self, message: Buffer, call: Call) -> bytes:
        await self.unload(*_named(message))
        return self._service.facts().SerializeToString()

    def _drain(self, message: Buffer, call: Call) -> bytes:
        parse(pb.DrainRequest, message)
        log.info("asked to drain by %s", call.peer)
        self._process.end()
        return pb.DrainReply().SerializeToString()

    # ---- a command in this process ----

    async def _prepare(self, command: Command) -> Prepared:
        table, version = self._table(command["table"]), Version.parse(command["version"])
        match command["action"]:
            case "load":
                return await self._prepare_load(table, version)
            case "switch":
                table.store(version)
                return Prepared(partial(table.switch, version))
            case "unload":
                if table.store(version).about.version == table.current:
                    text = f"table {table.name!r} version {version}: found the current one, expected another"
                    raise FailedPrecondition(f"{text}; switch first")
                return Prepared(partial(self._remove, table, version))
            case "reload":
                load = await self._prepare_load(table, version)
                return Prepared(partial(self._replace, table, version, load), load.abandon)
        raise AssertionError(command)

    def _table(self, name: str) -> Table:
        table = self._service.tables.get(name)
        if table is None:
            raise NotServed(f"table {name!r}", sorted(self._service.tables))
        return table

    async def _prepare_load(self, table: Table, version: Version) -> Prepared:
        if version in table.versions:
            return Prepared(lambda: None)
        self.busy = True
        try:
            store = await asyncio.to_thread(self._open, table.name, version)
        finally:
            self.busy = False
        return Prepared(partial(self._admit, table, store), store.close)

    def _open(self, table: str, version: Version) -> Store:
        """In a thread."""
        config = self._config
        rule = ShardRule.parse(config.shard_rule)
        store = open_version(Path(config.data), table, version, self._service.shard, self._service.shards, rule)
        try:
            if config.in_memory and config.workers == 1:  # memory filled now would be every worker's own
                store.load()
            if config.verify == "first" and store.capabilities.verify and self._process.worker == 0:
                store.verify(self._go_on)
                log.info("table %s %s verified", table, version)
            touch([store])
        except BaseException:
            store.close()
            raise
        return store

    def _go_on(self, bytes_read: int) -> None:
        if self._stop.is_set():
            raise Unavailable("the server is stopping")

    def _admit(self, table: Table, store: Store) -> None:
        table.add(store)
        if self._config.verify == "first" and store.capabilities.verify:
            store.checked = "yes"  # worker 0 could not have prepared it otherwise, and the file is the same
        self.verify([store])

    def _replace(self, table: Table, version: Version, load: Prepared) -> None:
        before = table.current
        load.commit()
        table.switch(version)
        if version != before:
            self._remove(table, before)

    def _remove(self, table: Table, version: Version) -> None:
        """Lookups that have found the store may not have begun to read it, and so not hold it yet: it is held for
        them."""
        store = table.store(version)
        table.hold(store)
        table.remove(version)
        if store in self._verifying:
            self._verifying[store].drop(store)
        asyncio.get_running_loop().call_later(_BEGIN_S, table.release, store)

    # ---- verification in the background ----

    def verify(self, stores: Iterable[Store]) -> None:
        """Where the settings say so, compare the stores' checksums in a thread of worker 0; the others hear of it."""
        if self._config.verify != "background" or self._process.worker != 0:
            return
        stores = [store for store in stores if store.capabilities.verify]
        loop = asyncio.get_running_loop()
        verification = Verification(stores, lambda *found: loop.call_soon_threadsafe(self._on_verified, *found))
        for store in stores:
            self._service.tables[store.about.table].hold(store)
            self._verifying[store] = verification
        verification.start()

    def stop(self) -> None:
        """End what runs in threads."""
        self._stop.set()
        for verification in set(self._verifying.values()):
            verification.stop()

    def _on_verified(self, store: Store, error: DataCorrupt | None) -> None:
        about = store.about
        del self._verifying[store]
        self._service.tables[about.table].release(store)
        if store.checked in ("yes", "corrupt"):
            found = None if error is None else [error.place, error.found, error.expected]
            self._process.spread({"table": about.table, "version": str(about.version), "found": found})

    def _hear(self, news: Command) -> None:
        """What the verification of a file, which is the same for all workers, has come to."""
        table, version, found = self._service.tables[news["table"]], Version.parse(news["version"]), news["found"]
        if version in table.versions:  # it may have been unloaded
            store = table.store(version)
            if found is None:
                store.checked = "yes"
            else:
                store.set_corrupt(DataCorrupt(*found))


def _named(message: Buffer) -> tuple[str, Version]:
    request = parse(pb.VersionRequest, message)
    if not request.HasField("version"):
        raise BadRequest(f"table {request.table!r} version", "none", "base and delta")
    return request.table, Version.parse(f"{request.version.base}@{request.version.delta}")
