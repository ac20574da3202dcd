"""One port for every client: who may connect, for how long, what a connection costs, and how all of them end.

The first part speaks lines (see lines.py), so that each duty of a listener shows by itself; the second speaks HTTP.
"""

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import stat
import struct
import weakref

import pytest
import uvloop
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from lines import LineListener

from cube.errors import BadConfig
from cube.rpc.http2 import PREFACE
from cube.rpc.limits import Limits
from cube.rpc.listener import HIGH_WATER, Tls

LOOPS = {"uvloop": uvloop.run, "asyncio": asyncio.run}


@pytest.fixture(params=LOOPS)
def serve(request):
    """serve(listener factory, work): run work(listener, address) while it listens; nothing may be said to the loop's
    exception handler, and nothing may be left."""

    def serve(make, work, listen="127.0.0.1:0", seconds=120):
        complaints = []

        async def main():
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
            listener = make()
            try:
                async with asyncio.timeout(seconds):
                    return await work(listener, await listener.start(listen))
            finally:
                await listener.drain(0)
                assert listener.open == 0
                assert listener.budget.used == 0

        result = LOOPS[request.param](main())
        gc.collect(1)  # what was never closed complains now
        assert not complaints
        return result

    return serve


async def until(what, seconds=60):
    """Wait for something that has no event."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.002)


def port(address):
    return int(address.rpartition(":")[2])


async def connect(address, context=None):
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address[5:])
    host = "localhost" if context else address.rpartition(":")[0].strip("[]")
    return await asyncio.open_connection(host, port(address), ssl=context)


async def ask(address, line, context=None):
    """One line there and one back."""
    reader, writer = await connect(address, context)
    writer.write(line + b"\n")
    try:
        return await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def refused(asking):
    """The answer to what should get none."""
    try:
        return await asking
    except (ssl.SSLError, ConnectionError):
        return b""


async def ended(reader):
    """The rest of what a peer sends, None if it resets the connection."""
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionResetError:
        return None


# ---- addresses ----


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as one:
        one.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0", "[::]:0", "0.0.0.0:0"])
def test_every_kind_of_address_is_listened_on_and_named(serve, listen):
    if listen.startswith("[") and not has_ipv6():
        pytest.skip("this machine has no IPv6 address of its own")  # as containers often have not

    async def work(listener, address):
        assert address.startswith(listen[:-1])
        assert port(address) > 0
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(listen[:-2], listen[:-2])  # noqa: S104
        return await ask(f"{host}:{port(address)}", b"echo a"), listener.conversations[0].peer

    line, peer = serve(LineListener, work, listen)
    assert line == b"a\n"
    assert peer.startswith(("127.0.0.1:", "[::1]:"))


def test_a_wildcard_address_of_ipv6_takes_ipv4_too(serve):
    assert (
        serve(LineListener, lambda _, address: ask(f"127.0.0.1:{port(address)}", b"echo a"), listen="[::]:0") == b"a\n"
    )


def test_a_name_is_listened_on_at_each_of_its_addresses(serve):
    addresses = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}

    async def work(listener, address):
        return [await ask(f"{host}:{port(address)}", b"echo a") for host in addresses]

    assert serve(LineListener, work, "localhost:0") == [b"a\n"] * len(addresses)


@pytest.mark.parametrize("listen", ["", "8500", ":x", "host", "127.0.0.1:99999", "127.0.0.1:-1", "::1:0", "127.0.0.1:"])
def test_an_address_that_is_none_is_refused(listen):
    with pytest.raises(BadConfig, match=r"listen: found .*, expected host:port"):
        asyncio.run(LineListener().start(listen))


@pytest.mark.parametrize("listen", ["192.0.2.1:0", "no.such.host.invalid:0", "unix:/no/such/directory/socket"])
def test_an_address_that_is_not_ours_is_refused(listen):
    with pytest.raises(BadConfig, match=f"listen: found {listen}, which cannot be bound"):
        asyncio.run(LineListener().start(listen))


def test_a_port_that_is_taken_is_refused_and_named(serve):
    async def work(listener, address):
        for reuse_port in (False, True):
            with pytest.raises(BadConfig, match=f"listen: found {address}, which cannot be bound"):
                await LineListener().start(address, reuse_port)

    serve(LineListener, work)


def test_a_port_is_shared_by_those_who_all_say_so(serve):
    async def work(listener, address):
        other, third = LineListener(), LineListener()
        shared = await listener.start("127.0.0.1:0", reuse_port=True)
        assert await other.start(shared, reuse_port=True) == shared
        with pytest.raises(BadConfig):
            await third.start(shared)
        async with asyncio.timeout(60):
            while not (listener.accepted and other.accepted):
                assert await ask(shared, b"echo a") == b"a\n"
        await other.drain(0)

    serve(LineListener, work)


def test_a_unix_socket_is_for_our_user_only_and_goes_with_the_server(serve, tmp_path):
    path = tmp_path / "socket"

    async def work(listener, address):
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        line = await ask(address, b"echo a")
        assert listener.conversations[0].peer == "unix"
        await listener.drain(1)
        assert not path.exists()
        return line

    assert serve(LineListener, work, f"unix:{path}") == b"a\n"


def test_one_listener_has_any_number_of_ports(serve, tmp_path):
    async def work(listener, address):
        others = [await listener.start("127.0.0.1:0"), await listener.start(f"unix://{tmp_path}/socket")]
        return [await ask(each, b"echo a") for each in (address, *others)], listener.accepted

    assert serve(LineListener, work) == ([b"a\n"] * 3, 3)


def test_the_socket_of_a_dead_server_is_replaced(serve, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "socket"))
    assert serve(LineListener, lambda _, address: ask(address, b"echo a"), f"unix:{tmp_path}/socket") == b"a\n"


def test_the_socket_of_a_live_server_is_left_alone(serve, tmp_path):
    async def work(listener, address):
        with pytest.raises(BadConfig, match="that no server listens on"):
            await LineListener().start(address)
        return await ask(address, b"echo a")

    assert serve(LineListener, work, f"unix:{tmp_path}/socket") == b"a\n"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    file = tmp_path / "socket"
    file.write_text("precious")
    with pytest.raises(BadConfig, match="which cannot be bound"):
        asyncio.run(LineListener().start(f"unix:{file}"))
    assert file.read_text() == "precious"


def test_the_socket_of_a_successor_survives_the_end_of_its_predecessor(serve, tmp_path):
    async def work(listener, address):
        (tmp_path / "socket").unlink()
        successor = LineListener()
        await successor.start(address)
        await listener.drain(1)
        line = await ask(address, b"echo a")
        await successor.drain(0)
        return line

    assert serve(LineListener, work, f"unix:{tmp_path}/socket") == b"a\n"


def test_connections_send_at_once_and_notice_peers_that_vanish(serve):
    async def work(listener, address):
        _, writer = await connect(address)
        await until(lambda: listener.open)
        ours = writer.get_extra_info("sockname")
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
                if end.getpeername() == ours:
                    writer.close()
                    return (
                        end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                        end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                        end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    )
        raise AssertionError("no such connection")

    assert serve(LineListener, work) == (1, 1, 120)


# ---- the first bytes ----


def test_the_preface_of_http2_is_known_byte_by_byte(serve):
    async def work(listener, address):
        _, writer = await connect(address)
        for byte in PREFACE[:-1]:
            writer.write(bytes([byte]))
            await writer.drain()
        await asyncio.sleep(0)
        assert not listener.conversations
        writer.write(PREFACE[-1:] + b"echo a\n")
        await until(lambda: listener.conversations)
        (conversation,) = listener.conversations
        await until(lambda: conversation.received == len(PREFACE) + 7)
        writer.close()
        return conversation.is_http2

    assert serve(LineListener, work) is True


@pytest.mark.parametrize("first", [b"G", b"PO", PREFACE[:-1] + b"X", b"\x00", b"\x16\x03\x01"])
def test_the_first_other_byte_decides_for_http1(serve, first):
    async def work(listener, address):
        _, writer = await connect(address)
        writer.write(first)
        await until(lambda: listener.conversations)
        (conversation,) = listener.conversations
        await until(lambda: conversation.received == len(first))
        writer.close()
        return conversation.is_http2

    assert serve(LineListener, work) is False


# ---- replies ----


def test_replies_that_are_ready_together_leave_together(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(b"wait a\nwait b\nwait c\n")
        await until(lambda: len(listener.waiting) == 3)
        for name in "abc":
            listener.release(name)
        received = await reader.read(100)
        writer.close()
        return received

    assert serve(LineListener, work) == b"a\nb\nc\n"


def test_a_fault_that_one_connection_provokes_is_not_its_neighbours(serve, caplog):
    async def work(listener, address):
        held = [await connect(address) for _ in range(3)]
        for number, (reader, writer) in enumerate(held):
            writer.write(b"echo %d\n" % number)
            assert await reader.readline() == b"%d\n" % number

        def fails(*_):
            raise ZeroDivisionError("of a conversation")

        listener.conversations[0].tick = listener.conversations[1].take = fails
        listener.conversations[1].wake()
        assert [await ended(reader) for reader, _ in held[:2]] == [b"", b""]
        ticks = listener.conversations[2].ticks
        await until(lambda: listener.conversations[2].ticks > ticks + 2)
        for _, writer in held:
            writer.close()

    serve(lambda: LineListener(Limits(handshake_s=2)), work)
    assert caplog.text.count("a connection failed") == 2
    assert caplog.text.count("ZeroDivisionError: of a conversation") == 2


# ---- limits ----


@pytest.mark.parametrize("said", [b"", b"P", PREFACE[:23]])
def test_who_does_not_say_in_time_what_it_speaks_is_closed_and_counted(serve, said):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(said)
        assert await ended(reader) in (b"", None)
        writer.close()
        return listener.failed_handshakes, listener.open, len(listener.conversations)

    assert serve(lambda: LineListener(Limits(handshake_s=0.2)), work) == (1, 0, 0)


def test_a_preface_that_drips_is_not_waited_for(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        end = asyncio.ensure_future(ended(reader))
        for byte in PREFACE:  # which at this pace takes much longer than it may
            writer.write(bytes([byte]))
            if await asyncio.wait((end,), timeout=0.03) != (set(), {end}):
                break
        assert end.done()
        writer.close()
        return listener.failed_handshakes

    assert serve(lambda: LineListener(Limits(handshake_s=0.2)), work) == 1


def test_connections_over_the_limit_are_closed_and_counted(serve):
    async def work(listener, address):
        held = [await connect(address) for _ in range(3)]
        await until(lambda: listener.open == 3)
        reader, writer = await connect(address)
        assert await ended(reader) in (b"", None)
        writer.close()
        assert (listener.open, listener.accepted, listener.refused) == (3, 3, 1)
        held.pop()[1].close()
        await until(lambda: listener.open == 2)
        assert await ask(address, b"echo a") == b"a\n"
        for _, writer in held:
            writer.close()

    serve(lambda: LineListener(Limits(connections=3)), work)


def test_a_peer_that_never_reads_costs_little_and_is_closed_in_the_end(serve):
    ask_for_more = b"big 20000\n"

    async def work(listener, address):
        _, writer = await connect(address)
        writer.transport.pause_reading()
        peak = sent = 0
        with contextlib.suppress(ConnectionError):
            while listener.open or not sent:
                if not writer.transport.get_write_buffer_size():
                    writer.write(ask_for_more * 10)
                    sent += 10
                peak = max(peak, listener.budget.used)
                await asyncio.sleep(0.001)
        conversation = listener.conversations[0]
        assert conversation.pauses == 1
        assert conversation.gone
        writer.transport.abort()
        return peak

    # What was counted is what one read asked for, beyond what is always allowed; the kernel holds some MB more.
    peak = serve(lambda: LineListener(Limits(stall_s=0.4)), work)
    assert HIGH_WATER < peak < 100 << 20


def test_a_slow_reader_gets_everything_and_is_not_taken_for_a_stalled_one(serve):
    size = 8 << 20

    async def work(listener, address):
        reader, writer = await connect(address)
        writer.transport.set_write_buffer_limits(0)
        writer.write(b"big %d\nbye now\n" % size)
        received = 0
        while piece := await reader.read(256 << 10):
            received += len(piece)
            await asyncio.sleep(0.08)  # longer in all than a stalled reader has
        writer.close()
        return received

    assert serve(lambda: LineListener(Limits(stall_s=2)), work) == size + len("head\ntail\nnow\n")


def test_a_conversation_that_is_full_is_not_read_from_until_it_wakes_us(serve):
    async def work(listener, address):
        _, writer = await connect(address)
        writer.write(b"echo a\n")
        await until(lambda: listener.conversations)
        (conversation,) = listener.conversations
        conversation.full = True
        writer.write(b"echo b\n")
        await until(lambda: conversation.received == 14)  # this read was under way; after it we know
        ticks, more = conversation.ticks, bytes(1 << 20)
        writer.write(more)
        await until(lambda: conversation.ticks >= ticks + 3)
        assert conversation.received == 14
        conversation.full = False
        conversation.wake()
        await until(lambda: conversation.received == 14 + len(more))
        writer.close()

    serve(lambda: LineListener(Limits(handshake_s=2)), work)


def test_over_budget_a_connection_with_calls_in_flight_is_read_slowly_and_others_as_always(serve):
    async def work(listener, address):
        _, busy = await connect(address)
        busy.write(b"wait a\n")
        await until(lambda: listener.conversations)
        (conversation,) = listener.conversations
        listener.budget.take(101)
        busy.write(b"wait b\n")
        await until(lambda: conversation.received == 14)
        size, piece = 4 << 20, 256 << 10
        before = conversation.ticks
        busy.write(bytes(size))
        await until(lambda: conversation.ticks >= before + 4)
        assert conversation.received <= 14 + piece * (conversation.ticks - before + 1)
        assert await ask(address, b"echo c") == b"c\n"
        listener.budget.give(101)
        listener.release("a")
        await until(lambda: conversation.received == 14 + size)
        busy.close()

    serve(lambda: LineListener(Limits(total_bytes=100, handshake_s=2)), work)


# ---- ends ----


def test_a_reply_that_ends_the_connection_arrives_though_the_peer_still_sends(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(b"big 300000\nbye now\n" + bytes(1 << 20))
        received = await ended(reader)
        with contextlib.suppress(ConnectionError):
            writer.write(bytes(1 << 20))
            await writer.drain()
        writer.close()
        await until(lambda: listener.open == 0)
        return received and received[-4:], received and len(received)

    assert serve(LineListener, work) == (b"now\n", 300_014)


def test_a_peer_that_does_not_close_after_the_end_is_closed(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(b"bye now\n")
        assert await ended(reader) == b"now\n"
        assert listener.conversations[0].gone
        await until(lambda: listener.open == 0)
        writer.close()

    serve(lambda: LineListener(Limits(handshake_s=1)), work)


def test_a_peer_that_closes_its_side_is_gone_but_gets_what_was_written(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(b"big 1000000\nwait a\n")
        writer.write_eof()
        received = await ended(reader)
        writer.close()
        await until(lambda: listener.open == 0)
        return len(received), listener.conversations[0].gone

    assert serve(LineListener, work) == (1_000_010, True)


def test_a_peer_that_resets_the_connection_leaves_nothing(serve):
    async def work(listener, address):
        for said in (b"", b"P", b"echo", b"wait a\n"):
            _, writer = await connect(address)
            writer.write(said)
            await until(lambda: listener.open == 1)
            writer.transport.set_write_buffer_limits(0)
            await writer.drain()
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            await until(lambda: listener.open == 0)
        assert all(conversation.gone for conversation in listener.conversations)

    serve(LineListener, work)


def test_what_is_counted(serve):
    async def work(listener, address):
        assert await ask(address, b"echo a") == b"a\n"
        await until(lambda: listener.open == 0)
        return listener.accepted, listener.refused, listener.failed_handshakes, listener.bytes_in, listener.bytes_out

    assert serve(LineListener, work) == (1, 0, 0, 7, 2)


# ---- draining ----


def test_draining_refuses_the_new_closes_the_idle_and_waits_for_what_is_in_flight(serve):
    async def work(listener, address):
        idle, silent, busy = await connect(address), await connect(address), await connect(address)
        idle[1].write(b"echo a\n")
        busy[1].write(b"wait b\n")
        assert await idle[0].readline() == b"a\n"
        await until(lambda: len(listener.conversations) == 2)
        draining = asyncio.ensure_future(listener.drain(100))
        assert await ended(idle[0]) == await ended(silent[0]) == b""
        with pytest.raises(ConnectionError):
            await connect(address)
        assert not draining.done()
        listener.release("b")
        assert await ended(busy[0]) == b"b\n"
        for _, writer in (idle, silent, busy):
            writer.close()
        await draining

    serve(LineListener, work)


def test_draining_closes_what_is_in_flight_when_the_grace_is_over(serve):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(b"wait a\n")
        await until(lambda: listener.conversations)
        await listener.drain(0.05)
        assert listener.open == 0
        assert listener.conversations[0].gone
        assert await ended(reader) in (b"", None)
        writer.close()

    serve(LineListener, work)


def test_a_second_drain_with_less_patience_ends_the_first(serve):
    async def work(listener, address):
        _, writer = await connect(address)
        writer.write(b"wait a\n")
        await until(lambda: listener.conversations)
        patient = asyncio.ensure_future(listener.drain(100))
        await until(lambda: listener.conversations[0].draining)
        await listener.drain(0)
        await asyncio.wait_for(patient, 50)
        writer.close()

    serve(LineListener, work)


def test_after_draining_the_loop_holds_nothing_of_ours(serve):
    async def work(listener, address):
        passing = LineListener()
        address = await passing.start("127.0.0.1:0")
        tasks = asyncio.all_tasks()
        held = [await connect(address) for _ in range(5)]
        for _, writer in held:
            writer.write(b"wait a\n")
        await until(lambda: sum(map(len, passing.waiting.values())) == 5)
        await passing.drain(0)
        assert asyncio.all_tasks() <= tasks
        for _, writer in held:
            writer.transport.abort()
        ghost = weakref.ref(passing)
        passing = None
        await asyncio.sleep(0)
        gc.collect()
        assert ghost() is None  # no timer, no callback, no transport knows it

    serve(LineListener, work)


# ---- TLS ----


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls(authority):
    return Tls(*authority.issue("server"))


def test_lines_of_any_length_go_through_tls_both_ways(serve, tls, authority):
    size = 5 << 20

    async def work(listener, address):
        reader, writer = await asyncio.open_connection(
            "localhost", port(address), ssl=authority.client(), limit=2 * size
        )
        writer.write(b"echo " + b"x" * size + b"\nbig 100000\nbye now\n")
        assert await reader.readline() == b"x" * size + b"\n"
        received = await ended(reader)
        writer.close()
        return len(received), received[-4:]

    assert serve(lambda: LineListener(tls=tls), work) == (100_014, b"now\n")


@pytest.mark.parametrize(("offered", "is_http2"), [(["h2"], True), (["http/1.1"], False), (["h2", "http/1.1"], True)])
def test_what_alpn_agrees_on_is_spoken(serve, tls, authority, offered, is_http2):
    async def work(listener, address):
        reader, writer = await connect(address, authority.client(alpn=offered))
        await until(lambda: listener.conversations)  # before the first byte
        writer.write(b"echo a\n")
        assert await reader.readline() == b"a\n"
        writer.close()
        return listener.conversations[0].is_http2

    assert serve(lambda: LineListener(tls=tls), work) is is_http2


@pytest.mark.parametrize("offered", [[], ["spdy/3"]])
@pytest.mark.parametrize(("said", "is_http2"), [(PREFACE, True), (b"echo a\n", False)])
def test_without_alpn_the_first_bytes_decide(serve, tls, authority, offered, said, is_http2):
    async def work(listener, address):
        _, writer = await connect(address, authority.client(alpn=offered))
        writer.write(said)
        await until(lambda: listener.conversations)
        writer.close()
        return listener.conversations[0].is_http2

    assert serve(lambda: LineListener(tls=tls), work) is is_http2


def test_tls_ends_with_a_word_and_not_with_a_cut(serve, tls, authority):
    async def work(listener, address):
        def talk(said):
            with (
                socket.create_connection(("127.0.0.1", port(address)), 60) as raw,
                authority.client().wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as end,
            ):
                end.sendall(said)
                received = b""
                while piece := end.recv(1000):  # raises SSLEOFError without the word
                    received += piece
                return received

        ends = asyncio.to_thread(talk, b"bye now\n"), asyncio.to_thread(talk, b"wait a\n")
        tasks = [asyncio.ensure_future(end) for end in ends]
        await until(lambda: len(listener.conversations) == 2)
        draining = asyncio.ensure_future(listener.drain(60))
        await until(
            lambda: all(conversation.draining for conversation in listener.conversations if not conversation.gone)
        )
        listener.release("a")
        replies = await asyncio.gather(*tasks)
        await draining
        return replies

    assert serve(lambda: LineListener(tls=tls), work) == [b"now\n", b"a\n"]


def test_a_client_with_our_certificate_is_let_in_and_others_are_not(serve, authority, tmp_path):
    stranger = Authority(tmp_path / "strangers")

    async def work(listener, address):
        assert await ask(address, b"echo a", authority.client(*authority.issue("client", "client.test"))) == b"a\n"
        for pair in ((), stranger.issue("client", "client.test")):
            assert not await refused(ask(address, b"echo b", authority.client(*pair)))
        await until(lambda: listener.open == 0)
        return len(listener.conversations), listener.failed_handshakes

    make = lambda: LineListener(tls=Tls(*authority.issue("server"), client_ca=authority.roots))  # noqa: E731
    assert serve(make, work) == (1, 2)


def test_old_versions_of_tls_are_refused(serve, tls, authority):
    context = authority.client()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")

    async def work(listener, address):
        assert not await refused(ask(address, b"echo a", context))
        await until(lambda: listener.open == 0)
        return listener.failed_handshakes

    assert serve(lambda: LineListener(tls=tls), work) == 1


GARBAGE = {
    "plain HTTP": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "plain HTTP/2": PREFACE,
    "zeros": bytes(1000),
    "a record of nonsense": b"\x16\x03\x01\x00\x05hello",
    "an endless record": b"\x16\x03\x01\xff\xff" + bytes(1 << 20),
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_instead_of_tls_is_counted_and_closed(serve, tls, garbage, caplog):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(garbage)
        received = await ended(reader)
        assert received is None or len(received) <= 7  # an alert at most
        writer.close()
        await until(lambda: listener.open == 0)
        return listener.failed_handshakes

    assert serve(lambda: LineListener(tls=tls), work) == 1
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


def hello(context):
    """The first bytes of a client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


def test_a_handshake_that_is_cut_anywhere_is_counted_and_leaves_nothing(serve, tls, authority):
    whole = hello(authority.client())

    async def work(listener, address):
        for cut in range(1, len(whole) + 1, 7):
            _, writer = await connect(address)
            writer.write(whole[:cut])
            await until(lambda: listener.open == 1)
            writer.close()
            await until(lambda: listener.open == 0)
        return listener.failed_handshakes == listener.accepted

    assert serve(lambda: LineListener(tls=tls), work)


def test_who_connects_and_says_nothing_is_no_failed_handshake(serve, tls):
    async def work(listener, address):
        _, writer = await connect(address)
        await until(lambda: listener.open == 1)
        writer.close()
        await until(lambda: listener.open == 0)
        return listener.failed_handshakes

    assert serve(lambda: LineListener(tls=tls), work) == 0


@pytest.mark.parametrize("cut", [0, 5, 100, None])
def test_a_handshake_that_stops_is_not_waited_for(serve, tls, authority, cut):
    async def work(listener, address):
        reader, writer = await connect(address)
        writer.write(hello(authority.client())[:cut])
        await ended(reader)
        writer.close()
        return listener.failed_handshakes, listener.open

    assert serve(lambda: LineListener(Limits(handshake_s=0.2), tls), work) == (1, 0)


def test_an_open_session_that_turns_to_garbage_is_closed(serve, tls, authority):
    async def work(listener, address):
        def talk():
            with (
                socket.create_connection(("127.0.0.1", port(address)), 60) as raw,
                authority.client().wrap_socket(raw, server_hostname="localhost") as end,
                socket.socket(fileno=os.dup(end.fileno())) as beneath,
            ):
                end.sendall(b"wait a\n")
                beneath.settimeout(60)
                beneath.sendall(b"not a record at all")
                while beneath.recv(1000):
                    pass

        await asyncio.to_thread(talk)
        await until(lambda: listener.open == 0)
        return listener.conversations[0].gone, listener.failed_handshakes

    assert serve(lambda: LineListener(tls=tls), work) == (True, 0)


def test_a_client_that_ends_its_session_with_its_last_words_is_answered(serve, tls, authority):
    async def work(listener, address):
        reader, writer = await connect(address)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = authority.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
        client.write(b"echo a\nbye now\n")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.unwrap()
        writer.write(outgoing.read())  # the rest of the handshake, the lines and the end, in one piece
        incoming.write(await ended(reader))
        writer.close()
        await until(lambda: listener.open == 0)
        return client.read(100), listener.failed_handshakes

    assert serve(lambda: LineListener(tls=tls), work) == (b"a\nnow\n", 0)


async def serial(address, authority):
    """Of the certificate that the server shows."""
    _, writer = await connect(address, authority.client())
    try:
        return writer.get_extra_info("peercert")["serialNumber"]
    finally:
        writer.close()


def test_a_new_certificate_is_used_without_a_restart_and_open_connections_stay(serve, authority):
    pair = authority.issue("renewed")

    async def work(listener, address):
        reader, writer = await connect(address, authority.client())
        before = await serial(address, authority)
        authority.issue("renewed")
        async with asyncio.timeout(60):
            while await serial(address, authority) == before:
                await asyncio.sleep(0.01)
        writer.write(b"echo still here\n")
        assert await reader.readline() == b"still here\n"
        writer.close()

    serve(lambda: LineListener(Limits(handshake_s=4), Tls(*pair)), work)


class Client:
    """A client's end of a session, in memory."""

    def __init__(self, context, server):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        while self.session.version() is None or not server.is_open:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.session.do_handshake()
            server.receive(self.outgoing.read())
            self.incoming.write(server.take())

    def records(self, *messages):
        for message in messages:
            self.session.write(message)
        return self.outgoing.read()

    def read(self, records):
        self.incoming.write(b"".join(records))
        received = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self.session.read(1 << 20):
                received += piece
        return received


def test_what_comes_before_garbage_is_heard_and_its_answer_harms_nothing(tls, authority):
    server = tls.session()
    client = Client(authority.client(), server)
    assert server.receive(client.records(b"a", b"b") + b"garbage" * 10) == [b"a", b"b"]
    assert isinstance(server.failure, ssl.SSLError)
    assert server.pending
    server.send([b"answer"])
    server.send([bytes(100_000)])
    server.close()


@pytest.mark.parametrize("sizes", [[1], [0], [0, 1], [5, 9, 100_000, 24], [16 << 10, 1], [1, 16 << 10], [3] * 20_000])
def test_buffers_of_any_sizes_arrive_in_few_records(tls, authority, sizes):
    server = tls.session()
    client = Client(authority.client(), server)
    buffers = [memoryview(os.urandom(size)) for size in sizes]
    records = server.send(buffers)
    assert client.read(records) == b"".join(buffers)
    assert sum(map(len, records)) < sum(sizes) + 30 * (sum(sizes) // (16 << 10) + 3)


def test_files_that_do_not_fit_are_logged_once_and_the_old_certificate_stays(authority, caplog):
    certificate, key = authority.issue("torn")
    tls = Tls(certificate, key)

    def shown():
        return Client(authority.client(), tls.session()).session.getpeercert()["serialNumber"]

    before, other = shown(), authority.issue("other")
    certificate.write_bytes(other[0].read_bytes())  # the first half of a renewal
    for _ in range(3):
        tls.refresh()
    assert shown() == before
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1
    key.write_bytes(other[1].read_bytes())
    tls.refresh()
    assert shown() != before
    key.unlink()
    tls.refresh()
    assert shown() != before


def test_files_that_are_no_certificate_are_refused(authority, tmp_path):
    certificate, key = authority.issue("good")
    other, _ = authority.issue("another")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for wrong in (
        (tmp_path / "none.pem", key),
        (certificate, tmp_path / "none.key"),
        (nonsense, key),
        (other, key),
        (certificate, key, nonsense),
        (certificate, key, tmp_path / "none.pem"),
    ):
        with pytest.raises(BadConfig, match=f"TLS files {wrong[0]}"):
            Tls(*wrong)


def test_a_key_with_a_password_is_refused_without_asking_for_it(authority, tmp_path):
    certificate, key = authority.issue("locked")
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(BadConfig):
        Tls(certificate, locked)
