"""Clients that others wrote, in other languages, against the lean listener in a process of its own."""

import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest
from interop_server import LARGE, started, started_with_tls
from interop_service import (
    ECHO_INITIAL,
    ECHO_TRAILING,
    OBSERVER,
    PEERS,
    SERVICE,
    CallId,
    OutputRequest,
    SimpleRequest,
    SimpleResponse,
)
from places import BIN

pytestmark = pytest.mark.slow

DEBIAN = {"curl": "curl", "wrk": "wrk", "h2load": "nghttp2-client", "nghttp": "nghttp2-client"}
HELLO = b'{"hello": "world"}'  # what GET /hello answers
UNARY_CALL = f"/{SERVICE}/UnaryCall"
AS_GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server without TLS."""
    with started() as address:
        yield address


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Path:
    """A request as it is on the wire, in a file: asks for 1,700 bytes."""
    path = tmp_path_factory.mktemp("frame") / "request"
    path.write_bytes(framed(SimpleRequest(response_size=1700)))
    return path


# ---- grpcurl (Go) ----


def test_grpcurl_calls_with_metadata(address):
    metadata = ("-H", f"{ECHO_INITIAL}: initial", "-H", f"{ECHO_TRAILING}: q6ur")
    done = grpcurl(address, "UnaryCall", {"responseSize": 9}, "-v", *metadata)
    assert json.loads(re.search(r"Response contents:\n(\{.*?\n\})", done.stdout, re.S)[1]) == {
        "payload": {"body": "AAAAAAAAAAAA"}
    }
    assert f"{ECHO_INITIAL}: initial" in done.stdout.partition("Response contents")[0]
    assert f"{ECHO_TRAILING}: q6ur" in done.stdout.partition("Response trailers received")[2]


def test_grpcurl_is_told_status_and_message(address):
    status = {"code": 9, "message": "not at 100% \u263a"}
    done = grpcurl(address, "UnaryCall", {"responseStatus": status}, failing=True)
    assert "Code: FailedPrecondition\n  Message: not at 100% \u263a" in done.stderr


def test_grpcurl_meets_its_deadline(address):
    sleeping = {"responseParameters": [{"size": 1, "intervalUs": 60_000_000}]}
    done = grpcurl(address, "StreamingOutputCall", sleeping, "-max-time", "3", failing=True)
    assert "Code: DeadlineExceeded" in done.stderr


def test_grpcurl_sends_and_receives_large_messages(address):
    large = {"responseSize": 8 << 20, "payload": {"body": "A" * (4 << 20)}}
    done = grpcurl(address, "UnaryCall", large, "-max-msg-sz", str(16 << 20))
    assert len(json.loads(done.stdout)["payload"]["body"]) > 8 << 20


def test_grpcurl_streams_both_ways(address):
    asking = [{"responseParameters": [{"size": size}]} for size in (3, 6, 9)]
    done = grpcurl(address, "FullDuplexCall", asking)
    assert re.findall(r'"body": "(.*)"', done.stdout) == ["AAAA", "AAAAAAAA", "AAAAAAAAAAAA"]


def test_grpcurl_finds_its_way_by_reflection(address):
    listed = run(BIN / "grpcurl", "-plaintext", address, "list").stdout.split()
    assert {SERVICE, OBSERVER} <= set(listed)
    described = run(BIN / "grpcurl", "-plaintext", address, "describe", f"{SERVICE}.UnaryCall").stdout
    assert "rpc UnaryCall ( .grpc.testing.SimpleRequest ) returns ( .grpc.testing.SimpleResponse );" in described
    done = run(BIN / "grpcurl", "-plaintext", "-d", '{"responseSize": 3}', address, f"{SERVICE}/UnaryCall")
    assert json.loads(done.stdout) == {"payload": {"body": "AAAA"}}


# ---- k6 (Go) ----


def test_k6_checks_every_reply(address):
    line = ("run", "--quiet", "--no-usage-report", "--no-color", "-e", f"ADDRESS={address}")
    done = run(BIN / "k6", *line, PEERS / "calls.k6.js")  # ends with 99 where a threshold is not met
    assert "170 out of 170" in done.stdout


# ---- h2load and nghttp (nghttp2) ----


@pytest.mark.parametrize("deadline", [(), ("-H", "grpc-timeout: 90S")], ids=["no-deadline", "deadline"])
@pytest.mark.parametrize(("connections", "streams"), [(1, 1), (8, 1), (4, 32)])
def test_h2load_gets_every_call_answered(address, frame, connections, streams, deadline):
    check_load(address, frame, "http", "-c", str(connections), "-m", str(streams), *deadline)
    with grpc.insecure_channel(address) as another:
        assert len(another.unary_unary(UNARY_CALL)(SimpleRequest(response_size=1700).SerializeToString())) > 1700


def check_load(address: str, frame: Path, scheme: str, *arguments: str) -> None:
    """Check that h2load has all its calls answered."""
    calls = 2_000
    done = run("h2load", "-n", str(calls), "-d", frame, *AS_GRPC, *arguments, f"{scheme}://{address}{UNARY_CALL}")
    assert f"{calls} succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout
    assert f"{calls} 2xx, 0 3xx, 0 4xx, 0 5xx" in done.stdout
    # h2load looks at HTTP's status only: gRPC's is in the size of the reply, whose payload an error has not
    total = int(re.search(r"traffic: .* \(([0-9]+)\) data", done.stdout)[1])
    assert total == calls * len(framed(SimpleResponse(payload={"body": bytes(1700)})))


def test_nghttp_gets_many_resources_over_one_connection(address):
    """With PRIORITY frames for streams that never are, and dependencies among those that are."""
    paths = ("/hello", "/large", "/hello?again", "/nothing")
    done = run("nghttp", "-v", "-n", *(f"http://{address}{path}" for path in paths))
    statuses = re.findall(r"recv \(stream_id=[0-9]+\) :status: ([0-9]+)", done.stdout)
    assert sorted(statuses) == ["200", "200", "200", "404"]
    assert "recv GOAWAY" not in done.stdout


def test_nghttp_gets_a_body_through_a_window_that_is_smaller(address):
    done = run("nghttp", "-w", "2", "-W", "2", f"http://{address}/hello")  # three bytes
    assert done.stdout == '{"hello": "world"}'


@pytest.mark.parametrize("window_bits", ["10", "16", "30"])
def test_nghttp_gets_a_large_body_through_windows_of_any_size(address, window_bits):
    """Windows that are smaller still are taken for an attack, where the body is large."""
    done = run("nghttp", "-w", window_bits, "-W", window_bits, f"http://{address}/large", text=False)
    assert done.stdout == LARGE


@pytest.mark.parametrize("padding", ["1", "255", "1024"])
def test_nghttp_calls_with_padded_frames(address, frame, padding):
    done = run("nghttp", "-b", padding, "-d", frame, *AS_GRPC, f"http://{address}{UNARY_CALL}", text=False)
    assert unframed(done.stdout) == [SimpleResponse(payload={"body": bytes(1700)})]


def test_nghttp_asks_to_go_on_before_it_sends_a_body(address, frame):
    """An interim response, where the server sends one, comes before the final one."""
    done = run("nghttp", "--expect-continue", "-d", frame, f"http://{address}/echo", text=False)
    assert done.stdout == frame.read_bytes()


# ---- curl ----


def test_curl_reads_status_and_metadata_from_the_trailers(address, frame, tmp_path):
    metadata = ("-H", f"{ECHO_INITIAL}: initial", "-H", f"{ECHO_TRAILING}: q6ur")
    head, body = curl_call(f"http://{address}{UNARY_CALL}", frame, tmp_path, "--http2-prior-knowledge", *metadata)
    assert head["content-type"] == "application/grpc"
    assert head[ECHO_INITIAL] == "initial"
    assert head[ECHO_TRAILING] == "q6ur"
    assert head["grpc-status"] == "0"
    assert unframed(body) == [SimpleResponse(payload={"body": bytes(1700)})]


def test_the_server_answers_at_the_deadline_of_a_client_that_does_not_watch_it(address, tmp_path):
    request = tmp_path / "request"
    request.write_bytes(framed(CallId(id="of no call")))
    deadline = ("--http2-prior-knowledge", "-H", "grpc-timeout: 100m")
    head, body = curl_call(f"http://{address}/{OBSERVER}/Cancelled", request, tmp_path, *deadline)
    assert (head["grpc-status"], body) == ("4", b"")


def test_replies_before_the_deadline_arrive_with_its_status(address, tmp_path):
    wanted = [{"size": 10}, {"size": 20, "interval_us": 60_000_000}]
    request = tmp_path / "request"
    request.write_bytes(framed(OutputRequest(response_parameters=wanted)))
    deadline = ("--http2-prior-knowledge", "-H", "grpc-timeout: 2S")
    head, body = curl_call(f"http://{address}/{SERVICE}/StreamingOutputCall", request, tmp_path, *deadline)
    assert head["grpc-status"] == "4"
    assert len(body) == len(framed(SimpleResponse(payload={"body": bytes(10)})))


def test_curl_is_told_what_is_not_gRPC(address, tmp_path):  # noqa: N802
    """gRPC over HTTP/1.1 is no such thing; a gRPC path is no page."""
    line = ("-o", tmp_path / "body", "-w", "%{http_code}")
    for version in ("--http1.1", "--http2-prior-knowledge"):
        assert curl(version, *line, f"http://{address}{UNARY_CALL}").stdout in ("404", "405", "415")


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
@pytest.mark.parametrize(("path", "body"), [("/hello", HELLO), ("/large", LARGE)])
def test_curl_gets_a_page(address, version, path, body):
    assert curl(version, f"http://{address}{path}", text=False).stdout == body


def test_curl_gets_pages_over_one_http1_connection(address):
    """Over HTTP/2, curl 7.88 reuses a connection only if it is a TLS one."""
    get_pages_over_one_connection(f"http://{address}", "1.1", "--http1.1")


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_posts_what_it_gets_back(address, version, tmp_path):
    body = tmp_path / "body"
    body.write_bytes(LARGE)  # so large that curl asks with Expect: 100-continue over HTTP/1.1
    done = curl(version, "--data-binary", f"@{body}", f"http://{address}/echo", text=False)
    assert done.stdout == LARGE


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_posts_a_body_of_unknown_length(address, version):
    done = curl(version, "-X", "POST", "-T", "-", f"http://{address}/echo", input=LARGE, text=False)
    assert done.stdout == LARGE


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_asks_for_the_head_only(address, version):
    done = curl(version, "--head", f"http://{address}/large")
    assert re.match(r"HTTP/[12.]+ 200", done.stdout)
    assert f"content-length: {len(LARGE)}" in done.stdout.lower()


def test_curl_offers_to_upgrade_and_stays_with_http1(address):
    done = curl("--http2", "-w", " %{http_version}", f"http://{address}/hello")
    assert done.stdout == '{"hello": "world"} 1.1'


# ---- httpx (Python, over h2) ----


def test_httpx_calls_and_gets_over_one_http2_connection(address):
    with httpx.Client(http1=False, http2=True, base_url=f"http://{address}", timeout=100) as client:
        for size in (0, 10, 1 << 20):
            request = framed(SimpleRequest(response_size=size))
            reply = client.post(
                UNARY_CALL, content=request, headers={"content-type": "application/grpc", "te": "trailers"}
            )
            assert (reply.status_code, reply.http_version) == (200, "HTTP/2")
            assert unframed(reply.content) == [SimpleResponse(payload={"body": bytes(size)})]
        assert client.get("/hello").json() == {"hello": "world"}
        assert client.get("/large").content == LARGE


# ---- wrk ----


def test_wrk_gets_every_request_answered(address):
    check_wrk(f"http://{address}/hello")


def test_wrk_has_every_post_answered(address):
    check_wrk("-s", PEERS / "post.lua", f"http://{address}/echo")


def check_wrk(*arguments) -> None:
    """Check that wrk has all its requests answered."""
    done = run("wrk", "-t", "1", "-c", "16", "-d", "1s", "--timeout", "60s", *arguments)
    assert int(re.search(r"([0-9]+) requests in", done.stdout)[1]) > 0
    assert "Socket errors" not in done.stdout
    assert "Non-2xx" not in done.stdout


# ---- over TLS ----


class Tls(NamedTuple):
    """Where a server is, and whom to trust to know that it is that one."""

    address: str
    root: Path


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Iterator[Tls]:
    """A server with TLS."""
    with started_with_tls(tmp_path_factory.mktemp("tls")) as (address, root):
        yield Tls(address, root)


def test_grpcurl_calls_over_tls(tls):
    done = grpcurl(tls.address, "UnaryCall", {"responseSize": 3}, "-cacert", tls.root)
    assert json.loads(done.stdout) == {"payload": {"body": "AAAA"}}


@pytest.mark.parametrize(("version", "option"), [("2", "--http2"), ("1.1", "--http1.1")])
def test_curl_agrees_with_the_server_on_a_protocol(tls, version, option):
    get_pages_over_one_connection(f"https://{tls.address}", version, option, "--cacert", tls.root)


def test_curl_calls_over_tls(tls, frame, tmp_path):
    head, body = curl_call(f"https://{tls.address}{UNARY_CALL}", frame, tmp_path, "--http2", "--cacert", tls.root)
    assert head["grpc-status"] == "0"
    assert unframed(body) == [SimpleResponse(payload={"body": bytes(1700)})]


def test_curl_is_not_let_in_with_an_old_tls(tls):
    done = curl("--tls-max", "1.1", "--cacert", tls.root, f"https://{tls.address}/hello", failing=True)
    assert "alert protocol version" in done.stderr


def test_grpcio_calls_over_tls(tls):
    with grpc.secure_channel(tls.address, grpc.ssl_channel_credentials(tls.root.read_bytes())) as channel:
        reply = channel.unary_unary(UNARY_CALL)(SimpleRequest(response_size=1 << 20).SerializeToString())
    assert SimpleResponse.FromString(reply).payload.body == bytes(1 << 20)


def test_httpx_calls_over_tls(tls):
    with httpx.Client(http2=True, verify=ssl.create_default_context(cafile=tls.root), timeout=100) as client:
        reply = client.get(f"https://{tls.address}/large")
        assert (reply.http_version, reply.content) == ("HTTP/2", LARGE)


def test_h2load_gets_every_call_answered_over_tls(tls, frame):
    check_load(tls.address, frame, "https", "-c", "4", "-m", "8")


def test_wrk_gets_every_request_answered_over_tls(tls):
    check_wrk(f"https://{tls.address}/hello")


# ---- running them ----


def run(
    tool: str | Path, *arguments, failing: bool = False, text: bool = True, **options
) -> subprocess.CompletedProcess:
    """A tool's end, which is a good one unless it is meant to fail. Skips the test where there is no such tool."""
    if not shutil.which(tool):
        name = Path(tool).name
        pytest.skip(f"{name} is not on PATH" + (f" (Debian: apt-get install {DEBIAN[name]})" if name in DEBIAN else ""))
    done = subprocess.run([tool, *arguments], capture_output=True, text=text, timeout=200, check=False, **options)
    assert (done.returncode != 0) is failing, (done.stdout, done.stderr)
    return done


def curl(*arguments, **options) -> subprocess.CompletedProcess:
    """curl's end. It prints only what it was sent, and errors."""
    return run("curl", "--silent", "--show-error", "--max-time", "100", *arguments, **options)


def get_pages_over_one_connection(origin: str, version: str, *arguments) -> None:
    """Check what curl gets, and how."""
    urls = (f"{origin}{path}" for path in ("/hello", "/large", "/hello"))
    done = curl(*arguments, *urls, "-w", "|%{num_connects} %{http_version}|", text=False)
    first, later = (f"|{connects} {version}|".encode() for connects in (1, 0))
    assert done.stdout == HELLO + first + LARGE + later + HELLO + later


def curl_call(url: str, request: Path, folder: Path, *arguments) -> tuple[dict[str, str], bytes]:
    """A gRPC call by curl: header fields and trailers of the reply, and its body."""
    head, body = folder / "head", folder / "body"
    curl("-D", head, "-o", body, "--data-binary", f"@{request}", *AS_GRPC, *arguments, url)
    fields = dict(line.split(": ", 1) for line in head.read_text().splitlines() if ": " in line)
    return fields, body.read_bytes() if body.exists() else b""


def grpcurl(address: str, method: str, request: dict | list, *arguments, failing: bool = False):
    """A call by grpcurl, which has the .proto file."""
    messages = request if isinstance(request, list) else [request]
    line = ("-import-path", PEERS, "-proto", "interop.proto", *arguments, "-d", "@", address, f"{SERVICE}/{method}")
    security = () if "-cacert" in arguments else ("-plaintext",)
    return run(BIN / "grpcurl", *security, *line, input="".join(map(json.dumps, messages)), failing=failing)


def framed(message) -> bytes:
    """A message as it is in the body of a call."""
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def unframed(body: bytes) -> list:
    """The replies of UnaryCall in the body of a call."""
    replies = []
    while body:
        compressed, size = body[0], int.from_bytes(body[1:5], "big")
        assert not compressed
        assert len(body) >= 5 + size
        replies.append(SimpleResponse.FromString(body[5 : 5 + size]))
        body = body[5 + size :]
    return replies
