"""The handlers behind grpcio's asyncio server."""

import asyncio
import inspect
import logging
import time
from collections.abc import Mapping
from typing import Any

import grpc
from grpc import aio

from cube.errors import BadConfig, Internal, ServingError
from cube.rpc.calls import Call, Handler

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20


class GrpcioDoor:
    """One listening port. `start` opens it, `drain` closes it after the calls in flight are answered."""

    def __init__(self, handlers: Mapping[str, Handler], max_message_bytes: int = MAX_MESSAGE_BYTES):
        """handlers: by full gRPC path, /package.Service/Method."""
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # else a second server takes half the calls of the first, in silence
            ]
        )
        self._server.add_generic_rpc_handlers((_Routes({path: _grpcio(path, h) for path, h in handlers.items()}),))

    async def start(self, listen: str) -> str:
        """Listen on host:port (port 0 for a free one); returns the address bound. Raises BadConfig."""
        host, _, port = listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise BadConfig("listen", repr(listen), "host:port")
        try:
            bound = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise BadConfig(
                "listen", f"{listen}, which cannot be bound", "an address of this machine with a free port"
            ) from error
        await self._server.start()
        return f"{host}:{bound}"

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, wait for those in flight up to `grace_s` seconds, close."""
        await self._server.stop(grace_s)


class _Routes(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, methods: dict[str, Any]):
        self._methods = methods

    def service(self, details: Any) -> Any:
        return self._methods.get(details.method)


def _grpcio(path: str, handler: Handler) -> Any:
    """A handler as grpcio wants it.

    Our errors become statuses, anything else is a fault of ours and stays in the log.
    """

    async def answer(request: bytes, context: Any) -> bytes:
        left = context.time_remaining()
        metadata = dict(context.invocation_metadata() or ())
        call = Call(path, metadata, None if left is None else time.monotonic() + left)
        try:
            reply = handler(request, call)
            return await reply if inspect.isawaitable(reply) else reply
        except ServingError as error:
            await context.abort(grpc.StatusCode[error.wire.grpc], str(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed", path)
            await context.abort(grpc.StatusCode[Internal.wire.grpc], "internal error; the server's log has it")
        raise AssertionError("abort returned")

    return grpc.unary_unary_rpc_method_handler(answer)
