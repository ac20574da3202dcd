"""The client end of a connection: bytes out, bytes in, errors of ours."""

from types import TracebackType
from typing import Any

from grpc import aio

from cube.errors import from_wire


class Channel:
    """Calls to one endpoint, from one event loop. Connects on first use and again after a loss."""

    def __init__(self, target: str):
        """target: host:port."""
        self.target = target
        self._channel = aio.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_retries", 0),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._methods: dict[str, Any] = {}

    async def call(self, path: str, message: bytes, timeout_s: float, wait_for_ready: bool = False) -> bytes:
        """Send one message, return the reply.

        Raises a ServingError. `wait_for_ready`: wait for a server that is not there yet.
        """
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = self._channel.unary_unary(path)
        try:
            reply: bytes = await method(message, timeout=timeout_s, wait_for_ready=wait_for_ready)
        except aio.AioRpcError as error:
            raise from_wire(error.code().name, f"{error.details()} [{self.target}]") from error
        return reply

    async def close(self) -> None:
        """Give up calls in flight and disconnect."""
        await self._channel.close()

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
