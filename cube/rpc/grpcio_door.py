"""The same handlers behind grpcio's asyncio server: the lean door's twin, to compare with and for whoever must have it.

What differs is what grpcio does before or instead of us, and cannot be told otherwise:

* a message far over the port's limit (a method's own is ours) is refused by grpcio, in its words
* a call that crosses with the news that the door drains may end CANCELLED rather than UNAVAILABLE
* a unary call that ends without a message is left without an answer
* replies are compressed when the handler says so, even for a peer that did not say that it can read them
* a list of buffers is joined: grpcio takes nothing but bytes
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
from grpc import aio

from cube.errors import FAULT, BadConfig, ServingError, Status, to_wire
from cube.rpc import framing
from cube.rpc.calls import Call, Field, Handlers, Kind, Method, Reply, as_method
from cube.rpc.limits import Limits
from cube.rpc.sockets import cannot_be_bound

log = logging.getLogger(__name__)

# grpcio says that there are no more requests when the caller is gone, too, and only then cancels the handler: one that
# acts on all it was sent must not take the one for the other. It nearly always comes within 1 ms.
_CANCEL_S = 0.002
_MOST = (1 << 31) - 1  # that grpcio's options take; of a time, for ever
_COMPRESSION = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}


class GrpcioDoor:
    """One listening port. `start` opens it, `drain` closes it after the calls in flight are answered."""

    def __init__(self, handlers: Handlers, limits: Limits | None = None):
        """handlers: by full gRPC path, /package.Service/Method."""
        limits = limits or Limits()
        methods = {path: as_method(handler) for path, handler in handlers.items()}
        most = max([limits.message_bytes, *(method.max_request_bytes or 0 for method in methods.values())])
        self._server = aio.server(
            options=[
                # Of a message as it comes: one at the limit may have grown by being compressed.
                ("grpc.max_receive_message_length", min(most + (most >> 8) + 64, _MOST)),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", limits.streams),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1e3)),
                ("grpc.max_connection_idle_ms", min(int(limits.idle_s * 1e3) or _MOST, _MOST)),
                ("grpc.so_reuseport", 0),  # else a second server takes half the calls of the first, in silence
            ]
        )
        routes = {path: _Method(path, method, limits).as_grpcio() for path, method in methods.items()}
        self._server.add_generic_rpc_handlers((_Routes(routes),))

    async def start(self, listen: str) -> str:
        """Listen on host:port (port 0 for a free one); returns the address bound. Raises BadConfig."""
        host, _, port = listen.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise BadConfig("listen", repr(listen), "host:port")
        try:
            bound = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise cannot_be_bound(listen) from error
        await self._server.start()
        return f"{host}:{bound}"

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, wait for those in flight up to `grace_s` seconds, close."""
        await self._server.stop(grace_s)


class _Routes(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, methods: dict[str, Any]):
        self._methods = methods
        self._services = {path.rpartition("/")[0] for path in methods}

    def service(self, details: Any) -> Any:
        return self._methods.get(details.method) or self._unknown(details.method)

    def _unknown(self, path: str) -> Any:
        what = "method" if path.rpartition("/")[0] in self._services else "service"

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"unknown {what} {path[:200]}")

        return grpc.stream_stream_rpc_method_handler(refuse)  # fits a caller of any kind


class _Method:
    """One method as grpcio calls it."""

    def __init__(self, path: str, method: Method, limits: Limits):
        self._path, self._kind = path, method.kind
        self._handler: Any = method.handler  # its kind says what it takes and gives
        self._most = method.max_request_bytes or limits.message_bytes

    def as_grpcio(self) -> Any:
        match self._kind:
            case Kind.UNARY:
                return grpc.unary_unary_rpc_method_handler(self.unary_unary)
            case Kind.SERVER_STREAM:
                return grpc.unary_stream_rpc_method_handler(self.unary_stream)
            case Kind.CLIENT_STREAM:
                return grpc.stream_unary_rpc_method_handler(self.stream_unary)
            case Kind.BIDI:
                return grpc.stream_stream_rpc_method_handler(self.stream_stream)

    async def unary_unary(self, message: bytes, context: Any) -> bytes:
        return await self._reply(message, context)

    async def stream_unary(self, messages: Any, context: Any) -> bytes:
        return await self._reply(_Requests(context, self._most), context)

    async def unary_stream(self, message: bytes, context: Any) -> None:
        await self._replies(message, context)

    async def stream_stream(self, messages: Any, context: Any) -> None:
        await self._replies(_Requests(context, self._most), context)

    async def _reply(self, given: Any, context: Any) -> bytes:
        call = _Call(self._path, context)
        try:
            if type(given) is bytes:
                _check(given, self._most)
            answer = self._handler(given, call)
            reply = _joined(await answer if inspect.isawaitable(answer) else answer)
            await call.end()
            return reply
        except BaseException as error:
            await self._fail(call, error)

    async def _replies(self, given: Any, context: Any) -> None:
        call = _Call(self._path, context)
        try:
            if type(given) is bytes:
                _check(given, self._most)
            replies = self._handler(given, call)
            try:
                async for reply in replies:
                    await call.send(_joined(reply))
            finally:
                if (close := getattr(replies, "aclose", None)) is not None:
                    await close()
            await call.end()
        except BaseException as error:
            await self._fail(call, error)

    async def _fail(self, call: "_Call", error: BaseException) -> NoReturn:
        """Our errors become statuses, anything else is a fault of ours and stays in the log."""
        if isinstance(error, _Gone):
            raise error.error from None  # grpcio knows why
        if isinstance(error, asyncio.CancelledError):
            if call.cancelled:
                raise error
            cause, error = error, RuntimeError("the handler cancelled itself")
            error.__cause__ = cause
        if not isinstance(error, Exception):
            raise error
        if not isinstance(error, ServingError):
            log.error("%s failed", self._path, exc_info=error)
        try:
            await call.fail(to_wire(error))
        except _Gone as gone:
            raise gone.error from None


class _Call(Call):
    """A call, and the way of its replies into grpcio."""

    __slots__ = ("_begun", "_context", "_task")

    def __init__(self, path: str, context: Any):
        left = context.time_remaining()
        task = asyncio.current_task()
        assert task
        self._context, self._task, self._begun = context, task, False
        deadline = None if left is None else time.monotonic() + left
        super().__init__(path, tuple(context.invocation_metadata() or ()), deadline, _peer(context.peer()))

    @property
    def cancelled(self) -> bool:
        """What grpcio tells only the task, and that before the handler sees it."""
        return self._task.cancelling() > 0

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        assert not value  # the constructor's

    async def begin(self) -> None:
        """Send the head, if there is something in it and it has not been sent."""
        if self._begun:
            return
        metadata = _sendable(self._initial)
        self._begun = True
        if self.compression in _COMPRESSION:
            self._context.set_compression(_COMPRESSION[self.compression])
        elif not metadata:
            return  # grpcio sends an empty one by itself
        with _going():
            await self._context.send_initial_metadata(metadata)

    async def send(self, message: bytes) -> None:
        """Send one of several replies."""
        await self.begin()
        with _going():
            await self._context.write(message)

    async def end(self) -> None:
        """Have grpcio send the trailers, after the only reply if there is one."""
        trailing = _sendable(self._trailing)
        await self.begin()
        if trailing:
            self._context.set_trailing_metadata(trailing)

    async def fail(self, status: Status) -> NoReturn:
        """Send an error as the end."""
        trailing: tuple[Field, ...] = ()
        try:
            _sendable(self._initial)
            trailing = _sendable(self._trailing)
        except Exception:
            log.exception("%s failed", self.path)
            status = FAULT
        else:
            await self.begin()
        if status.details:
            trailing += (("grpc-status-details-bin", status.details),)
        await self._context.abort(grpc.StatusCode[status.code], status.message, trailing)
        raise AssertionError("abort returned")


class _Requests:
    """The messages of a caller that sends several."""

    def __init__(self, context: Any, most: int):
        self._context, self._most = context, most

    def __aiter__(self) -> "_Requests":
        return self

    async def __anext__(self) -> bytes:
        message = await self._context.read()
        if message is aio.EOF:
            await asyncio.sleep(_CANCEL_S)
            raise StopAsyncIteration
        _check(message, self._most)
        return message  # type: ignore[no-any-return]


class _Gone(Exception):
    """The caller went while something was sent to it."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error


@contextmanager
def _going() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Gone(error) from error


def _peer(name: str) -> str:
    """host:port of ipv4:host:port and ipv6:%5Bhost%5D:port; unix of unix:path."""
    family, _, address = name.partition(":")
    return "unix" if family == "unix" else unquote(address)


def _check(message: bytes, most: int) -> None:
    if len(message) > most:
        raise framing.MessageTooLarge(len(message), most)


def _sendable(metadata: list[Field] | None) -> tuple[Field, ...]:
    """Metadata as grpcio takes it; raises BadRequest for what the lean door would not send."""
    if not metadata:
        return ()
    framing.encode_metadata(metadata)
    sendable: list[Field] = []
    for name, value in metadata:
        if not name.endswith("-bin"):
            value = value.strip()
        elif isinstance(value, str):
            value = value.encode()
        sendable.append((name, value))
    return tuple(sendable)


def _joined(reply: Reply) -> bytes:
    if isinstance(reply, bytes):
        return reply
    return b"".join(reply if isinstance(reply, list | tuple) else (reply,))
