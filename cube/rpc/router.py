"""Plain HTTP: requests, responses, and which handler answers what. No transport in here: HTTP/1.1 and HTTP/2 share it.

A transport asks `Router.match` for the route as soon as it knows method and path, because the route says how much body
there may be and whether the handler reads it as it arrives (`Route.stream`). Then `Route.answer(request)` gives a
Response, or a coroutine of one; neither ever raises (a coroutine can be cancelled). A transport that would rather not
make a task for what is promised anyway asks `Route.begin` and, when the promise is kept, `Route.kept`. What a transport
still does:

* a response to HEAD is the one to GET: send its head, not its body
* a body that is an asynchronous iterator is sent piece by piece, and closed (`aclose`) if the peer goes away
* request bodies are decoded with an `Inflater`; the bodies of responses are compressed here
"""

import asyncio
import inspect
import json
import logging
import re
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

from cube.errors import ServingError, Wire
from cube.rpc.calls import Buffer, Reply
from cube.rpc.framing import octets

log = logging.getLogger(__name__)

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

_WORTH_COMPRESSING = 512  # bytes; below, the reply fits one packet anyway
_LEVEL = 1  # of zlib: JSON shrinks almost as much as at 6, in a third of the time


class HttpError(ServingError):
    """A refusal that only HTTP has a status for."""

    def __init__(self, status: int, text: str):
        self.wire = Wire("INVALID_ARGUMENT" if status < 500 else "INTERNAL", status, retry=status in (408, 429, 503))
        super().__init__(text)


class Headers(Mapping[str, str]):
    """Fields of a request by name in lower case; repeated ones are joined with a comma. Made when first asked for."""

    __slots__ = ("_fields", "_values")

    def __init__(self, fields: Sequence[tuple[bytes, bytes]]):
        """fields: as received; pseudo-fields of HTTP/2 are left out."""
        self._fields = fields
        self._values: dict[str, str] | None = None

    def _made(self) -> dict[str, str]:
        if self._values is None:
            values: dict[str, str] = {}
            for raw_name, raw_value in self._fields:
                name, value = raw_name.decode("latin-1").lower(), raw_value.strip(b" \t").decode("latin-1")
                if name in values:
                    value = f"{values[name]}{'; ' if name == 'cookie' else ', '}{value}"
                if not name.startswith(":"):
                    values[name] = value
            self._values = values
        return self._values

    def __getitem__(self, name: str) -> str:
        return self._made()[name]

    def get(self, name: str, default: Any = None) -> Any:
        """As every mapping's, which asks by way of an exception: here most names that are asked for are not there."""
        return self._made().get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


_NO_ARGS: Mapping[str, str] = MappingProxyType({})


class Request:
    """What a handler is told. Headers and args may be shared with other requests: they are only read."""

    __slots__ = ("args", "body", "deadline", "headers", "method", "path", "peer", "query")

    def __init__(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Mapping[str, str] = _NO_ARGS,
        body: Any = None,
        peer: str = "",
        args: Mapping[str, str] = _NO_ARGS,
        deadline: float | None = None,
    ):
        """path: as sent, percent-encoded. body: bytes, decompressed; None where the request has none; under a route
        with `stream`, an asynchronous iterator of bytes, which raises a ServingError where the body breaks off.
        args: the parameters of the route's pattern, decoded. deadline: time.monotonic() at which the caller stops
        waiting."""
        self.method, self.path, self.query, self.headers = method, path, query, headers
        self.body, self.peer, self.args, self.deadline = body, peer, args, deadline


class Response:
    """What a handler returns. It is not changed afterwards: a handler may return the same one every time."""

    __slots__ = ("body", "compress", "content_type", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        body: Reply | AsyncIterable[Reply] = b"",
        content_type: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
        compress: bool = False,
    ):
        """headers: names in lower case; lengths, dates and what concerns the connection are the transport's.
        compress: with gzip, for a client that accepts it."""
        self.status, self.body, self.content_type, self.headers = status, body, content_type, headers
        self.compress = compress


# A response, or a function that makes one and takes long: it is called in a thread.
Made: TypeAlias = Response | Callable[[], Response]
# A plain function runs on the event loop, with no task: it must be short. So does one that returns an asyncio.Future.
Handler: TypeAlias = Callable[[Request], Made | Awaitable[Made]]


def buffers(body: Reply) -> list[Buffer]:
    """The bytes of a body, uncopied. Raises TypeError or BufferError for what has none, or has gaps."""
    return [octets(part) for part in body] if isinstance(body, list | tuple) else [octets(body)]


def is_streamed(response: Response) -> bool:
    """Whether the body comes piece by piece."""
    return not isinstance(response.body, bytes) and hasattr(response.body, "__aiter__")


def refusal(error: Exception, method: str, path: str) -> Response:
    """The response that tells of an error. What is no ServingError goes to the log; call it where it was caught."""
    if isinstance(error, ServingError):
        return _told(error.wire.http, str(error))
    log.error("%s %s failed", method, path, exc_info=error)
    return internal()


def internal() -> Response:
    """The response that tells of a fault of ours and nothing else; what is known of it goes to the log."""
    return _told(500, "internal error; the server's log has it")


def _told(status: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
    return Response(status, json.dumps({"error": text}).encode(), headers=headers)


class Route:
    """A handler and what it wants to be given."""

    __slots__ = ("_is_coroutine_function", "handler", "max_body_bytes", "reads_body", "stream")

    def __init__(
        self, handler: Handler, max_body_bytes: int | None = None, stream: bool = False, reads_body: bool = True
    ):
        """max_body_bytes: instead of `Limits.body_bytes`. reads_body: False where the answer is known without it."""
        self.handler, self.max_body_bytes, self.stream, self.reads_body = handler, max_body_bytes, stream, reads_body
        self._is_coroutine_function = inspect.iscoroutinefunction(handler)

    def answer(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        """Call the handler. Errors are responses too."""
        made = self.begin(request)
        return self._later(request, made) if isinstance(made, asyncio.Future) else made

    def begin(self, request: Request) -> "Response | asyncio.Future[Made] | Coroutine[Any, Any, Response]":
        """As `answer`, but a future that the handler returns comes as it is: `kept` is for what becomes of it."""
        # A coroutine function is called in the coroutine: one that is cancelled before it starts leaves nothing behind.
        if self._is_coroutine_function:
            return self._later(request)
        try:
            response = self.handler(request)
            if isinstance(response, Response):
                return _compressed(response, request) if response.compress else response
        except Exception as error:
            return refusal(error, request.method, request.path)
        return response if isinstance(response, asyncio.Future) else self._later(request, response)

    def kept(self, promise: "asyncio.Future[Made]", request: Request) -> Response | Coroutine[Any, Any, Response]:
        """The response to a request whose future is done."""
        if promise.cancelled():
            return self._cancelled_from_within(request, asyncio.CancelledError())
        if (error := promise.exception()) is not None:
            return refusal(cast(Exception, error), request.method, request.path)
        response = promise.result()
        if not isinstance(response, Response):
            return self._later(request, response)
        return _compressed(response, request) if response.compress else response

    async def _later(self, request: Request, pending: Awaitable[Made] | Made | None = None) -> Response:
        try:
            made: Any = self.handler(request) if pending is None else pending
            response = await made if inspect.isawaitable(made) else made
            if not isinstance(response, Response) and callable(response):
                response = await asyncio.to_thread(response)
            if not isinstance(response, Response):
                raise TypeError(f"{self.handler}: found {type(response)}, expected a Response")
            return _compressed(response, request) if response.compress else response
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._cancelled_from_within(request, error)
        except Exception as error:
            return refusal(error, request.method, request.path)

    def _cancelled_from_within(self, request: Request, error: asyncio.CancelledError) -> Response:
        """Something that the handler waited for was cancelled; the caller, who was not, still gets an answer."""
        return refusal(RuntimeError(f"cancelled from within: {error!r}"), request.method, request.path)


def _compressed(response: Response, request: Request) -> Response:
    """The response in gzip if the client reads that and there is something to gain."""
    if type(response.body) is bytes and len(response.body) < _WORTH_COMPRESSING:
        return response
    headers = [*response.headers, ("vary", "accept-encoding")]
    body: Any = response.body
    encoded = any(name.lower() == "content-encoding" for name, _ in response.headers)
    if not encoded and accepts_gzip(request.headers.get("accept-encoding", "")):
        if is_streamed(response):
            body = _gzipped(body)
            headers.append(("content-encoding", "gzip"))
        elif sum(map(len, plain := buffers(body))) >= _WORTH_COMPRESSING:
            press = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
            body = [*filter(None, map(press.compress, plain)), press.flush()]
            headers.append(("content-encoding", "gzip"))
    return Response(response.status, body, response.content_type, headers)


async def _gzipped(pieces: AsyncIterator[Reply]) -> AsyncIterator[Buffer]:
    press = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    try:
        async for piece in pieces:
            # Flushed each time: who streams wants the piece to arrive now.
            yield b"".join([*map(press.compress, buffers(piece)), press.flush(zlib.Z_SYNC_FLUSH)])
        yield press.flush()
    finally:
        if hasattr(pieces, "aclose"):
            await pieces.aclose()


_GZIP_WANTED = re.compile(r"(?i)[ \t]*(gzip|x-gzip|\*)[ \t]*(?:;[ \t]*q=([01](?:\.[0-9]{0,3})?)[ \t]*)?")


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client with this Accept-Encoding reads gzip (RFC 9110 §12.5.3)."""
    named: dict[str, bool] = {}
    for item in accept_encoding.split(","):
        if match := _GZIP_WANTED.fullmatch(item):
            named[match[1].lower().removeprefix("x-")] = match[2] is None or float(match[2]) > 0
    return named.get("gzip", named.get("*", False))


class Inflater:
    """Decodes a request body as it arrives, and never makes more than `limit` bytes of it."""

    __slots__ = ("_inflate", "_left", "_limit")

    def __init__(self, encoding: str, limit: int):
        """encoding: a Content-Encoding. Raises HttpError 415 for one that is not decoded here."""
        name = encoding.lower()
        if name not in ("gzip", "x-gzip", "deflate"):
            raise HttpError(415, f"content-encoding: found {encoding[:100]!r}, expected gzip or deflate")
        self._inflate = zlib.decompressobj(15 if name == "deflate" else 31)
        self._limit = self._left = limit

    def inflate(self, data: bytes, at_most: int | None = None) -> bytes:
        """Decode the next piece. With `at_most`, the rest of what it holds comes out of `inflate(b"", at_most)`, until
        that gives fewer bytes. Raises HttpError: 413 beyond the limit, 400 for what is no such stream or goes on after
        its end (so do several gzip members in a row: nobody sends them, and empty ones cost more than they weigh)."""
        most = self._left + 1 if at_most is None else min(at_most, self._left + 1)
        try:
            out = self._inflate.decompress(self._inflate.unconsumed_tail + data, most)
        except zlib.error as error:
            raise HttpError(400, f"body: found bytes that do not decompress ({error})") from None
        self._left -= len(out)
        if self._left < 0:
            raise too_large(self._limit)
        if self._inflate.unused_data:
            raise HttpError(400, "body: found bytes after the end of the compressed stream")
        return out

    def finish(self) -> None:
        """The body has ended. Raises HttpError 400 where the stream in it has not."""
        if not self._inflate.eof:
            raise HttpError(400, "body: found the end of the body, expected the rest of the compressed stream")


def too_large(limit: int) -> HttpError:
    """The refusal of a body that is longer than it may be."""
    return HttpError(413, f"body: found more than {limit} bytes, expected at most that")


_PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
_ANY_OTHER = ""  # in a path's table: the route that answers the methods which the path does not have


class _Path:
    """What answers at one path or pattern."""

    __slots__ = ("_own", "pattern", "table")

    def __init__(self, pattern: re.Pattern[str] | None = None):
        self.pattern = pattern
        self._own: dict[str, Route] = {}  # as added
        self.table: dict[str, Route] = {}  # with what follows from it

    def add(self, method: str, route: Route) -> bool:
        """False: the method has a route already."""
        if method in self._own:
            return False
        self._own[method] = route
        allow = ("allow", ", ".join(sorted({*self._own, "OPTIONS", *(["HEAD"] if "GET" in self._own else [])})))
        options = Response(204, headers=[allow])
        self.table = {
            **({"HEAD": self._own["GET"]} if "GET" in self._own else {}),
            "OPTIONS": Route(lambda request: options, reads_body=False),
            **self._own,
            _ANY_OTHER: Route(
                lambda request: _told(
                    405, f"{request.path[:200]}: found {request.method}, expected one of {allow[1]}", [allow]
                ),
                reads_body=False,
            ),
        }
        return True


class Router:
    """Handlers by method and path. Routes are added before the first request."""

    __slots__ = ("_by_path", "_by_pattern", "_matched", "memory")

    def __init__(self) -> None:
        whole_server = _Path()
        whole_server.table = {"OPTIONS": Route(lambda request: Response(204), reads_body=False), _ANY_OTHER: _NOT_FOUND}
        self._by_path = {"*": whole_server}
        self._by_pattern: dict[str, _Path] = {}
        self._matched: dict[str, tuple[dict[str, Route], Mapping[str, str]]] = {}  # what paths led to; bounded
        # What a transport has worked out about request heads, routes included, by their bytes. Its user bounds it.
        self.memory: dict[bytes, Any] = {}

    def add(
        self, method: str, pattern: str, handler: Handler, *, max_body_bytes: int | None = None, stream: bool = False
    ) -> None:
        """Answer `method` at `pattern` with `handler`.

        A pattern is a path, in which `{name}` stands for one or more characters that are neither / nor : and is
        followed by one of these or by the end: /v1/tables/{name}, /v1/tables/{name}:lookup. Who means a colon within a
        name sends %3A. A path without parameters goes before patterns that fit it, and these in the order of adding.

        A GET handler also answers HEAD; OPTIONS answers itself. `max_body_bytes` is this route's own limit.
        `stream`: the handler is called when the head is there, and request.body is an asynchronous iterator.

        Raises ValueError for what is no pattern, or has a handler already.
        """
        if method not in METHODS:
            raise ValueError(f"route {pattern}: found method {method!r}, expected one of {', '.join(METHODS)}")
        if not self._path(pattern).add(method, Route(handler, max_body_bytes, stream)):
            raise ValueError(f"route {method} {pattern}: found a second handler, expected one")
        self._matched.clear()
        self.memory.clear()

    def _path(self, pattern: str) -> _Path:
        literals, names = _PARAMETER.split(pattern)[::2], _PARAMETER.findall(pattern)
        # Text after a parameter that could belong to it would make matching ambiguous, and slow on purpose.
        if (
            not pattern.startswith("/")
            or any(re.search(r"[{}?#%\s]", literal) for literal in literals)
            or any(literal[:1] not in ("/", ":") for literal in literals[1:-1])
            or (names and literals[-1][:1] not in ("", "/", ":"))
            or len(set(names)) < len(names)
        ):
            raise ValueError(f"route: found {pattern!r}, expected a path like /v1/tables/{{name}}:lookup")
        if not names:
            return self._by_path.setdefault(pattern, _Path())
        shape = "([^/:]+)".join(map(re.escape, literals))
        path = self._by_pattern.get(shape)
        if path is None:
            parts = (
                f"(?P<{name}>[^/:]+){re.escape(literal)}" for name, literal in zip(names, literals[1:], strict=True)
            )
            path = self._by_pattern[shape] = _Path(re.compile(re.escape(literals[0]) + "".join(parts)))
        elif path.pattern is not None and list(path.pattern.groupindex) != names:
            raise ValueError(f"route {pattern}: found other parameters than in {path.pattern.pattern}")
        return path

    def match(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route of a request and the parameters in its path. What is not here has a route that says so."""
        known = self._by_path.get(path)
        if known is not None:
            return known.table.get(method) or known.table[_ANY_OTHER], _NO_ARGS
        found = self._matched.get(path)
        if found is None:
            found = self._match_pattern(path)
            if len(path) <= 256:
                if len(self._matched) >= 512:
                    self._matched.clear()
                self._matched[path] = found
        table, args = found
        return table.get(method) or table[_ANY_OTHER], args

    def _match_pattern(self, path: str) -> tuple[dict[str, Route], Mapping[str, str]]:
        for known in self._by_pattern.values():
            if known.pattern is not None and (match := known.pattern.fullmatch(path)):
                try:
                    args = {name: unquote(value, errors="strict") for name, value in match.groupdict().items()}
                except UnicodeDecodeError:
                    break
                return known.table, MappingProxyType(args)
        return _NOWHERE, _NO_ARGS

    def answer(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        """Find the route, set the request's args, call the handler."""
        route, request.args = self.match(request.method, request.path)
        return route.answer(request)


_NOT_FOUND = Route(lambda request: _told(404, f"{request.path[:200]}: no such path here"), reads_body=False)
_NOWHERE = {_ANY_OTHER: _NOT_FOUND}
