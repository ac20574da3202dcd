"""cube-server as a process: workers on one port, tokens, TLS, metrics, logs, and its end."""

import asyncio
import contextlib
import re
import signal
import time

import grpc
import httpx
import numpy as np
import pytest
from certificates import Authority
from cube_process import cube_process
from prometheus_client.parser import text_string_to_metric_families
from stores import built

from cube import server
from cube.errors import BadConfig, ServingError
from cube.pb import cube_pb2 as pb
from cube.pb import health_pb2, reflection_pb2
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rpc.channel import Channel
from cube.service import LOOKUP, SCAN, STATUS
from cube.version import Version

pytestmark = pytest.mark.slow
ROWS = 1_000
KEYS = np.arange(10, dtype="<u8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("cube")
    built(data, "t", Version(7), range(ROWS), np.arange(ROWS * 4).reshape(ROWS, 4))
    return data


def asked(keys=KEYS, table="t"):
    return pb.LookupRequest(tables=[pb.TableKeys(table=table, keys=keys.astype("<u8").tobytes())])


def samples(server, **headers):
    """By name and labels."""
    text = httpx.get(f"http://{server.address}/metrics", headers=headers, timeout=100).raise_for_status().text
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- workers ----


def test_metrics_add_up_over_workers(data):
    with cube_process(data, "--workers", 2) as server:
        calls = 25  # odd: both workers cannot have answered as many
        for _ in range(calls):
            with server.calling() as call:
                call(LOOKUP, asked(np.array([1, 2, 5_000])), pb.LookupReply)
        with server.calling() as call, contextlib.suppress(grpc.RpcError):
            call(LOOKUP, asked(table="u"), pb.LookupReply)
        for _ in range(6):  # whichever answers
            found = samples(server)
            assert found["cube_lookups_total",] == found["cube_lookup_seconds_count",] == calls
            assert found["cube_keys_total", "t", "true"] == 2 * calls
            assert found["cube_keys_total", "false", "t"] == calls
            assert found["cube_lookup_keys_sum",] == 3 * calls
            assert found["cube_lookup_keys_bucket", "4.0"] == calls
            assert 0 < found["cube_lookup_seconds_sum",] < 20
            assert found["cube_refusals_total", "NOT_FOUND"] == 1
            assert found["cube_table_rows", "7@0", "t", "true"] == ROWS
            for worker in "01":
                assert found["cube_worker_resident_bytes", worker] > 10e6
                assert found["cube_worker_cpu_seconds_total", worker] > 0
        assert {server.status().lookups for _ in range(20)} == {calls}
        assert {server.status().tables[0].keys_found for _ in range(5)} == {2 * calls}
        end = time.monotonic() + 60
        while samples(server)["cube_connections_accepted_total",] < calls:  # each process looks once a second
            assert time.monotonic() < end
        assert samples(server)["cube_bytes_in_total",] > calls * 24


def test_rows_in_memory_are_there_once_for_all_workers(tmp_path):
    built(tmp_path, "t", Version(7), range(200_000), np.ones((200_000, 16)))
    megabytes = (tmp_path / "t" / "7@0" / "0-of-1.seg").stat().st_size / 1e6
    with cube_process(tmp_path, "--workers", 2, "--in-memory", "--verify", "off") as server:
        for _ in range(8):
            with server.calling() as call:
                call(LOOKUP, asked(np.arange(0, 200_000, 10)), pb.LookupReply)
        for pid in server.workers:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                sizes = {line.split()[0]: int(line.split()[1]) / 1e3 for line in file if line.endswith("kB\n")}
            assert sizes["Shared_Dirty:"] > 0.9 * megabytes  # the copy, and nobody has it alone
        assert {v.engine for v in server.status().tables[0].versions} == {"Segment"}


def test_workers_serve_other_engines_too(tmp_path):
    pytest.importorskip("lmdb")
    built(tmp_path, "t", Version(7), range(ROWS), np.arange(ROWS * 4).reshape(ROWS, 4), engine="lmdb")
    with cube_process(tmp_path, "--workers", 2) as server:
        for _ in range(8):
            with server.calling() as call:
                (rows,) = call(LOOKUP, asked(), pb.LookupReply).tables
            assert np.frombuffer(rows.rows, "<f4").tolist() == list(range(40))


# ---- who may call ----


def code_of(call, *args):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return caught.value.code()


def test_a_token_is_needed_for_everything_but_health(data, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("old-secret\nnew-secret\n")
    tokens.chmod(0o640)
    with cube_process(data, "--token-file", tokens, "--verify", "off") as server:
        assert server.log(f"{tokens}: others than its owner may use it (mode 640)")
        for token in ("old-secret", "new-secret"):
            with server.calling(token) as call:
                assert len(call(LOOKUP, asked(), pb.LookupReply).tables) == 1
        for token in (None, "new-secre", "new-secrets", "NEW-SECRET", "old-secret new-secret"):
            with server.calling(token) as call:
                for path, request, reply in (
                    (LOOKUP, asked(), pb.LookupReply),
                    (STATUS, pb.StatusRequest(), pb.StatusReply),
                    ("/cube_serving.cube.CubeControl/Drain", pb.DrainRequest(), pb.DrainReply),
                ):
                    assert code_of(call, path, request, reply) is grpc.StatusCode.UNAUTHENTICATED
                health = call(
                    "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
                )
                assert health.status == health.SERVING
        with grpc.insecure_channel(server.address) as channel:
            for path, request in (
                (SCAN, pb.ScanRequest(table="t")),
                (
                    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                ),
            ):
                replies = channel.stream_stream(path)(iter([request.SerializeToString()]), timeout=20)
                assert code_of(next, replies) is grpc.StatusCode.UNAUTHENTICATED
        url = f"http://{server.address}"
        assert (
            httpx.get(f"{url}/healthz", timeout=100).status_code
            == httpx.get(f"{url}/readyz", timeout=100).status_code
            == 200
        )
        for method, path in (
            ("GET", "/metrics"), ("GET", "/v1/tables"), ("POST", "/v1/tables/t:lookup"), ("POST", "/DictService/seek"),
            ("POST", "/ControlService/cmd"),
        ):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic old-secret"}):
                reply = httpx.request(method, f"{url}{path}", headers=headers, timeout=100)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        right = {"authorization": "bearer old-secret"}
        assert httpx.get(f"{url}/v1/tables", headers=right, timeout=100).status_code == 200
        assert samples(server, **right)["cube_refusals_total", "UNAUTHENTICATED"] == 5 * 3 + 2 + 5 * 3
        lines = server.log("refused: UNAUTHENTICATED")
        assert lines
        assert "secre" not in "".join(server.lines)
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_tls_and_clients_certificates(data, tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    flags = ("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", authority.roots)
    with cube_process(data, *flags, "--workers", 2, "--verify", "off") as server:
        url = f"https://localhost:{server.address.rpartition(':')[2]}/v1/tables"
        known = authority.client(*authority.issue("client", "a-client"))
        assert httpx.get(url, verify=known, timeout=100).json()["tables"][0]["name"] == "t"
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=authority.client(), timeout=100)


# ---- what it says ----


def test_refusals_are_logged_a_few_a_second_and_counted(data):
    with cube_process(data, "--verify", "off") as server:
        with server.calling() as call:
            for _ in range(300):
                code_of(call, LOOKUP, asked(table="nowhere\n\x1b"), pb.LookupReply)
            for _ in range(100):
                call(LOOKUP, asked(), pb.LookupReply)
        server.wait_for("more within a second")
        lines = server.log("refused: NOT_FOUND: /cube_serving.cube.Cube/Lookup from 127.0.0.1")
        more = sum(int(re.search(r"refused: (\d+) more", line)[1]) for line in server.log("more within a second"))
        assert 5 <= len(lines) <= 60
        assert len(lines) + more <= 300
        assert samples(server)["cube_refusals_total", "NOT_FOUND"] == 300
        server.process.send_signal(signal.SIGTERM)
        code, log = server.end()
        assert code == 0
        assert "\x1b" not in log
        assert len(log.splitlines()) < 60 + 20  # nothing about calls that were served


# ---- its end ----


@pytest.mark.parametrize(("workers", "ask"), [(1, "SIGTERM"), (2, "Drain")])
def test_draining_under_load_loses_nothing(data, workers, ask):
    """Whatever the server has begun is answered; what it has not begun is refused as such."""

    async def caller(server, answered, lost):
        async with Channel(server.address) as channel:
            message = asked(np.arange(500)).SerializeToString()
            while True:
                try:
                    reply = pb.LookupReply.FromString(bytes(await channel.call(LOOKUP, message, 60)))
                except ServingError as error:
                    if not (error.never_processed or str(error).startswith("cannot connect")):
                        lost.append(error)
                    return
                assert np.frombuffer(reply.tables[0].rows, "<f4").sum() == 2000 * 1999 / 2
                answered.append(1)

    async def load(server):
        answered, lost = [], []
        callers = [asyncio.ensure_future(caller(server, answered, lost)) for _ in range(8)]
        while len(answered) < 200:
            await asyncio.sleep(0.01)
        if ask == "Drain":
            async with Channel(server.address) as channel:
                await channel.call("/cube_serving.cube.CubeControl/Drain", b"", 60)
        else:
            server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*callers), 100)
        return lost

    with cube_process(data, "--workers", workers, "--verify", "off") as server:
        lost = asyncio.run(load(server))
        code, log = server.end()
        assert (code, lost) == (0, [])
        assert "SIGTERM: draining" in log
        assert log.count("drained") == workers
        assert ("asked to drain by" in log) == (ask == "Drain")


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"workers": 5000}, "workers: found 5000"),
        ({"tls_cert": "a.pem"}, "TLS: found one of tls_cert and tls_key"),
        ({"tls_client_ca": "a.pem"}, "tls_client_ca: found no tls_cert"),
        ({"grpc": "grpcio", "workers": 2}, "grpc: found grpcio with workers or TLS"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, complaint):
    config = CubeConfig(listen="127.0.0.1:0", **settings)
    config.shard.add()
    with pytest.raises(BadConfig, match=complaint):
        server.checked(config, 0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--token-file", "/no/such/file"], "/no/such/file: found No such file"),
        (["--token-file", "/dev/null"], "/dev/null: found 0 tokens"),
        (["--tls-cert", "/no/such/a", "--tls-key", "/no/such/b"], "TLS files /no/such/a, /no/such/b"),
        (["--legacy-table", "u"], "legacy_table: found 'u', expected one of t"),
    ],
)
def test_what_cannot_be_read_is_said_by_check_and_at_start(data, command, flags, complaint):
    done = command(
        "cube-server", "--shard", 0, "--shards", 1, "--data", data, "--listen", "127.0.0.1:0", "--check", *flags
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr


def test_grpcio_carries_the_same_service_with_a_token(data, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret")
    tokens.chmod(0o600)
    with cube_process(data, "--grpc", "grpcio", "--token-file", tokens, "--verify", "off") as server:
        assert not server.log("others than its owner")
        with server.calling("secret") as call, server.calling() as stranger:
            assert len(call(LOOKUP, asked(), pb.LookupReply).tables) == 1
            assert code_of(stranger, LOOKUP, asked(), pb.LookupReply) is grpc.StatusCode.UNAUTHENTICATED
            call("/cube_serving.cube.CubeControl/Drain", pb.DrainRequest(), pb.DrainReply)
        assert server.end()[0] == 0
