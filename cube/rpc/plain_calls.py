"""Requests over HTTP/2 that are not gRPC, for the router: health checks, metrics, a browser behind TLS."""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, cast

from cube.errors import Overloaded, ServingError
from cube.rpc.calls import Buffer, Reply
from cube.rpc.headers import Head, encode
from cube.rpc.http2 import ErrorCode, Stream
from cube.rpc.router import (
    Headers,
    HttpError,
    Inflater,
    Request,
    Response,
    Route,
    buffers,
    is_streamed,
    refusal,
    too_large,
)

if TYPE_CHECKING:
    from cube.rpc.server_calls import ServerCalls

_NAME, _VALUE = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+"), re.compile(r"[^\0-\x1f\x7f\u0100-\U0010ffff]*")
_QUEUED_BYTES = 1 << 20  # a streamed body waits while so much of it waits for the peer


class PlainCall:
    """One such request; a StreamCall of server_calls. Its body is collected whole, whatever the route would like."""

    __slots__ = (
        "_body", "_head", "_inflater", "_method", "_most", "_owner", "_path", "_request", "_route", "_stream", "_woken",
        "held", "task",
    )  # fmt: skip
    deadline: float | None = None  # handlers see to it

    def __init__(self, owner: "ServerCalls", stream: Stream, head: Head):
        self.held = 0
        self.task: asyncio.Future[Any] | None = None
        self._owner, self._stream, self._head = owner, stream, head
        self._method = (head.method or b"").decode("latin-1")
        self._path, _, query = (head.path or b"").decode("latin-1").partition("?")
        self._request = Request(self._method, self._path, query, Headers(head.fields), None, owner.peer)
        self._body = bytearray()
        self._inflater: Inflater | None = None
        self._route: Route | None = None
        self._most = owner.limits.body_bytes
        self._woken: asyncio.Future[None] | None = None

    def on_head(self, ended: bool) -> None:
        """The request begins: most refusals are known here."""
        router, content = self._owner.router, self._request.headers.get("content-type", "")
        try:
            if router is None or self._method == "CONNECT" or content.startswith("application/grpc"):
                raise HttpError(415 if router is None else 501, "only gRPC is served here")
            self._route, self._request.args = router.match(self._method, self._path)
            if self._route.max_body_bytes is not None:
                self._most = self._route.max_body_bytes
            if self._head.content_length is not None and self._head.content_length > self._most:
                raise too_large(self._most)
            if self._owner.is_over_limits:
                raise Overloaded("too many bytes in flight")
            encoding = self._request.headers.get("content-encoding", "identity").lower()
            if encoding != "identity" and not ended:
                self._inflater = Inflater(encoding, self._most)
        except ServingError as error:
            self._refuse(error)
            return
        if ended or not self._route.reads_body:
            self.on_end()

    def on_data(self, data: Buffer, ended: bool) -> None:
        """Part of the body."""
        self._owner.http2.consumed(self._stream, len(data))
        try:
            self._body += data if self._inflater is None else self._inflater.inflate(bytes(data))
            self._owner.hold(self, len(self._body))
            if len(self._body) > self._most:
                raise too_large(self._most)
            if self._owner.is_over_limits:
                raise Overloaded("too many bytes in flight")
        except ServingError as error:
            self._refuse(error)
            return
        if ended:
            self.on_end()

    def on_end(self) -> None:
        """The request is whole: have it answered."""
        assert self._route is not None
        try:
            if self._inflater is not None:
                self._inflater.finish()
        except ServingError as error:
            self._refuse(error)
            return
        body = bytes(self._body)
        self._request.body = _pieces(body) if self._route.stream else body or None
        response = self._route.answer(self._request)
        if isinstance(response, Response) and not is_streamed(response):
            self._respond(response)
        else:
            self.task = asyncio.get_running_loop().create_task(self._later(response))
            self._owner.watch(self, self.task)
            self.task.add_done_callback(self._owner.finished)

    async def _later(self, response: Response | Coroutine[Any, Any, Response]) -> None:
        if not isinstance(response, Response):
            response = await response
        if not is_streamed(response):
            self._respond(response)
            return
        pieces = cast(AsyncIterator[Reply], response.body)
        try:
            self._owner.http2.send_headers(self._stream, self._head_of(response, None))
            async for piece in pieces:
                parts = buffers(piece)
                self._owner.http2.send_data(self._stream, parts)
                self._owner.made += sum(map(len, parts))
                self._owner.flush()
                while self._owner.made > _QUEUED_BYTES:  # a handler may never wait by itself
                    await asyncio.sleep(0)
                while self._stream.pending > _QUEUED_BYTES or self._owner.paused:
                    self._woken = asyncio.get_running_loop().create_future()
                    await self._woken
            self._owner.http2.send_data(self._stream, (), ended=True)
        except Exception as error:  # too late for a status
            refusal(error, self._method, self._path)
            self._owner.http2.reset(self._stream, ErrorCode.INTERNAL_ERROR)
        finally:
            if hasattr(pieces, "aclose"):
                await pieces.aclose()
        self._over()

    def _respond(self, response: Response) -> None:
        try:
            parts = buffers(cast(Reply, response.body))
            head = self._head_of(response, sum(map(len, parts)))
        except (TypeError, BufferError, ValueError) as error:  # the handler's fault
            response = refusal(error, self._method, self._path)
            parts = buffers(cast(Reply, response.body))
            head = self._head_of(response, sum(map(len, parts)))
        if self._method == "HEAD" or not any(parts):
            self._owner.http2.send_headers(self._stream, head, ended=True)
        else:
            self._owner.http2.send_headers(self._stream, head)
            self._owner.http2.send_data(self._stream, parts, ended=True)
            self._owner.made += sum(map(len, parts))
        self._over()

    def _head_of(self, response: Response, size: int | None) -> bytes:
        """An encoded head; raises ValueError for fields that cannot be sent."""
        fields = [("content-type", response.content_type)]
        if size is not None and response.status != 204:
            fields.append(("content-length", str(size)))
        fields += [(name.lower(), value) for name, value in response.headers]
        if bad := [name for name, value in fields if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value))]:
            raise ValueError(f"response field {bad[0]!r}: found what HTTP cannot carry")
        head = [(name.encode("ascii"), value.encode("latin-1")) for name, value in fields]
        return encode([(b":status", b"%d" % response.status), *head])

    def _refuse(self, error: ServingError) -> None:
        self._respond(refusal(error, self._method, self._path))

    def _over(self) -> None:
        self._stream.call = None
        self._owner.dismiss(self._stream)
        self._owner.hold(self, 0)
        self._owner.flush()

    @property
    def is_receiving(self) -> bool:
        """Whether the next move is the peer's."""
        return self.task is None

    def may_send(self) -> None:
        """What waited for the peer has gone."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def gone(self) -> None:
        """The caller has gone: the handler is cancelled."""
        self._stream.call = None
        self._owner.hold(self, 0)
        if self.task is not None:
            self.task.cancel()


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    if body:
        yield body
