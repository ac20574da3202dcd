"""Every door and every client of the RPC stack, each behind one face: what the contract suite is run against."""

import asyncio
import contextlib
import functools
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grpc
from grpc import aio
from places import BIN

from cube.errors import ServingError, from_wire
from cube.rpc.blocking_channel import BlockingChannel
from cube.rpc.calls import Kind
from cube.rpc.channel import Channel
from cube.rpc.grpcio_door import GrpcioDoor
from cube.rpc.listener import Listener

_COMPRESSION = {None: None, "gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a channel of this test, a connection of this test
]
_MAKES = {
    Kind.UNARY: "unary_unary",
    Kind.SERVER_STREAM: "unary_stream",
    Kind.CLIENT_STREAM: "stream_unary",
    Kind.BIDI: "stream_stream",
}


class ForgottenStatus(Exception):
    """grpcio's asyncio client ends a call by INTERNAL where the server ended it while a message was being sent."""


class Answer(NamedTuple):
    """What a call that went well brought."""

    messages: list[bytes]
    initial: tuple[tuple[str, str | bytes], ...]
    trailing: tuple[tuple[str, str | bytes], ...]

    @property
    def message(self):
        (only,) = self.messages
        return only


def fields_of(metadata, names="x-"):
    """Those that the test sent: each peer adds some of its own."""
    return tuple((name, value) for name, value in metadata or () if name.startswith(names))


async def ask(client, path, *requests, kind=Kind.UNARY, **options):
    """One whole call: send every request, wait for every reply."""
    if kind is Kind.UNARY and hasattr(client, "unary"):  # a way of its own for the usual case
        return await client.unary(path, *requests, **options)
    for attempt in range(50):
        with contextlib.suppress(ForgottenStatus):
            return await _ask(client, path, requests, kind, options, attempt * 0.01)
    raise AssertionError("grpcio never told how the call ended")


async def _ask(client, path, requests, kind, options, patience_s):
    call = await client.start(path, kind, None if kind.takes_stream else requests[0], **options)
    if patience_s:
        await call.over(patience_s)  # it may be refused for its head alone
    sending = asyncio.ensure_future(_send(call, requests if kind.takes_stream else ()))
    try:
        messages = []
        while (message := await call.receive()) is not None:
            messages.append(bytes(message))
        return Answer(messages, fields_of(await call.initial()), fields_of(await call.trailing()))
    finally:
        await sending


async def _send(call, requests):
    for request in requests:
        await call.send(request)
    await call.end()


def _grpcio_error(error):
    """What our channel would raise."""
    fields = tuple(error.trailing_metadata() or ())
    details = dict(fields).get("grpc-status-details-bin", b"")
    trailing = tuple((name, value) for name, value in fields if name != "grpc-status-details-bin")
    return from_wire(error.code().name, error.details() or "", details, trailing)


class GrpcioAio:
    """grpcio's asyncio client."""

    def __init__(self, target):
        self._channel = aio.insecure_channel(target, options=_OPTIONS)

    async def start(self, path, kind, request, timeout_s=100, metadata=(), compression=None):
        method = getattr(self._channel, _MAKES[kind])(path)
        given = () if kind.takes_stream else (request,)
        options = {"timeout": timeout_s, "metadata": tuple(metadata), "compression": _COMPRESSION[compression]}
        return _GrpcioAioCall(method(*given, **options), kind)

    async def close(self):
        await self._channel.close()


class _GrpcioAioCall:
    def __init__(self, call, kind):
        self._call, self._kind, self._taken = call, kind, False

    async def send(self, message):
        with contextlib.suppress(Exception):  # receive() says why
            await self._call.write(message)

    async def end(self):
        if self._kind.takes_stream:
            with contextlib.suppress(Exception):
                await self._call.done_writing()

    async def receive(self):
        try:
            if self._kind.gives_stream:
                message = await self._call.read()
                return None if message is aio.EOF else message
            if self._taken:
                return None
            message = await self._call
            self._taken = True
            return message
        except aio.AioRpcError as error:
            if (error.details() or "").startswith("Internal error from Core"):
                raise ForgottenStatus from error
            raise _grpcio_error(error) from error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            raise from_wire("CANCELLED", "by this client") from None

    async def over(self, seconds):
        """Wait until the call is over, at most so long."""
        await asyncio.wait({asyncio.ensure_future(self._call.code())}, timeout=seconds)

    async def initial(self):
        return await self._call.initial_metadata()

    async def trailing(self):
        return await self._call.trailing_metadata()

    def cancel(self):
        self._call.cancel()


class GrpcioSync:
    """grpcio's blocking client, on threads of its own."""

    def __init__(self, target):
        self._target, self._channels = target, {}
        self._threads = ThreadPoolExecutor(64)
        self._calls = []

    async def start(self, path, kind, request, timeout_s=100, metadata=(), compression=None):
        if compression not in self._channels:  # as an option of a call it has no effect on every kind
            coding = _COMPRESSION[compression]
            self._channels[compression] = grpc.insecure_channel(self._target, options=_OPTIONS, compression=coding)
        method = getattr(self._channels[compression], _MAKES[kind])(path)
        start = method if kind.gives_stream else method.future
        requests = queue.SimpleQueue()
        given = iter(requests.get, None) if kind.takes_stream else request
        call = start(given, timeout=timeout_s, metadata=tuple(metadata))
        self._calls.append(_GrpcioSyncCall(call, kind, requests, self._threads))
        return self._calls[-1]

    async def close(self):
        for call in self._calls:
            await call.end()  # a thread of grpcio's waits for what is sent
        for channel in self._channels.values():
            channel.close()
        self._threads.shutdown(wait=False)


class _GrpcioSyncCall:
    def __init__(self, call, kind, requests, threads):
        self._call, self._kind, self._requests, self._threads = call, kind, requests, threads
        self._taken = False

    async def _in_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def send(self, message):
        self._requests.put(message)

    async def end(self):
        self._requests.put(None)

    async def receive(self):
        try:
            if self._kind.gives_stream:
                return await self._in_thread(next, self._call, None)
            if self._taken:
                return None
            message = await self._in_thread(self._call.result)
            self._taken = True
            return message
        except grpc.RpcError as error:
            raise _grpcio_error(error) from error
        except grpc.FutureCancelledError:
            raise from_wire("CANCELLED", "by this client") from None

    async def initial(self):
        return await self._in_thread(self._call.initial_metadata)

    async def trailing(self):
        return await self._in_thread(self._call.trailing_metadata)

    def cancel(self):
        self._call.cancel()


class Ours:
    """Our asyncio channel."""

    def __init__(self, target):
        self._channel = Channel(target)

    async def start(self, path, kind, request, timeout_s=100, metadata=(), compression=None):
        options = {"metadata": metadata, "compression": compression}
        if kind is Kind.UNARY:
            return _OurUnaryCall(asyncio.ensure_future(self._channel.unary(path, request, timeout_s, **options)))
        return _OurCall(await self._channel.stream(path, request, timeout_s, **options), kind)

    async def close(self):
        await self._channel.close()


class _OurUnaryCall:
    def __init__(self, task):
        self._task, self._taken = task, False

    async def end(self):
        pass

    async def receive(self):
        if self._taken:
            return None
        try:
            answer = await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._task.cancelled():
                raise
            raise from_wire("CANCELLED", "by this client") from None
        self._taken = True
        return answer.message

    async def initial(self):
        return self._task.result().initial

    async def trailing(self):
        return self._task.result().trailing

    def cancel(self):
        self._task.cancel()


class _OurCall:
    def __init__(self, stream, kind):
        self._stream, self._kind = stream, kind

    async def send(self, message):
        with contextlib.suppress(ServingError):  # receive() says why
            await self._stream.send(message)

    async def end(self):
        if self._kind.takes_stream:
            await self._stream.end()

    async def receive(self):
        return await anext(self._stream, None)

    async def initial(self):
        return await self._stream.initial()

    async def trailing(self):
        return self._stream.trailing

    def cancel(self):
        self._stream.cancel()


class OursBlocking:
    """Our blocking channel, called from many threads."""

    def __init__(self, target):
        self._channel = BlockingChannel(target)
        self._threads = ThreadPoolExecutor(512)

    async def _in_thread(self, function, *args, **options):
        call = functools.partial(function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def unary(self, path, request, timeout_s=100, **options):
        answer = await self._in_thread(self._channel.unary, path, request, timeout_s, **options)
        return Answer([bytes(answer.message)], fields_of(answer.initial), fields_of(answer.trailing))

    async def start(self, path, kind, request, timeout_s=100, **options):
        stream = await self._in_thread(self._channel.stream, path, request, timeout_s, **options)
        return _OurBlockingCall(stream, kind, self._in_thread)

    async def close(self):
        self._channel.close()
        self._threads.shutdown(wait=False)


class _OurBlockingCall:
    def __init__(self, stream, kind, in_thread):
        self._stream, self._kind, self._in_thread = stream, kind, in_thread
        self._messages = iter(stream)

    async def send(self, message):
        with contextlib.suppress(ServingError):  # receive() says why
            await self._in_thread(self._stream.send, message)

    async def end(self):
        if self._kind.takes_stream:
            await self._in_thread(self._stream.end)

    async def receive(self):
        return await self._in_thread(next, self._messages, None)

    async def initial(self):
        return await self._in_thread(self._stream.initial)

    async def trailing(self):
        return self._stream.trailing

    def cancel(self):
        self._stream.cancel()


class Ran(NamedTuple):
    """What a program left."""

    code: int
    out: str
    err: str


async def grpcurl(*args):
    """Run grpcurl without TLS, beside a door in this process."""
    command = [str(BIN / "grpcurl"), "-plaintext", "-max-time", "90", *args]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        out, err = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Ran(process.returncode, out.decode(), err.decode())


class Tap:
    """A wire between client and door: counts what passes, and may be cut."""

    def __init__(self, target):
        self._host, _, self._port = target.rpartition(":")
        self.up = self.down = 0  # bytes to the door, bytes from it
        self._writers = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self):
        """Drop every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pass(reader, far_writer, "up"), self._pass(far_reader, writer, "down"))

    async def _pass(self, reader, writer, way):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 18):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


class Wire:
    """What a test works with."""

    def __init__(self, names, door, target, connect):
        self.names = names  # of the door and of the client
        self.door = door
        self.target = target  # where the door listens
        self.connect = connect  # connect(target) → another client of the same make
        self.client = connect(target)
        self._later = []

    async def ask(self, path, *requests, **options):
        return await ask(self.client, path, *requests, **options)

    def later(self, work):
        """A task for `work`, which need not be waited for."""
        self._later.append(asyncio.ensure_future(work))
        return self._later[-1]

    async def close(self):
        await self.client.close()
        await asyncio.gather(*self._later, return_exceptions=True)


# A door or a client that is not ready yet is left out here, and nowhere else.
DOORS = {"lean": lambda handlers, limits=None: Listener(handlers, None, limits), "grpcio": GrpcioDoor}
CLIENTS = {"grpcio-aio": GrpcioAio, "grpcio-sync": GrpcioSync, "ours": Ours, "ours-blocking": OursBlocking}

# What a call may end with that crosses the news that a door drains.
REFUSALS = {"lean": {"UNAVAILABLE"}, "grpcio": {"UNAVAILABLE", "CANCELLED"}}
# grpcio's server waits until a peer has answered a ping, and this one reads only while somebody waits for a reply.
DRAINS_LATE = {("grpcio", "ours-blocking")}

CLOSE_S = 60
LIMIT_S = 200  # of one test's work: it hangs no longer


def with_door(door_name, client_name, handlers, work, limits=None):
    """Run `work(wire)` with a door that serves `handlers` and a client that talks to it."""

    async def run():
        door = DOORS[door_name](handlers, limits)
        target = await door.start("127.0.0.1:0")
        wire = Wire((door_name, client_name), door, target, CLIENTS[client_name])
        try:
            return await asyncio.wait_for(work(wire), LIMIT_S)
        finally:
            await asyncio.wait_for(wire.close(), CLOSE_S)
            await asyncio.wait_for(door.drain(0.1), CLOSE_S)

    return asyncio.run(run())
