"""Where a cube is: texts and files, ours and the ancestor's, right and wrong."""

import asyncio
import json

import numpy as np
import pytest
from certificates import Authority
from stores import built

from cube.client import Ask, LocalCube, RemoteCube
from cube.cluster import Access, Cubes, cluster_at, legacy_tables, open_cube
from cube.errors import BadConfig, NotServed, ShardUnavailable
from cube.keys import ShardRule
from cube.rpc.routing import Options, Policy
from cube.version import Version

KEYS = np.random.default_rng(5).integers(0, 2**64, 300, dtype=np.uint64)
ROWS = np.random.default_rng(6).standard_normal((300, 3), dtype=np.float32)

# The ancestor's own example, and one table with a server for each shard.
TEST_DICT = {
    "dict_name": "test_dict", "shard": 1, "dup": 1, "timeout": 200, "retry": 3, "backup_request": 100,
    "type": "ipport_list", "load_balancer": "rr", "nodes": [{"ipport_list": "list://127.0.0.1:8027"}],
}  # fmt: skip
USERS = {
    "dict_name": "users", "shard": 2, "dup": 1, "timeout": 50, "retry": 0, "backup_request": 0, "type": "ipport",
    "nodes": [{"ip": "10.0.0.1", "port": 8000}, {"ip": "10.0.0.2", "port": "8001"}],
}  # fmt: skip


@pytest.fixture
def conf(tmp_path):
    """Write a cube.conf; returns its path."""

    def write(content):
        path = tmp_path / "cube.conf"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_list_of_shards_and_replicas():
    found = cluster_at("a:1|b:2,c:3,dns://d:4")
    assert found.shards == ("list://a:1,b:2", "c:3", "dns://d:4")
    assert found.rule is ShardRule.MIX


def test_a_prototxt_with_targets_of_any_kind_and_a_rule(tmp_path):
    path = tmp_path / "cube.prototxt"
    path.write_text('shard { address: "a:1" } shard { address: "list://b:2,c:3" } shard_rule: "modulo"')
    found = cluster_at(str(path))
    assert found.shards == ("a:1", "list://b:2,c:3")
    assert found.rule is ShardRule.MODULO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no address of shard 0, expected an address for each shard"),
        ("a:1,,b:2", "found no address of shard 1"),
        ("nowhere", "nowhere"),
        ("a:1|a:1", "a:1"),
        ("a:99999", "99999"),
        ("list://a:1,b:2", r"expected shards separated by commas, replicas of a shard by \|"),
    ],
)
def test_texts_that_name_no_cube_are_refused(text, message):
    with pytest.raises(BadConfig, match=message):
        cluster_at(text)


def test_a_prototxt_says_how_replicas_are_treated(tmp_path):
    path = tmp_path / "cube.prototxt"
    path.write_text(
        'shard { address: "a:1" } '
        'replicas { policy: "consistent hash" retries: 0 hedge: 0.9 hedge_share: 0.2 timeout_ms: 250 }'
    )
    found = cluster_at(str(path))
    assert found.options == Options(policy=Policy.CONSISTENT_HASH, retries=0, hedge=0.9, hedge_share=0.2)
    assert found.most_timeout_s == 0.25
    path.write_text('shard { address: "a:1" } replicas { policy: "best" }')
    with pytest.raises(BadConfig, match="replicas policy: found 'best', expected round robin, weighted, least loaded"):
        cluster_at(str(path))


def test_a_prototxt_without_shards_is_refused(tmp_path):
    path = tmp_path / "cube.prototxt"
    path.write_text('data: "x"')
    with pytest.raises(BadConfig, match=r"cube\.prototxt: found no shards"):
        cluster_at(str(path))


def test_a_directory_is_a_local_cube(tmp_path):
    built(tmp_path, "t", Version(1), KEYS, ROWS, shards=2)
    with_files = open_cube(str(tmp_path))
    assert isinstance(with_files, LocalCube)
    rows = asyncio.run(with_files.gather("t", None, KEYS, 5))
    assert np.array_equal(rows.rows, ROWS)
    assert rows.version == Version(1)


def test_the_ancestors_file_says_where_its_tables_are(conf):
    tables = legacy_tables(conf([TEST_DICT, USERS]))
    assert list(tables) == ["test_dict", "users"]
    shards, rule, options, timeout_s = tables["test_dict"]
    assert timeout_s == 0.2
    assert (shards, rule) == (("list://127.0.0.1:8027",), ShardRule.MODULO)
    assert (options.policy, options.retries, options.hedge) == (Policy.ROUND_ROBIN, 3, 0.95)
    assert (options.hedge_floor_s, options.hedge_ceiling_s) == (0.1, 0.1)
    assert tables["users"].shards == ("10.0.0.1:8000", "10.0.0.2:8001")
    assert tables["users"].options.hedge is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": [*USERS["nodes"], {"ip": "10.0.0.3", "port": 8}]}, "nodes: found 3 nodes, expected 2: one for each"),
        ({"nodes": USERS["nodes"][:1]}, "nodes: found 1 nodes, expected 2"),
        ({"nodes": [{"ipport_list": "list://a:1"}] * 2}, r'nodes\[0\]: found .*, expected {"ip"'),
        ({"nodes": [{"ip": "a", "port": 70000}, {"ip": "b", "port": 1}]}, r"nodes\[0\]"),
        ({"nodes": [{"ip": "list://a:1,b", "port": 1}] * 2}, r"nodes\[0\]: found"),
        ({"nodes": "a:1"}, r"Expected `array`, got `str` - at `\$\[0\]\.nodes`"),
        ({"type": "ipport_parallel"}, "type: found ipport_parallel, expected ipport"),
        ({"type": "ip"}, "Invalid enum value 'ip'"),
        ({"type": "ipport_list"}, r'nodes\[0\]: found .*, expected {"ipport_list"'),
        ({"load_balancer": "best"}, "load_balancer: found 'best', expected rr, wrr"),
        ({"shard": 0, "nodes": []}, "shard: found 0, expected at least 1"),
        ({"shard": "2"}, r"Expected `int`, got `str` - at `\$\[0\]\.shard`"),
        ({"timeout": 0}, "timeout: found 0, expected a number of milliseconds"),
        ({"retry": -1}, "retry: found -1, expected 0 or more"),
        ({"shards": 2}, "unknown field `shards`"),
    ],
)
def test_what_the_ancestor_took_for_granted_is_checked(conf, change, message):
    with pytest.raises(BadConfig, match=message) as caught:
        legacy_tables(conf([USERS | change]))
    assert "cube.conf" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "Expected `array`, got `object`"),
        ("[{]", "expected a JSON array with an object for each table"),
        ("[]", "found no tables, expected at least one"),
        ([USERS, USERS], r"\[1\] 'users': found a table that was there before"),
        ([{name: USERS[name] for name in USERS if name != "retry"}], "missing required field `retry`"),
    ],
)
def test_files_that_are_no_such_thing_are_refused(conf, content, message):
    with pytest.raises(BadConfig, match=message):
        legacy_tables(conf(content))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "cube.conf"
    path.write_bytes(b'[{"dict_name": "\xff"}]')
    with pytest.raises(BadConfig, match=r"cube\.conf: found"):
        legacy_tables(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadConfig, match=r"none\.conf: found No such file"):
        legacy_tables(tmp_path / "none.conf")


def test_tables_on_servers_of_their_own_are_one_cube(tmp_path, server, conf):
    entries = []
    for name, factor in (("a", 1), ("b", 2)):
        data = tmp_path / name
        built(data, name, Version(factor), KEYS, ROWS * factor, shards=1, shard_rule=ShardRule.MODULO)
        address = server("cube-server", "--shard", 0, "--shards", 1, "--data", data, "--shard-rule", "modulo")
        host, port = address.split(":")
        entries.append(USERS | {"dict_name": name, "shard": 1, "nodes": [{"ip": host, "port": port}]})

    async def work():
        async with open_cube(str(conf(entries))) as cube:
            assert isinstance(cube, Cubes)
            await cube.open({"a": (Version(1), 3), "b": (Version(2), 3)}, wait_s=5)
            with pytest.raises(NotServed, match="table 'c': not served here, which serves a, b"):
                await cube.lookup([Ask("c", KEYS)], 5)
            return await cube.lookup([Ask("b", KEYS), Ask("a", KEYS[::-1])], 5)

    b, a = asyncio.run(work()).tables
    assert np.array_equal(b.rows, ROWS * 2)
    assert np.array_equal(a.rows, ROWS[::-1])
    assert (b.version, a.version) == (Version(2), Version(1))


def test_servers_that_shard_by_another_rule_are_refused(tmp_path, server):
    built(tmp_path, "t", Version(1), KEYS, ROWS, shards=1, shard_rule=ShardRule.MODULO)
    address = server("cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path, "--shard-rule", "modulo")

    async def work():
        async with RemoteCube([address]) as cube:
            await cube.open({"t": (Version(1), 3)}, wait_s=5)

    with pytest.raises(BadConfig, match="found shard rule 'modulo', expected 'mix'"):
        asyncio.run(work())


@pytest.mark.parametrize("content", ["", "  \n", "two words", "tab\tbed", "ümlaut", "\nlater"])
def test_a_token_is_one_printable_word(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(BadConfig, match="expected one word of printable ASCII in the first line"):
        Access.of(str(path))
    path.write_text("secret\nolder\n")
    assert Access.of(str(path)).metadata == (("authorization", "Bearer secret"),)
    assert Access.of() == Access("", None)
    with pytest.raises(BadConfig, match="expected a file with a token"):
        Access.of(str(tmp_path / "none"))


def test_a_cube_is_reached_through_tls_by_who_trusts_it_and_has_a_certificate(tmp_path, server, command):
    built(tmp_path / "data", "t", Version(1), KEYS, ROWS, shards=1)
    authority = Authority(tmp_path / "pem")
    certificate, key = authority.issue("server")
    mine, mine_key = authority.issue("client", "client")
    roots = str(authority.roots)
    address = server(
        "cube-server", "--shard", 0, "--shards", 1, "--data", tmp_path / "data", "--tls-cert", certificate,
        "--tls-key", key, "--tls-client-ca", roots,
    )  # fmt: skip

    async def ask(access):
        async with open_cube(address, access) as cube:
            await cube.open({"t": (Version(1), 3)}, wait_s=1)
            return await cube.gather("t", None, KEYS, 5)

    rows = asyncio.run(ask(Access.of("", roots, str(mine), str(mine_key))))
    assert np.array_equal(rows.rows, ROWS)
    for access in (Access(), Access.of("", roots), Access.of("", "system")):
        with pytest.raises(ShardUnavailable):
            asyncio.run(ask(access))
    asked = ("cube-ctl", "tables", "--server", address, "--tls-ca", roots)
    assert command(*asked, "--tls-cert", mine, "--tls-key", mine_key).returncode == 0
    assert command(*asked).returncode == 1
    with pytest.raises(BadConfig, match="expected PEM files"):
        Access.of("", str(tmp_path / "none.pem"))
    with pytest.raises(BadConfig, match="a key without a certificate"):
        Access.of("", "", "", str(key))
