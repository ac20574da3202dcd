"""Composition root of cube-server: settings → tables → service → port."""

import asyncio
import contextlib
import hmac
import logging
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from cube import kernels
from cube.control import SERVICE as CONTROL
from cube.control import CubeControl
from cube.errors import BadConfig, ServingError, Unauthenticated, to_wire
from cube.http_api import HttpApi, LegacyApi
from cube.keys import ShardRule
from cube.logs import Sparing
from cube.pb import cube_pb2
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rpc import health
from cube.rpc.calls import Call, Method, Reply
from cube.rpc.process import DOORS, Process, run
from cube.rpc.reflection import Reflection
from cube.rpc.router import Handler, Request, Response, Router
from cube.rpc.tls import Tls
from cube.service import DEFAULT_MAX_KEYS, SERVICE, CubeService
from cube.storage import index
from cube.storage.engines import ENGINES
from cube.storage.store import Store
from cube.table import Table, open_tables, touch
from cube.telemetry import Counts, Telemetry

log = logging.getLogger(__name__)

VERIFY = ("background", "first", "off")
MOST_WORKERS = 1_024  # more is a slip of the keyboard

_DESCRIBED = {SERVICE: cube_pb2.DESCRIPTOR, CONTROL: cube_pb2.DESCRIPTOR}
_REFUSALS_PER_S = 5  # that get a line each
_STRANGER = "{}: found no valid token, expected a bearer token"


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
    if "://" in settled.listen:
        raise BadConfig(f"shard {shard} address", settled.listen, "--listen host:port beside it: it names all replicas")
    settled.keep_versions = config.keep_versions or 2
    settled.max_keys = config.max_keys or DEFAULT_MAX_KEYS
    settled.verify = config.verify or "background"
    if settled.verify not in VERIFY:
        raise BadConfig("verify", repr(settled.verify), " or ".join(VERIFY))
    settled.grpc = config.grpc or DOORS[0]
    if settled.grpc not in DOORS:
        raise BadConfig("grpc", repr(settled.grpc), " or ".join(DOORS))
    settled.shard_rule = ShardRule.parse(config.shard_rule or ShardRule.MIX.text).text
    settled.workers = config.workers or 1
    if settled.workers > MOST_WORKERS:
        raise BadConfig("workers", settled.workers, f"at most {MOST_WORKERS}")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise BadConfig("TLS", "one of tls_cert and tls_key", "both or neither")
    if config.tls_client_ca and not config.tls_cert:
        raise BadConfig("tls_client_ca", "no tls_cert", "a certificate: without TLS nobody shows one")
    if settled.grpc != DOORS[0] and (settled.workers > 1 or config.tls_cert):
        raise BadConfig("grpc", f"{settled.grpc} with workers or TLS", f"{DOORS[0]}, which has that")
    return settled


def serve(config: CubeConfig, shard: int) -> None:
    """Serve until SIGINT or SIGTERM. `config` as `checked` returns it; raises BadConfig, DataCorrupt."""
    tls, tokens = _tls(config), _tokens(config)
    # Mapped and copied rows are shared by processes that are forked afterwards. Connections and threads are not.
    tables = open_shard(config, shard) if config.workers == 1 or _are_segments(config, shard) else None
    telemetry = Telemetry(config.workers)

    async def main(process: Process) -> None:
        mine = tables if tables is not None else open_shard(config, shard)
        touch(_stores(mine))  # each process has page tables of its own
        counts = telemetry.begin(process.worker, mine)
        service = CubeService(
            mine, shard, len(config.shard), config.max_keys,
            shard_rule=config.shard_rule, workers=config.workers, meter=counts.lookup, totals=telemetry.totals,
        )  # fmt: skip
        control = CubeControl(service, config, process)
        gate = Gate(tokens, counts)

        def count() -> None:
            if process.listener is not None:
                counts.port(process.listener)

        router = Router()
        api = HttpApi(service, telemetry, config.max_keys, count)
        for route in (*api.routes(), *LegacyApi(service, control, config.legacy_table, config.max_keys).routes()):
            router.add(route.method, route.pattern, gate.http(route.handler), max_body_bytes=route.max_body_bytes)
        # Made here, not by `serve`, so that it lies behind the gate as everything else does.
        reflection = Reflection({**_DESCRIBED, health.SERVICE: health.Health.FILE})
        handlers = {**service.handlers(), **control.handlers(), **reflection.handlers()}
        control.verify(_stores(mine))
        counting = asyncio.ensure_future(_every_second(count))
        try:
            await process.serve(
                {path: gate.grpc(method) for path, method in handlers.items()},
                config.listen,
                lambda bound: _announcement(bound, service),
                door=config.grpc,
                router=router,
                tls=tls,
                described=_DESCRIBED,
            )
            log.info("drained")
        finally:
            counting.cancel()
            control.stop()

    run(main, config.workers)


def open_shard(config: CubeConfig, shard: int) -> dict[str, Table]:
    """The tables that `config` names, for one shard, ready for lookups.

    Raises BadConfig for what cannot be served, DataCorrupt if they are to be verified first and fail.
    """
    rule = ShardRule.parse(config.shard_rule)
    tables = open_tables(Path(config.data), shard, len(config.shard), config.keep_versions, rule)
    if config.legacy_table and config.legacy_table not in tables:
        raise BadConfig("legacy_table", repr(config.legacy_table), f"one of {', '.join(tables)}")
    for store in _stores(tables):
        about = store.about
        shape = f"{len(store):,} rows × {about.dim} {about.row_format.text}"
        log.info("table %s %s opened: %s", about.table, about.version, shape)
        if config.in_memory:
            store.load()
        if config.verify == "first" and store.capabilities.verify:
            store.verify()
            log.info("table %s %s verified", about.table, about.version)
    kernels.warm(index.KERNELS, lambda: touch(_stores(tables)), log.info)
    return tables


def check(config: CubeConfig, shard: int) -> list[str]:
    """The names of the tables that `serve` would serve; raises what it would raise."""
    _tls(config)
    _tokens(config)
    return list(open_shard(config, shard))


def _stores(tables: dict[str, Table]) -> list[Store]:
    return [store for table in tables.values() for store in table.stores]


def _are_segments(config: CubeConfig, shard: int) -> bool:
    """Whether no other engine has a store of this shard, without opening any."""
    others = {engine.suffix for engine in ENGINES.values()} - {ENGINES["segment"].suffix}
    stores = Path(config.data).glob(f"[!.]*/*/{shard}-of-{len(config.shard)}.*")
    return not any(path.suffix in others for path in stores)


def _announcement(bound: str, service: CubeService) -> str:
    tables = ", ".join(
        f"{s.about.table} {s.about.version} ({len(s):,} rows × {s.about.dim} {s.about.row_format.text})"
        for s in _stores(service.tables)
    )
    return f"cube-server: shard {service.shard} of {service.shards} listening on {bound}, serves {tables}"


def _tls(config: CubeConfig) -> Tls | None:
    if not config.tls_cert:
        return None
    return Tls(config.tls_cert, config.tls_key, config.tls_client_ca or None)


async def _every_second(act: Callable[[], None]) -> None:
    while True:
        act()
        await asyncio.sleep(1.0)


# ---- at the door ----


class Tokens:
    """Whom we answer, whatever they ask, an operator's commands included: callers that show one of these."""

    def __init__(self, tokens: Iterable[bytes]):
        self._tokens = list(tokens)

    def admit(self, authorization: str | bytes) -> bool:
        """Whether a caller with this `authorization` field is one; takes the same time wherever tokens differ."""
        field = authorization.encode("utf-8", "replace") if isinstance(authorization, str) else authorization
        scheme, _, shown = field.partition(b" ")
        fits = [hmac.compare_digest(shown.strip(), token) for token in self._tokens]
        return scheme.lower() == b"bearer" and any(fits)


def _tokens(config: CubeConfig) -> Tokens | None:
    """Raises BadConfig for a file that cannot be read, or has no token, or what no header can carry."""
    if not config.token_file:
        return None
    path = Path(config.token_file)
    try:
        lines = path.read_bytes().split()
        mode = path.stat().st_mode
    except OSError as error:
        raise BadConfig(str(path), error.strerror or error, "a readable file of tokens, one a line") from error
    if not lines or any(not 0x21 <= byte <= 0x7E for line in lines for byte in line):
        raise BadConfig(str(path), f"{len(lines)} tokens", "at least one, of visible ASCII characters, one a line")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s: others than its owner may use it (mode %o): chmod 600", path, stat.S_IMODE(mode))
    return Tokens(lines)


def _refusal(path: str, peer: str, error: ServingError) -> tuple[str, dict[str, Any]]:
    """What the log's line about it says, and its facts."""
    code, text = error.wire.grpc, f"{path[:200]} from {peer}: {error}"
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{code}: {printable}", {"code": code, "path": path[:200], "peer": peer}


class Gate:
    """What every call passes but health checks: the token, the count of refusals, a line for them."""

    def __init__(self, tokens: Tokens | None, counts: Counts):
        self._tokens, self._counts = tokens, counts
        self._lines = Sparing(log, "refused", _REFUSALS_PER_S)

    def grpc(self, method: Method) -> Method:
        """The same method, behind the gate."""
        handler, tokens, refused = method.handler, self._tokens, self._refused

        def answer(message: Any, call: Call) -> Any:
            try:
                if tokens is not None and not tokens.admit(call.metadata.get("authorization", b"")):
                    raise Unauthenticated(_STRANGER.format(call.path))
                reply: Any = handler(message, call)
            except Exception as error:
                refused(call.path, call.peer, error)
                raise
            if type(reply) is list or type(reply) is bytes:
                return reply
            if method.kind.gives_stream:
                return self._replies(reply, call)
            return self._later(reply, call.path, call.peer) if hasattr(reply, "__await__") else reply

        return Method(answer, method.kind, method.max_request_bytes)

    def http(self, handler: Handler) -> Handler:
        """The same handler, behind the gate."""

        def answer(request: Request) -> Any:
            if self._tokens is not None and not self._tokens.admit(request.headers.get("authorization", "")):
                error = Unauthenticated(_STRANGER.format(request.path))
                self._refused(request.path, request.peer, error)
                body = b'{"error":"found no valid token, expected a bearer token"}'
                return Response(401, body, headers=[("www-authenticate", "Bearer")])
            try:
                response: Any = handler(request)
            except Exception as error:
                self._refused(request.path, request.peer, error)
                raise
            return response if isinstance(response, Response) else self._later(response, request.path, request.peer)

        return answer

    async def _later(self, reply: Awaitable[Any], path: str, peer: str) -> Any:
        try:
            return await reply
        except Exception as error:
            self._refused(path, peer, error)
            raise

    async def _replies(self, replies: Any, call: Call) -> AsyncIterator[Reply]:
        try:
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    yield reply
        except Exception as error:
            self._refused(call.path, call.peer, error)
            raise

    def _refused(self, path: str, peer: str, error: Exception) -> None:
        self._counts.refusal(to_wire(error).code)
        if not isinstance(error, ServingError):  # whoever catches it logs it
            return
        self._lines.warning(lambda: _refusal(path, peer, error))
