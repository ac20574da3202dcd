"""Where a cube is: a configuration file, the ancestor's `cube.conf`, a list of addresses, or a directory of files.

conf/cube.prototxt                              one entry per shard, each with its replicas
cube.conf                                       the ancestor's JSON; its tables may be on servers of their own
10.0.0.1:8010|10.0.0.2:8010,10.0.0.3:8010       shards separated by commas, replicas of a shard by |
dns://cube-0:8010,file:///run/cube-1            the same with names and watched files: see cube.rpc.naming
cube-data/                                      the files themselves, opened in this process
"""

import asyncio
import math
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from cube.client import Answer, Ask, Cube, LocalCube, RemoteCube
from cube.config import read
from cube.errors import BadConfig, NotServed
from cube.keys import ShardRule
from cube.pb.cube_config_pb2 import CubeConfig, ReplicasConfig
from cube.rpc.channel import tls_context
from cube.rpc.naming import Naming
from cube.rpc.routing import Options, Policy
from cube.version import Version


class Cluster(NamedTuple):
    """The servers of one cube."""

    shards: tuple[str, ...]  # where each shard's replicas are, as cube.rpc.naming reads it
    rule: ShardRule
    options: Options
    most_timeout_s: float = math.inf  # of one call to a shard


def cluster_at(where: str) -> Cluster:
    """The servers that a text or a file names; raises BadConfig, also for what is no such thing."""
    if where.endswith(".prototxt"):
        config = read(Path(where), CubeConfig())
        rule = ShardRule.parse(config.shard_rule or ShardRule.MIX.text, f"{where} shard_rule")
        timeout_s = config.replicas.timeout_ms / 1e3 or math.inf
        targets = tuple(shard.address for shard in config.shard)
        return _checked(where, Cluster(targets, rule, _options(where, config.replicas), timeout_s))
    if "list://" in where:
        raise BadConfig("cube", repr(where), "shards separated by commas, replicas of a shard by |")
    shards = [_alternatives(part) for part in where.split(",")]
    return _checked("cube", Cluster(tuple(shards), ShardRule.MIX, Options()))


def clusters_at(where: str) -> dict[str | None, Cluster]:
    """The servers of each table that has its own; under None those of a cube that holds all tables."""
    if is_legacy(where):
        return {name: cluster for name, cluster in legacy_tables(Path(where)).items()}  # noqa: C416 - keys may be None
    return {None: cluster_at(where)}


def is_legacy(where: str) -> bool:
    """Whether a text names a file of the ancestor's."""
    return "://" not in where and "," not in where and where.endswith((".conf", ".json"))


def _options(where: str, said: ReplicasConfig) -> Options:
    options = Options()
    if said.policy:
        policies = {policy.value: policy for policy in Policy}
        if said.policy not in policies:
            raise BadConfig(f"{where} replicas policy", repr(said.policy), ", ".join(policies))
        options = replace(options, policy=policies[said.policy])
    if said.HasField("retries"):
        options = replace(options, retries=said.retries)
    if said.hedge:
        options = replace(options, hedge=said.hedge)
    if said.hedge_share:
        options = replace(options, hedge_share=said.hedge_share)
    return options


class Access(NamedTuple):
    """How servers are spoken to."""

    token: str = ""  # what they demand to see
    tls: ssl.SSLContext | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To send with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @classmethod
    def of(cls, token_file: str = "", ca: str = "", certificate: str = "", key: str = "") -> "Access":
        """From files, none of which has to be; raises BadConfig.

        token_file: its first line counts. ca: PEM of whom to trust, or "system"; this or a certificate turns TLS on.
        """
        tls = None
        if ca or certificate:
            try:
                tls = tls_context(None if ca in ("", "system") else ca, certificate or None, key or None)
            except OSError as error:  # ssl.SSLError is one
                place = ", ".join(filter(None, (ca, certificate, key)))
                raise BadConfig(place, error.strerror or error, "PEM files") from error
        elif key:
            raise BadConfig(key, "a key without a certificate", "both, or neither")
        return cls(_token_in(token_file) if token_file else "", tls)


def _token_in(path: str) -> str:
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(path, getattr(error, "strerror", None) or error, "a file with a token") from error
    token = lines[0].strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise BadConfig(path, f"{len(token)} characters", "one word of printable ASCII in the first line")
    return token


OPEN = Access()  # servers that demand nothing


def open_cube(where: str, access: Access = OPEN, *, cache_bytes: int = 0) -> Cube:
    """The cube that a text names: see above. Raises BadConfig, DataCorrupt.

    cache_bytes: memory for rows of servers that are asked for often; 0 for no cache.
    """
    if Path(where).is_dir():
        return LocalCube(Path(where))
    clusters = clusters_at(where)
    if None in clusters:
        return _remote(clusters[None], access, cache_bytes)
    each = cache_bytes // len(clusters)
    return Cubes({str(name): _remote(cluster, access, each) for name, cluster in clusters.items()})


def _remote(cluster: Cluster, access: Access, cache_bytes: int) -> RemoteCube:
    return RemoteCube(
        cluster.shards,
        shard_rule=cluster.rule,
        options=cluster.options,
        cache_bytes=cache_bytes,
        metadata=access.metadata,
        tls=access.tls,
        most_timeout_s=cluster.most_timeout_s,
    )


def _alternatives(part: str) -> str:
    """host:port|host:port as a list:// target."""
    return "list://" + part.replace("|", ",") if "|" in part else part


def _checked(place: str, cluster: Cluster) -> Cluster:
    if not cluster.shards or not all(cluster.shards):
        what = "no shards" if not cluster.shards else f"no address of shard {cluster.shards.index('')}"
        raise BadConfig(place, what, "an address for each shard")
    for target in cluster.shards:
        Naming.parse(target)
    return cluster


class Cubes(Cube):
    """Tables that are on servers of their own each, as one cube.

    Shards that do not answer are reported by their numbers, whichever table's they are.
    """

    def __init__(self, by_table: Mapping[str, Cube]):
        self._by_table = dict(by_table)

    def __str__(self) -> str:
        return f"cubes of {len(self._by_table)} tables"

    async def open(self, tables: Mapping[str, tuple[Version, int]], wait_s: float, absent_zeros: bool = True) -> None:
        await asyncio.gather(
            *(self._of(name).open({name: wanted}, wait_s, absent_zeros) for name, wanted in tables.items())
        )

    async def lookup(self, asks: Sequence[Ask], timeout_s: float, *, partial: bool = False) -> Answer:
        cubes = [self._of(ask.table) for ask in asks]
        answers = await asyncio.gather(
            *(cube.lookup([ask], timeout_s, partial=partial) for cube, ask in zip(cubes, asks, strict=True))
        )
        unavailable = {shard: error for answer in answers for shard, error in answer.unavailable.items()}
        return Answer([answer.tables[0] for answer in answers], unavailable)

    async def close(self) -> None:
        await asyncio.gather(*(cube.close() for cube in self._by_table.values()))

    def _of(self, table: str) -> Cube:
        cube = self._by_table.get(table)
        if cube is None:
            raise NotServed(f"table {table!r}", sorted(self._by_table))
        return cube


# ---- the ancestor's cube.conf ----


class _Node(msgspec.Struct, forbid_unknown_fields=True):
    ip: str | None = None
    port: int | str | None = None
    ipport_list: str | None = None


class _Dict(msgspec.Struct, forbid_unknown_fields=True):
    dict_name: str
    shard: int
    dup: int
    timeout: int  # ms, of a call
    retry: int
    backup_request: int  # ms after which a second replica is asked too; 0: never
    type: Literal["ipport", "ipport_list", "ipport_parallel"]
    nodes: list[_Node]
    load_balancer: str = "rr"


_POLICIES = {
    "rr": Policy.ROUND_ROBIN, "wrr": Policy.WEIGHTED, "random": Policy.ROUND_ROBIN, "wr": Policy.WEIGHTED,
    "la": Policy.LEAST_LOADED, "c_murmurhash": Policy.CONSISTENT_HASH, "c_md5": Policy.CONSISTENT_HASH,
    "c_ketama": Policy.CONSISTENT_HASH,
}  # fmt: skip


def legacy_tables(path: Path) -> dict[str, Cluster]:
    """The tables of a cube.conf, a JSON array with an object for each table, and where they are.

    Its shards are chosen by key modulo their number. `dup` says nothing there either. What the ancestor's reader took
    for granted is checked: as many nodes as shards, each of the table's type, no table twice. Raises BadConfig.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadConfig(str(path), error.strerror or error, "a readable file") from error
    try:
        dicts = msgspec.json.decode(raw, type=list[_Dict])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadConfig(str(path), error, "a JSON array with an object for each table") from error
    if not dicts:
        raise BadConfig(str(path), "no tables", "at least one")
    tables: dict[str, Cluster] = {}
    for number, one in enumerate(dicts):
        place = f"{path} [{number}] {one.dict_name!r}"
        if one.dict_name in tables:
            raise BadConfig(place, "a table that was there before", "every table once")
        options = _legacy_options(place, one)
        tables[one.dict_name] = Cluster(_legacy_shards(place, one), ShardRule.MODULO, options, one.timeout / 1e3)
    return tables


def _legacy_shards(place: str, one: _Dict) -> tuple[str, ...]:
    if one.shard < 1:
        raise BadConfig(f"{place} shard", one.shard, "at least 1")
    if one.type == "ipport_parallel" and one.shard > 1:
        raise BadConfig(f"{place} type", "ipport_parallel", "ipport: a cube-server has one shard, so each has its own")
    if len(one.nodes) != one.shard:
        raise BadConfig(f"{place} nodes", f"{len(one.nodes)} nodes", f"{one.shard}: one for each shard")
    shards = []
    for number, node in enumerate(one.nodes):
        at = f"{place} nodes[{number}]"
        if one.type == "ipport_list":
            if not (node.ipport_list or "").startswith("list://") or node.ip is not None or node.port is not None:
                raise BadConfig(at, node, '{"ipport_list": "list://host:port,host:port"}')
            shards.append(node.ipport_list or "")
        else:
            if not node.ip or set(node.ip) & set("/,|") or node.port is None or node.ipport_list is not None:
                raise BadConfig(at, node, '{"ip": ..., "port": ...}')
            shards.append(f"{node.ip}:{node.port}")
        try:
            Naming.parse(shards[-1])
        except BadConfig as error:
            raise BadConfig(at, error.found, error.expected) from error
    return tuple(shards)


def _legacy_options(place: str, one: _Dict) -> Options:
    for name, value in (("timeout", one.timeout), ("retry", one.retry), ("backup_request", one.backup_request)):
        if value < (1 if name == "timeout" else 0):
            raise BadConfig(f"{place} {name}", value, "a number of milliseconds" if name != "retry" else "0 or more")
    policy = _POLICIES.get(one.load_balancer)
    if policy is None:
        raise BadConfig(f"{place} load_balancer", repr(one.load_balancer), ", ".join(_POLICIES))
    if not one.backup_request:
        return Options(policy=policy, retries=one.retry)
    after_s = one.backup_request / 1e3
    return Options(policy=policy, retries=one.retry, hedge=0.95, hedge_floor_s=after_s, hedge_ceiling_s=after_s)
