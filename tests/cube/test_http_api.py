"""cube-server over plain HTTP: lookups in JSON and raw, what is served, the ancestor's interface; what is refused."""

import asyncio
import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from cube_process import cube_process
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from stores import built, segment_of

from cube.http_api import MOST_JSON_KEYS, HttpApi, LegacyApi, base64_rows
from cube.rows import RowFormat
from cube.rpc.router import Request, Response, Route
from cube.service import CubeService
from cube.table import Table
from cube.version import Version

LAST = 2**64 - 1
KEYS = [0, 1, 2**53 + 1, LAST]
ROWS = np.array([[0.5, -1], [1.5, 2], [np.nan, np.inf], [3, 4]], np.float32)
RAW = {"content-type": "application/octet-stream"}


@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 9), st.integers(1, 7))))
def test_base64_of_rows_is_that_of_each_row(rows):
    assert base64_rows(rows) == [base64.b64encode(row.tobytes()).decode() for row in rows]
    narrow = rows.view(np.uint8)[:, : rows.shape[1]]  # widths of every remainder
    narrow = np.ascontiguousarray(narrow)
    assert base64_rows(narrow) == [base64.b64encode(row.tobytes()).decode() for row in narrow]


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """Tables `wide` (versions 7 and 8, f32) and `half` (f16), at most 100,000 keys in a call."""
    data = tmp_path_factory.mktemp("http")
    built(data, "wide", Version(7), KEYS, ROWS)
    built(data, "wide", Version(8), KEYS, ROWS + 1)
    built(data, "half", Version(7, 2), [5], [[0.25, 0.5, 1]], row_format=RowFormat.F16)
    with (
        cube_process(data, "--max-keys", 100_000, "--legacy-table", "wide") as server,
        httpx.Client(base_url=f"http://{server.address}", timeout=100) as client,
    ):
        yield client


def lookup(http, table="wide", **asked):
    reply = http.post(f"/v1/tables/{table}:lookup", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.slow
def test_tables_and_their_versions_are_listed(http):
    told = http.get("/v1/tables").json()
    assert (told["shard"], told["shards"], told["workers"]) == (0, 1, 1)
    half, wide = told["tables"]
    assert (half["name"], half["current"], wide["name"], wide["current"]) == ("half", "7@2", "wide", "8@0")
    assert [v["version"] for v in wide["versions"]] == ["8@0", "7@0"]
    (version,) = half["versions"]
    assert version.pop("file_bytes") > 4096
    assert version.pop("verified") in ("no", "running", "yes")
    assert version == {"version": "7@2", "dim": 3, "rows": 1, "row_format": "f16", "engine": "Segment"}


@pytest.mark.slow
def test_rows_come_as_json(http):
    assert lookup(http, keys=[1, 7, str(LAST), LAST], version="7@0") == {
        "version": "7@0",
        "dim": 2,
        "rows": [[1.5, 2], [0, 0], [3, 4], [3, 4]],
        "found": [True, False, True, True],
    }
    assert lookup(http, keys=["1"])["rows"] == [[2.5, 3]]  # of the current version
    assert lookup(http, keys=[2**53 + 1])["rows"] == [[None, None]]  # JSON has neither NaN nor infinity
    assert lookup(http, keys=[]) == {"version": "8@0", "dim": 2, "rows": [], "found": []}
    assert lookup(http, "half", keys=[5, 6], format="stored") == {
        "version": "7@2",
        "dim": 3,
        "row_format": "f16",
        "rows": [base64.b64encode(np.array([0.25, 0.5, 1], "<f2")).decode(), base64.b64encode(bytes(6)).decode()],
        "found": [True, False],
    }
    assert lookup(http, "half", keys=[5], format="floats")["rows"] == [[0.25, 0.5, 1]]
    plain = http.post("/v1/tables/wide:lookup", content=b'{"keys":[1]}')  # as curl does it, without a type
    assert plain.json()["rows"] == [[2.5, 3]]


@pytest.mark.slow
def test_rows_come_raw(http):
    keys = np.array([LAST, 9, 0], "<u8").tobytes()
    reply = http.post("/v1/tables/wide:lookup?version=7@0", content=keys, headers=RAW)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/octet-stream"
    told = {name: value for name, value in reply.headers.items() if name.startswith("x-cube-")}
    assert told == {
        "x-cube-version": "7@0",
        "x-cube-dim": "2",
        "x-cube-row-format": "f32",
        "x-cube-row-bytes": "8",
        "x-cube-absent": "1",
    }
    assert np.frombuffer(reply.content[:24], "<f4").tolist() == [3, 4, 0, 0, 0.5, -1]
    assert reply.content[24:] == b"\1\0\1"
    stored = http.post("/v1/tables/half:lookup?format=stored", content=np.array([5], "<u8").tobytes(), headers=RAW)
    assert stored.headers["x-cube-row-format"] == "f16"
    assert stored.content == np.array([0.25, 0.5, 1], "<f2").tobytes() + b"\1"
    empty = http.post("/v1/tables/wide:lookup", content=b"", headers=RAW)
    assert (empty.status_code, empty.content) == (200, b"")


@pytest.mark.slow
def test_many_keys_are_looked_up_beside_the_loop(http):
    keys = np.random.default_rng(1).choice(np.array(KEYS, np.uint64), 100_000)
    with ThreadPoolExecutor(4) as threads:
        raw = threads.submit(http.post, "/v1/tables/wide:lookup", content=keys.tobytes(), headers=RAW)
        listed = keys[:MOST_JSON_KEYS].tolist()
        told = threads.submit(lookup, http, keys=listed, version="7@0")
        seek = threads.submit(http.post, "/DictService/seek", json={"keys": listed})
        assert http.get("/healthz").status_code == 200
        content = raw.result().content
    expected = dict(zip(KEYS, ROWS.tolist(), strict=True)) | {KEYS[2]: [None, None]}
    assert told.result()["rows"] == [expected[key] for key in listed]
    assert content[800_000:] == b"\1" * 100_000
    floats = dict(zip(KEYS, ROWS + 1, strict=True))
    assert content[:800_000] == b"".join(floats[key].tobytes() for key in keys.tolist())
    values = {key: base64.b64encode(row.tobytes()).decode() for key, row in floats.items()}
    assert [value["value"] for value in seek.result().json()["values"]] == [values[key] for key in listed]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("wide:lookup", b"{", 400, "body: found"),
        ("wide:lookup", b"", 400, "body: found"),
        ("wide:lookup", b"\xff\xfe", 400, "body: found"),
        ("wide:lookup", b"[1]", 400, "Expected `object`"),
        ("wide:lookup", b"{}", 400, "`keys`"),
        ("wide:lookup", b'{"keys":[1],"verion":"7"}', 400, "verion"),
        ("wide:lookup?version=7@0", b'{"keys":[1]}', 400, "query: found 'version=7@0', expected none"),
        ("wide:lookup?format=stored", b'{"keys":[1]}', 400, "query"),
        ("wide:lookup", b'{"keys":[1.0]}', 400, "keys[0]"),
        ("wide:lookup", b'{"keys":[1e2]}', 400, "keys[0]"),
        ("wide:lookup", b'{"keys":["1.0"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":[" 1"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":["1_0"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", '{"keys":["\u0661"]}'.encode(), 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":["1",""]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":["' + b"1" * 5_000 + b'"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":[-1]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":["-1"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":[18446744073709551616]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":["18446744073709551616"]}', 400, "expected 0 to 18446744073709551615"),
        ("wide:lookup", b'{"keys":[1.5]}', 400, "keys[0]"),
        ("wide:lookup", b'{"keys":[true]}', 400, "keys[0]"),
        ("wide:lookup", b'{"keys":["one"]}', 400, "a string that is no key"),
        ("wide:lookup", b'{"keys":1}', 400, "keys"),
        ("wide:lookup", b'{"keys":[1],"format":"f16"}', 400, "format"),
        ("wide:lookup", b'{"keys":[1],"version":"newest"}', 400, "version: found 'newest'"),
        ("wide:lookup", b'{"keys":[1],"version":"9@0"}', 404, "serves 8@0, 7@0"),
        ("narrow:lookup", b'{"keys":[1]}', 404, "table 'narrow'"),
        ("wide:lookup", json.dumps({"keys": [1] * (MOST_JSON_KEYS + 1)}).encode(), 400, "at most 65536"),
        ("wide:lookup", b" " * 2_000_000, 413, "body: found more than"),
        ("wide:find", b"{}", 404, "no such path"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_json_lookups_are_refused(http, path, body, status, text):
    reply = http.post(f"/v1/tables/{path}", content=body)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert text in reply.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "body", "status", "text"),
    [
        ("", bytes(9), 400, "found 9 bytes, expected a multiple of 8"),
        ("", bytes(8 * 100_001), 400, "at most 100000"),
        ("?version=", bytes(8), 400, "version: found ''"),
        ("?version=6@0", bytes(8), 404, "version 6@0"),
        ("?format=f32", bytes(8), 400, "format: found 'f32'"),
        ("?verion=7@0", bytes(8), 400, "query: found 'verion'"),
        ("?version=7@0&version=8@0", bytes(8), 400, "expected each parameter once"),
        ("?format=stored&format=stored", bytes(8), 400, "expected each parameter once"),
    ],
)
def test_bad_raw_lookups_are_refused(http, query, body, status, text):
    reply = http.post(f"/v1/tables/wide:lookup{query}", content=body, headers=RAW)
    assert reply.status_code == status
    assert text in reply.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/tables/wide:lookup", "OPTIONS, POST"), ("POST", "/metrics", "GET, HEAD, OPTIONS")],
)
def test_other_methods_are_refused(http, method, path, allowed):
    reply = http.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    path=st.sampled_from(["/v1/tables/wide:lookup", "/DictService/seek", "/ControlService/cmd"]),
    body=st.binary(max_size=40)
    | st.sampled_from(
        [b'{"x":' + b"[" * 50_000, b'{"keys":[1e400]}', b'{"cmd":"\\ud800"}', b'{"keys":[1' + b"0" * 5_000]
    )
    | st.dictionaries(
        st.sampled_from(["keys", "version", "format", "more"]),
        st.lists(st.integers() | st.text(max_size=3) | st.floats()) | st.text(max_size=5) | st.integers() | st.none(),
    ).map(lambda asked: json.dumps(asked).encode()),
)
def test_no_body_makes_a_fault(http, path, body):
    reply = http.post(path, content=body)
    assert reply.status_code in (200, 400, 404)
    assert reply.status_code == 200 or set(reply.json()) == {"error"}


# ---- the ancestor's interface ----


@pytest.mark.slow
def test_the_ancestors_clients_find_their_rows(http):
    reply = http.post("/DictService/seek", json={"keys": [LAST, 77, 0], "version_required": True})
    assert reply.status_code == 200
    first, absent, last = reply.json()["values"]
    assert absent == {"status": 4294967295, "value": ""}
    assert np.frombuffer(base64.b64decode(first["value"]), "<f4").tolist() == [4, 5]
    assert (last["status"], base64.b64decode(last["value"])) == (0, np.array([1.5, 0], "<f4").tobytes())
    assert reply.json()["version"] == "8@0"
    assert http.post("/DictService/seek", content=b'{"keys":[]}').json() == {"values": []}
    for key in (b"-5", b"1.0", b'"1.0"', b"null"):
        assert http.post("/DictService/seek", content=b'{"keys":[%s]}' % key).status_code == 400
    assert http.post("/DictService/seek", content=b"garbage").status_code == 400


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A server of one table with version 7; 8 lies beside it; a function that sends a command: (status, reply)."""
    tmp_path = tmp_path_factory.mktemp("old")
    for base in (7, 8):
        built(tmp_path / "all", "t", Version(base), [1], [[base]])
    shutil.copytree(tmp_path / "all" / "t" / "7@0", tmp_path / "data" / "t" / "7@0")
    with (
        cube_process(tmp_path / "data") as server,
        httpx.Client(base_url=f"http://{server.address}", timeout=100) as client,
    ):
        shutil.copytree(tmp_path / "all" / "t" / "8@0", tmp_path / "data" / "t" / "8@0")

        def command(cmd, **more):
            reply = client.post("/ControlService/cmd", json={"cmd": cmd, **more})
            return reply.status_code, reply.json()

        command.client = client
        yield command


def current(old):
    (value,) = old.client.post("/DictService/seek", json={"keys": [1]}).json()["values"]
    (row,) = np.frombuffer(base64.b64decode(value["value"]), "<f4").tolist()
    return row


def status(cur, bg):
    return 200, {"cur_version": cur, "bg_version": bg, "status": 0}


@pytest.mark.slow
def test_the_ancestors_commands_fail_where_it_said_200(old):
    before, row = old("status"), current(old)
    now = before[1]["cur_version"]
    for cmd in ("reload_base", "reload_patch", "bg_load_base", "bg_load_patch"):
        code, reply = old(cmd, version_path="data/9@0")
        assert code == 500
        assert "9@0" in reply["error"]
    for cmd, more in (
        ("bg_switch", {}), ("enable", {"version": "9@0"}), ("enable", {}), ("reload_base", {"version": "later"}),
        ("bg_unload", {"version": now}), ("format_disk", {}),
    ):  # fmt: skip
        assert old(cmd, **more)[0] == 500
    for body in (b"{", b"", b"[]", b"{}", b'{"version":"7@0"}', b'{"cmd":7}'):
        assert old.client.post("/ControlService/cmd", content=body).status_code == 400
    assert old.client.get("/ControlService/cmd").status_code == 405
    assert (old("status"), current(old)) == (before, row)


@pytest.mark.slow
def test_the_ancestors_commands_move_versions(old):
    assert old("status") == status("7@0", "")
    assert old("bg_load_base", version_path="./data/8@0") == (200, {})
    assert (old("status"), current(old)) == (status("7@0", "8@0"), 7)
    assert old("bg_switch") == (200, {})
    assert (old("status"), current(old)) == (status("8@0", "7@0"), 8)
    assert old("enable", version="7") == (200, {})
    assert old("enable", version="7@0") == (200, {})
    assert old("status") == status("7@0", "8@0")
    assert old("bg_unload") == (200, {})
    assert old("bg_unload") == (200, {})  # as there: nothing to do is no failure
    assert old("status") == status("7@0", "")
    assert old("reload_patch", version="8@0") == (200, {})
    assert (old("status"), current(old)) == (status("8@0", ""), 8)
    assert old("reload_base", version=8) == (200, {})  # what is current already
    assert old("status") == status("8@0", "")


def test_what_raw_lookups_may_need_is_not_read_as_json(tmp_path):
    table = Table("t", {Version(7): segment_of(tmp_path / "t", [1], [[1]])})
    (route,) = (
        route
        for route in HttpApi(CubeService({"t": table}, 0, 1), None, 4 << 20, None).routes()
        if "lookup" in route.pattern
    )
    assert route.max_body_bytes == 8 * (4 << 20)

    def status(body, **headers):
        request = Request("POST", "/v1/tables/t:lookup", body=body, headers=headers, args={"name": "t"})
        answer = Route(route.handler).answer(request)
        return answer.status if isinstance(answer, Response) else asyncio.run(answer).status

    assert status(b'{"keys":[1]}' + b" " * 1_000_000) == 200
    assert status(b'{"keys":[1]}' + b" " * 2_000_000) == 413
    assert status(bytes(2_000_000), **RAW) == 200


def test_without_a_name_and_with_several_tables_the_ancestors_interface_says_so(tmp_path):
    tables = {
        name: Table(name, {Version(7): segment_of(tmp_path / name, [1], [[1]], table=name)}) for name in ("a", "b")
    }
    routes = LegacyApi(CubeService(tables, 0, 1), None, "", 100).routes()
    seek, cmd = (Route(route.handler) for route in routes)
    answer = seek.answer(Request("POST", "/DictService/seek", body=b'{"keys":[1]}'))
    assert (answer.status, b"legacy_table" in answer.body) == (404, True)
    answer = asyncio.run(cmd.answer(Request("POST", "/ControlService/cmd", body=b'{"cmd":"status"}')))
    assert (answer.status, b"legacy_table" in answer.body) == (500, True)
