"""A listener against real clients, and against those who mean no good: no neighbour is hurt, and nothing is kept."""

import contextlib
import resource
import socket
import ssl
import struct
import subprocess
import time

import frames
import grpc
import pytest
from certificates import Authority
from small_server import small_server

pytestmark = pytest.mark.slow

MANY = 10_000


def curl(*args):
    """What curl prints, of which the last word is the version of HTTP it spoke; None if it fails."""
    command = ["curl", "--silent", "--max-time", "20", "--write-out", " %{http_version}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.split() if done.returncode == 0 else None


def echo(address, message=b"abc", credentials=None):
    """One call of grpcio's, on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    opened = (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    )
    with opened as channel:
        return channel.unary_unary("/t.T/Echo")(message, timeout=60, wait_for_ready=True)


def connect(address, seconds=60):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), seconds)


def request(message=b"abc", path="/t.T/Echo", stream=1):
    """HEADERS and DATA of a unary call."""
    fields = [
        *frames.POST[:2],
        (":path", path),
        frames.POST[3],
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    body = struct.pack(">BI", 0, len(message)) + message
    return frames.headers(stream, frames.block(fields)) + frames.data(stream, body, ended=True)


GREETING = frames.PREFACE + frames.settings()
CALL = GREETING + frames.SETTINGS_ACK + request()


def read_until(end, what):
    received = b""
    while what not in received:
        piece = end.recv(65536)
        assert piece, received
        received += piece
    return received


def wait_until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def plain():
    with small_server() as server:
        yield server


@pytest.fixture(scope="module")
def secure(authority):
    with small_server("--tls", *authority.issue("server")) as server:
        yield server


# ---- one port ----


@pytest.mark.parametrize(("flags", "version"), [([], "1.1"), (["--http2"], "1.1"), (["--http2-prior-knowledge"], "2")])
def test_curl_and_grpc_are_answered_on_one_port(plain, flags, version):
    assert curl(*flags, f"http://{plain.address}/pid") == [str(plain.pid), version]
    assert echo(plain.address) == b"abc"


@pytest.mark.parametrize(
    ("flags", "version"),
    [
        (["--http1.1"], "1.1"),
        (["--http2"], "2"),
        (["--http2-prior-knowledge"], "2"),
        (["--no-alpn", "--http1.1"], "1.1"),
    ],
)
def test_curl_and_grpc_are_answered_through_tls(secure, authority, flags, version):
    url = f"https://localhost:{secure.address.rpartition(':')[2]}/pid"
    assert curl("--cacert", authority.roots, *flags, url) == [str(secure.pid), version]
    assert curl(*flags, url) is None  # which does not know our authority
    assert echo(secure.address, bytes(3 << 20), grpc.ssl_channel_credentials(authority.roots.read_bytes())) == bytes(
        3 << 20
    )


def test_only_clients_with_a_certificate_of_ours_get_in(authority, tmp_path):
    pair = authority.issue("client", "client.test")
    stranger = Authority(tmp_path).issue("client", "client.test")
    with small_server("--tls", *authority.issue("strict"), authority.roots) as server:
        url = f"https://localhost:{server.address.rpartition(':')[2]}/pid"
        for flags in (["--http1.1"], ["--http2"]):
            known = ["--cacert", authority.roots, *flags, url]
            assert curl("--cert", pair[0], "--key", pair[1], *known) is not None
            assert curl("--cert", stranger[0], "--key", stranger[1], *known) is None
            assert curl(*known) is None
        roots = authority.roots.read_bytes()
        allowed = grpc.ssl_channel_credentials(roots, pair[1].read_bytes(), pair[0].read_bytes())
        assert echo(server.address, credentials=allowed) == b"abc"
        server.process.terminate()
        assert "Traceback" not in server.end()[2]


def test_a_renewed_certificate_is_shown_without_a_restart(secure, authority):
    where = "localhost", int(secure.address.rpartition(":")[2])
    before = ssl.get_server_certificate(where, timeout=60)
    authority.issue("server")
    wait_until(lambda: ssl.get_server_certificate(where, timeout=60) != before)
    assert curl("--cacert", authority.roots, f"https://{where[0]}:{where[1]}/pid") is not None


def test_curl_and_grpc_are_answered_on_a_unix_socket(tmp_path):
    with small_server("--listen", f"unix:{tmp_path}/socket") as server:
        assert server.address == f"unix:{tmp_path}/socket"
        assert curl("--unix-socket", tmp_path / "socket", "http://x/pid") == [str(server.pid), "1.1"]
        assert curl("--unix-socket", tmp_path / "socket", "--http2-prior-knowledge", "http://x/pid") == [
            str(server.pid),
            "2",
        ]
        assert echo(server.address) == b"abc"


# ---- connections that break off ----


@pytest.mark.parametrize("how", ["closed", "half closed", "reset"])
def test_a_connection_dropped_at_any_byte_of_a_call_leaves_nothing(plain, how):
    def sweep():
        for cut in range(len(CALL) + 1):
            with connect(plain.address) as end:
                end.sendall(CALL[:cut])
                if how == "reset":
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif how == "half closed":
                    end.shutdown(socket.SHUT_WR)
                    while end.recv(65536):
                        pass
        wait_until(lambda: plain.connections == 0)

    with connect(plain.address) as end:
        end.sendall(CALL)
        read_until(end, b"grpc-status")  # so the bytes are those of a whole call
    sweep()
    resident = plain.resident_bytes
    for _ in range(3):
        sweep()
    assert plain.resident_bytes - resident < 2 << 20
    assert echo(plain.address) == b"abc"


def test_who_closes_its_side_after_a_request_gets_the_answer(plain):
    for said, answer in ((CALL, b"grpc-status"), (b"GET /pid HTTP/1.1\r\nhost: x\r\n\r\n", b"%d" % plain.pid)):
        with connect(plain.address) as end:
            end.sendall(said)
            end.shutdown(socket.SHUT_WR)
            read_until(end, answer)
            while end.recv(65536):
                pass


# ---- connections that take their time ----


@pytest.fixture(scope="module")
def hasty():
    """A server that waits for nobody long."""
    with small_server("--limit", "handshake_s=3", "--limit", "stall_s=3") as server:
        yield server


SLOW = {
    "HTTP/1.1 head": b"GET /pid HTTP/1.1\r\nhost: " + b"x" * 10_000,
    "HTTP/2 preface": GREETING,
    "HTTP/2 settings": frames.PREFACE + frames.frame(frames.Kind.SETTINGS, payload=bytes(6) * 1000),
}


@pytest.mark.parametrize("said", SLOW.values(), ids=SLOW)
def test_a_beginning_that_drips_is_not_waited_for(hasty, said):
    begin = time.monotonic()
    with connect(hasty.address) as end:
        with pytest.raises((TimeoutError, ConnectionError)) as raised:
            drip(end, said)
        assert isinstance(raised.value, ConnectionError)
        assert 2.9 < time.monotonic() - begin < 60
    assert echo(hasty.address) == b"abc"


def drip(end, said):
    """Send byte by byte, until the peer has closed."""
    for byte in said:
        end.sendall(bytes([byte]))
        end.settimeout(0.3)  # 33 bytes take much longer than they may
        with contextlib.suppress(TimeoutError):
            while end.recv(65536):
                pass
            raise ConnectionAbortedError
    raise TimeoutError


def test_who_never_reads_costs_little_and_is_closed_in_the_end(hasty):
    most = (1 << 31) - 1
    greeting = (
        frames.PREFACE + frames.settings((frames.Set.INITIAL_WINDOW, most)) + frames.window_update(0, most - 65535)
    )
    calls = b"".join(request(bytes(1 << 19), stream=number) for number in range(1, 400, 2))
    with connect(hasty.address) as end:
        end.sendall(greeting)
        read_until(end, frames.SETTINGS_ACK)
        resident = hasty.resident_bytes
        sent, peak = flood(end, calls, lambda: hasty.resident_bytes)
    assert sent < len(calls) // 2
    assert peak - resident < 32 << 20
    wait_until(lambda: hasty.connections == 0)
    assert echo(hasty.address) == b"abc"


def flood(end, said, measure):
    """Send without reading, until the peer has closed: how much of it went out, and the most that was measured."""
    sent = peak = 0
    begin = time.monotonic()
    end.settimeout(0.05)
    try:
        while time.monotonic() - begin < 60:
            peak = max(peak, measure())
            with contextlib.suppress(TimeoutError):
                sent += end.send(said[sent : sent + (1 << 20)])
    except ConnectionError:
        return sent, peak
    raise AssertionError("it was never closed")


# ---- very many connections ----


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY + 1000:
        pytest.skip(f"{hard} descriptors at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


IDLE = {
    "gRPC": (CALL, b"grpc-status", 24 << 10),
    "HTTP/1.1": (b"GET /pid HTTP/1.1\r\nhost: x\r\n\r\n", b"content-length", 6 << 10),
}


@pytest.mark.parametrize(("said", "answer", "most"), IDLE.values(), ids=IDLE)
@pytest.mark.alone  # measures memory and delays, with most of the ports that a machine has for clients
def test_ten_thousand_idle_connections_cost_little_and_delay_nobody(many_descriptors, said, answer, most):
    with small_server() as server, contextlib.ExitStack() as opened:
        echo(server.address)
        wait_until(lambda: server.connections == 0)
        before = server.resident_bytes
        ends = []
        for _ in range(MANY):
            ends.append(opened.enter_context(connect(server.address)))
            ends[-1].sendall(said)
        for end in ends:
            read_until(end, answer)
        assert server.connections == MANY
        each = (server.resident_bytes - before) / MANY
        print(f"{each:.0f} bytes a connection")
        assert each < most
        slowest = 0.0
        for _ in range(50):
            begin = time.monotonic()
            assert echo(server.address) == b"abc"
            slowest = max(slowest, time.monotonic() - begin)
        assert slowest < 5
        opened.close()
        wait_until(lambda: server.connections == 0)
        assert echo(server.address) == b"abc"
        server.process.terminate()
        assert server.end()[0] == 0


def test_an_idle_tls_connection_costs_little(secure, authority):
    context = authority.client(alpn=["h2"])
    wait_until(lambda: secure.connections == 0)
    with contextlib.ExitStack() as opened:

        def more(count):
            for _ in range(count):
                raw = opened.enter_context(connect(secure.address))
                end = opened.enter_context(context.wrap_socket(raw, server_hostname="localhost"))
                end.sendall(CALL)
                read_until(end, b"grpc-status")

        more(50)
        before = secure.resident_bytes
        more(300)
        each = (secure.resident_bytes - before) / 300
        print(f"{each:.0f} bytes a connection")
        assert each < 100 << 10
