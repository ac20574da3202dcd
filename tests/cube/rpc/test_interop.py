"""The gRPC interoperability cases: every client against every door, our own ends among them.

The cases are those of gRPC's interop-test-descriptions, by their names there. Two things differ. A handler of ours is
not told whether a message came compressed, so the cases of compression do not ask the server: they count the bytes on
the wire. And where a case cancels or times out, it waits until the server's handler has been told, too.
"""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from interop_server import started, started_with_tls
from interop_service import (
    CALL_ID,
    ECHO_INITIAL,
    ECHO_TRAILING,
    OBSERVER,
    PEERS,
    SERVICE,
    CallId,
    InputRequest,
    InputResponse,
    InteropService,
    OutputRequest,
    OutputResponse,
    SimpleRequest,
    SimpleResponse,
)
from places import ROOT
from rpc_doors import CLIENTS, DOORS, ForgottenStatus, Tap, Wire, ask, with_door

from cube.errors import ServingError
from cube.rpc.calls import Kind

EMPTY_CALL = f"/{SERVICE}/EmptyCall"
UNARY_CALL = f"/{SERVICE}/UnaryCall"
OUTPUT_CALL = f"/{SERVICE}/StreamingOutputCall"
INPUT_CALL = f"/{SERVICE}/StreamingInputCall"
FULL_DUPLEX_CALL = f"/{SERVICE}/FullDuplexCall"
HALF_DUPLEX_CALL = f"/{SERVICE}/HalfDuplexCall"

REQUEST_SIZES = (27182, 8, 1828, 45904)
REPLY_SIZES = (31415, 9, 2653, 58979)
LARGE_REQUEST = SimpleRequest(response_size=314159, payload={"body": bytes(271828)}).SerializeToString()
METADATA = ((ECHO_INITIAL, "test_initial_metadata_value"), (ECHO_TRAILING, b"\xab\xab\xab"))
SPECIAL_MESSAGE = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
FORGOTTEN = "forgotten"  # grpcio's asyncio client did not say how a call ended


class Calls(NamedTuple):
    """A client, wherever its door is; a Wire is one, too."""

    client: Any

    async def ask(self, path, *requests, **options):
        return await ask(self.client, path, *requests, **options)


async def empty_unary(wire: Calls) -> None:
    assert (await wire.ask(EMPTY_CALL, b"")).message == b""


async def large_unary(wire: Calls) -> None:
    answer = await wire.ask(UNARY_CALL, LARGE_REQUEST)
    assert SimpleResponse.FromString(answer.message).payload.body == bytes(314159)


async def client_streaming(wire: Calls, compression: str | None = None) -> None:
    requests = [InputRequest(payload={"body": bytes(size)}).SerializeToString() for size in REQUEST_SIZES]
    answer = await wire.ask(INPUT_CALL, *requests, kind=Kind.CLIENT_STREAM, compression=compression)
    assert InputResponse.FromString(answer.message).aggregated_payload_size == sum(REQUEST_SIZES)


async def server_streaming(wire: Calls, compressed: bool = False) -> None:
    wanted = [{"size": size, "compressed": {"value": compressed}} for size in REPLY_SIZES]
    request = OutputRequest(response_parameters=wanted).SerializeToString()
    answer = await wire.ask(OUTPUT_CALL, request, kind=Kind.SERVER_STREAM)
    assert [size_of(reply) for reply in answer.messages] == list(REPLY_SIZES)


async def ping_pong(wire: Calls) -> None:
    call = await wire.client.start(FULL_DUPLEX_CALL, Kind.BIDI, None)
    for request_size, reply_size in zip(REQUEST_SIZES, REPLY_SIZES, strict=True):
        await call.send(asking(reply_size, request_size))
        assert size_of(await call.receive()) == reply_size
    await call.end()
    assert await call.receive() is None


async def half_duplex(wire: Calls) -> None:
    answer = await wire.ask(HALF_DUPLEX_CALL, *map(asking, REPLY_SIZES), kind=Kind.BIDI)
    assert [size_of(reply) for reply in answer.messages] == list(REPLY_SIZES)


async def empty_stream(wire: Calls) -> None:
    assert (await wire.ask(FULL_DUPLEX_CALL, kind=Kind.BIDI)).messages == []


async def custom_metadata(wire: Calls) -> None:
    unary = await wire.ask(UNARY_CALL, LARGE_REQUEST, metadata=METADATA)
    duplex = await wire.ask(FULL_DUPLEX_CALL, asking(314159, 271828), kind=Kind.BIDI, metadata=METADATA)
    for answer in (unary, duplex):
        assert (answer.initial, answer.trailing) == (METADATA[:1], METADATA[1:])


async def status_code_and_message(wire: Calls) -> None:
    status = {"code": 2, "message": "test status message"}
    for path, kind, request in (
        (UNARY_CALL, Kind.UNARY, SimpleRequest(response_status=status)),
        (FULL_DUPLEX_CALL, Kind.BIDI, OutputRequest(response_status=status)),
    ):
        with pytest.raises(ServingError) as failure:
            await wire.ask(path, request.SerializeToString(), kind=kind)
        assert failure.value.status[:2] == ("UNKNOWN", "test status message")


async def special_status_message(wire: Calls) -> None:
    status = {"code": 2, "message": SPECIAL_MESSAGE}
    with pytest.raises(ServingError) as failure:
        await wire.ask(UNARY_CALL, SimpleRequest(response_status=status).SerializeToString())
    assert failure.value.status[:2] == ("UNKNOWN", SPECIAL_MESSAGE)


async def unimplemented_method(wire: Calls) -> None:
    with pytest.raises(ServingError) as failure:
        await wire.ask(f"/{SERVICE}/UnimplementedCall", b"")
    assert failure.value.status.code == "UNIMPLEMENTED"


async def unimplemented_service(wire: Calls) -> None:
    with pytest.raises(ServingError) as failure:
        await wire.ask("/grpc.testing.UnimplementedService/UnimplementedCall", b"")
    assert failure.value.status.code == "UNIMPLEMENTED"


async def cancel_after_begin(wire: Calls) -> None:
    call = await wire.client.start(INPUT_CALL, Kind.CLIENT_STREAM, None)
    call.cancel()
    assert await rest_of(call) == ([], "CANCELLED")


async def cancel_after_first_response(wire: Calls) -> None:
    name = str(uuid.uuid4())
    call = await wire.client.start(FULL_DUPLEX_CALL, Kind.BIDI, None, metadata=((CALL_ID, name),))
    await call.send(asking(31415, 27182))
    assert size_of(await call.receive()) == 31415
    call.cancel()
    assert await rest_of(call) == ([], "CANCELLED")
    await handler_is_told(wire, name)


async def timeout_on_sleeping_server(wire: Calls) -> None:
    name = str(uuid.uuid4())
    call = await wire.client.start(FULL_DUPLEX_CALL, Kind.BIDI, None, timeout_s=0.2, metadata=((CALL_ID, name),))
    sleeping = {"size": 1, "interval_us": 60_000_000}
    await call.send(OutputRequest(response_parameters=[{"size": 31415}, sleeping]).SerializeToString())
    replies, code = await rest_of(call)
    assert code in ("DEADLINE_EXCEEDED", FORGOTTEN)
    if replies:  # on a machine that is too busy the deadline passes before the handler has begun
        await handler_is_told(wire, name)


CASES = [
    empty_unary,
    large_unary,
    client_streaming,
    server_streaming,
    ping_pong,
    half_duplex,
    empty_stream,
    custom_metadata,
    status_code_and_message,
    special_status_message,
    unimplemented_method,
    unimplemented_service,
    cancel_after_begin,
    cancel_after_first_response,
    timeout_on_sleeping_server,
]


async def client_compressed_unary(wire: Calls, compression: str = "gzip") -> None:
    request = SimpleRequest(payload={"body": bytes(271828)}).SerializeToString()
    await wire.ask(UNARY_CALL, request, compression=compression)


async def client_deflated_unary(wire: Calls) -> None:
    await client_compressed_unary(wire, compression="deflate")


async def client_compressed_streaming(wire: Calls) -> None:
    await client_streaming(wire, compression="gzip")


async def server_compressed_unary(wire: Calls) -> None:
    request = SimpleRequest(response_compressed={"value": True}, response_size=314159).SerializeToString()
    answer = await wire.ask(UNARY_CALL, request)
    assert SimpleResponse.FromString(answer.message).payload.body == bytes(314159)


async def server_compressed_streaming(wire: Calls) -> None:
    await server_streaming(wire, compressed=True)


COMPRESSED_CASES = [
    client_compressed_unary,
    client_deflated_unary,
    client_compressed_streaming,
    server_compressed_unary,
    server_compressed_streaming,
]
FEW_BYTES = 9_000  # of zeros a thousandth is left; headers, flow control and TLS are the most of what crosses


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_client_and_door_agree_on(case, door, client):
    with_door(door, client, InteropService().handlers(), case)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", COMPRESSED_CASES, ids=lambda case: case.__name__)
def test_messages_cross_the_wire_compressed_in(case, door, client):
    async def through_a_tap(wire: Wire) -> None:
        async with Tap(wire.target) as tap:
            tapped = wire.connect(tap.target)
            try:
                await case(Calls(tapped))
            finally:
                await tapped.close()
        assert tap.up + tap.down < FEW_BYTES

    with_door(door, client, InteropService().handlers(), through_a_tap)


@pytest.fixture(scope="module", params=DOORS)
def address(request) -> Iterator[str]:
    """A server behind each door, in a process of its own."""
    with started("--door", request.param) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_calls_of_one_connection_do_not_notice_each_other(address, client):
    """All cases at once, beside calls that are given up, each a little later than the one before."""

    async def given_up(wire: Calls, turns: int) -> None:
        call = await wire.client.start(UNARY_CALL, Kind.UNARY, LARGE_REQUEST)
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(ServingError):
            await call.receive()

    async def at_once() -> None:
        wire = Calls(CLIENTS[client](address))
        try:
            calls = [*(case(wire) for case in CASES * 3), *(given_up(wire, turns) for turns in range(60))]
            await asyncio.wait_for(asyncio.gather(*calls), 200)
        finally:
            await wire.client.close()

    asyncio.run(at_once())


@pytest.fixture(scope="module")
def javascript(address, node_modules) -> dict[str, str | None]:
    """What @grpc/grpc-js met in every case: by name, what went wrong or None."""
    return asyncio.run(called_from_javascript(node_modules, address))


@pytest.fixture(scope="module")
def javascript_over_tls(node_modules, tmp_path_factory) -> dict[str, str | None]:
    """The same over TLS."""
    with started_with_tls(tmp_path_factory.mktemp("tls")) as (address, root):
        return asyncio.run(called_from_javascript(node_modules, address, root))


async def called_from_javascript(node_modules: Path, address: str, *root: Path) -> dict[str, str | None]:
    """The cases with grpc-js against a server: by name, what went wrong or None."""
    async with AsyncExitStack() as stack:
        taps = {case.__name__: await stack.enter_async_context(Tap(address)) for case in COMPRESSED_CASES}
        plan = {case.__name__: address for case in CASES} | {name: tap.target for name, tap in taps.items()}
        line = [PEERS / "interop.js", PEERS / "interop.proto", json.dumps(plan), *root]
        here = {**os.environ, "NODE_PATH": str(node_modules)}
        node = await asyncio.create_subprocess_exec("node", *line, env=here, stdout=subprocess.PIPE)
        try:
            out, _ = await asyncio.wait_for(node.communicate(), 300)
        except TimeoutError:
            node.kill()
            await node.wait()
            raise
    assert node.returncode == 0
    met = {result["case"]: result["error"] for result in map(json.loads, out.splitlines())}
    for name, tap in taps.items():
        if tap.up + tap.down >= FEW_BYTES:
            met[name] = met[name] or f"{tap.up} bytes to the server and {tap.down} from it"
    return met


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *COMPRESSED_CASES], ids=lambda case: case.__name__)
def test_grpc_js_and_door_agree_on(case, javascript):
    assert javascript[case.__name__] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *COMPRESSED_CASES], ids=lambda case: case.__name__)
def test_grpc_js_and_listener_agree_over_tls_on(case, javascript_over_tls):
    assert javascript_over_tls[case.__name__] is None


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """What grpc-js needs, as the lock file has it; downloaded once for a checkout."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not on PATH (Debian: apt-get install nodejs npm)")
    home = ROOT / ".cache" / "grpc-js"
    home.mkdir(parents=True, exist_ok=True)
    wanted, installed = PEERS / "package-lock.json", home / "installed.json"
    with (home / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # other test processes want them, too
        if not installed.exists() or installed.read_bytes() != wanted.read_bytes():
            shutil.copy(PEERS / "package.json", home)
            shutil.copy(wanted, home)
            line = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retry-mintimeout=1000"]
            done = subprocess.run(line, cwd=home, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"npm cannot install @grpc/grpc-js here: {done.stderr.strip()[-300:]}")
            shutil.copy(wanted, installed)  # last: what is there is whole
    return home / "node_modules"


def asking(size: int, request_size: int = 8) -> bytes:
    """A request for one reply."""
    payload = {"body": bytes(request_size)}
    return OutputRequest(response_parameters=[{"size": size}], payload=payload).SerializeToString()


def size_of(reply: bytes) -> int:
    """Bytes in a streamed reply's payload."""
    return len(OutputResponse.FromString(bytes(reply)).payload.body)


async def rest_of(call) -> tuple[list[bytes], str]:
    """The replies that still come, and the status at the end."""
    replies = []
    try:
        while (reply := await call.receive()) is not None:
            replies.append(reply)
    except ServingError as error:
        return replies, error.status.code if error.status else error.wire.grpc
    except ForgottenStatus:
        return replies, FORGOTTEN
    return replies, "OK"


async def handler_is_told(wire: Calls, call_id: str) -> None:
    """Wait until the handler of a call knows that nobody waits for it."""
    await ask(wire.client, f"/{OBSERVER}/Cancelled", CallId(id=call_id).SerializeToString(), timeout_s=60)
