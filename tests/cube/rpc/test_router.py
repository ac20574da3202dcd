"""Plain HTTP without a transport: which handler answers, and how errors, compression and bodies behave."""

import asyncio
import functools
import gzip
import itertools
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import BadRequest, DeadlineExceeded, NotServed, Overloaded, Unavailable
from cube.rpc.router import (
    Headers,
    HttpError,
    Inflater,
    Request,
    Response,
    Router,
    accepts_gzip,
    buffers,
    is_streamed,
)

TEXT = b"a reply that is worth its compression " * 100


def names(name):
    """A handler that says its name and what the path held."""
    return lambda request: Response(200, json.dumps([name, dict(request.args)]).encode())


def router(*routes):
    made = Router()
    for method, pattern in routes:
        made.add(method, pattern, names(f"{method} {pattern}"))
    return made


def ask(made, method, path, **facts):
    async def run():
        answer = made.answer(Request(method, path, **facts))
        return answer if isinstance(answer, Response) else await asyncio.wait_for(answer, 60)

    return asyncio.run(run())


@pytest.mark.parametrize("takes_long", [False, True])
def test_a_promise_is_waited_for(takes_long):
    async def run():
        promise = asyncio.get_running_loop().create_future()
        made = Router()
        made.add("GET", "/", lambda request: promise)
        answer = made.answer(Request("GET", "/"))
        response = Response(200, b"kept")
        promise.set_result((lambda: response) if takes_long else response)
        return await answer

    assert asyncio.run(run()).body == b"kept"


def error_of(response):
    return response.status, json.loads(response.body)["error"]


TABLES = router(
    ("GET", "/v1/tables"),
    ("GET", "/v1/tables/all"),
    ("GET", "/v1/tables/{name}"),
    ("DELETE", "/v1/tables/{name}"),
    ("POST", "/v1/tables/{name}:lookup"),
    ("POST", "/v1/models/{name}/versions/{version}:predict"),
    ("GET", "/v1/models/{name}/versions/{version}/about"),
)


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("GET", "/v1/tables", ["GET /v1/tables", {}]),
        ("GET", "/v1/tables/all", ["GET /v1/tables/all", {}]),
        ("GET", "/v1/tables/ads", ["GET /v1/tables/{name}", {"name": "ads"}]),
        ("DELETE", "/v1/tables/ads", ["DELETE /v1/tables/{name}", {"name": "ads"}]),
        ("POST", "/v1/tables/ads:lookup", ["POST /v1/tables/{name}:lookup", {"name": "ads"}]),
        ("GET", "/v1/tables/a%2Fb%3Ac%C3%A9", ["GET /v1/tables/{name}", {"name": "a/b:cé"}]),
        (
            "POST",
            "/v1/models/m/versions/3:predict",
            ["POST /v1/models/{name}/versions/{version}:predict", {"name": "m", "version": "3"}],
        ),
        (
            "GET",
            "/v1/models/m/versions/3/about",
            ["GET /v1/models/{name}/versions/{version}/about", {"name": "m", "version": "3"}],
        ),
    ],
)
def test_a_path_finds_its_handler_and_its_parameters(method, path, answer):
    assert json.loads(ask(TABLES, method, path).body) == answer


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v1/tables/", "//v1/tables", "/v1/tables/a/b", "/v1/tables/a:other", "/v1/tables/:lookup",
        "/v1/tables/a%ff", "/v1/models/m/versions/3", "/V1/tables", "/v1/tables/../tables", "v1/tables", "",
    ],
)  # fmt: skip
def test_any_other_path_is_not_found(path):
    assert error_of(ask(TABLES, "GET", path)) == (404, f"{path}: no such path here")


def test_what_a_path_led_to_is_the_same_every_time_and_is_not_kept_without_bound():
    for number in range(2_000):
        assert json.loads(ask_plain(TABLES, "GET", f"/v1/tables/{number % 700}").body)[1] == {"name": str(number % 700)}
        assert ask_plain(TABLES, "GET", f"/nowhere/{number}").status == 404
    assert len(TABLES._matched) <= 512


def ask_plain(made, method, path):
    return made.answer(Request(method, path))


def test_a_method_that_a_path_does_not_have_is_refused_with_those_it_has():
    response = ask(TABLES, "PUT", "/v1/tables/ads")
    assert error_of(response) == (405, "/v1/tables/ads: found PUT, expected one of DELETE, GET, HEAD, OPTIONS")
    assert response.headers == [("allow", "DELETE, GET, HEAD, OPTIONS")]


def test_options_answers_itself():
    response = ask(TABLES, "OPTIONS", "/v1/tables/ads:lookup")
    assert (response.status, response.body, response.headers) == (204, b"", [("allow", "OPTIONS, POST")])
    assert ask(TABLES, "OPTIONS", "*").status == 204
    assert ask(TABLES, "GET", "*").status == 404


def test_head_is_answered_by_the_handler_of_get_unless_it_has_its_own():
    made = router(("GET", "/a"), ("HEAD", "/a"), ("GET", "/b"))
    assert json.loads(ask(made, "HEAD", "/a").body)[0] == "HEAD /a"
    assert json.loads(ask(made, "HEAD", "/b").body)[0] == "GET /b"


def test_routes_of_one_path_may_come_in_any_order():
    made = router(("HEAD", "/a"), ("OPTIONS", "/a"), ("POST", "/a"), ("GET", "/a"))
    for method in ("HEAD", "OPTIONS", "POST", "GET"):
        assert json.loads(ask(made, method, "/a").body)[0] == f"{method} /a"
    assert ask(made, "PUT", "/a").headers == [("allow", "GET, HEAD, OPTIONS, POST")]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("get", "/a"), ("CONNECT", "/a"), ("TRACE", "/a"), ("", "/a"), ("GET", ""), ("GET", "a"), ("GET", "/a?b"),
        ("GET", "/a b"), ("GET", "/{a"), ("GET", "/a}"), ("GET", "/{}"), ("GET", "/{A}"), ("GET", "/{a}{b}"),
        ("GET", "/{a}x"), ("GET", "/{a}x{b}"), ("GET", "/{a}/{a}"), ("GET", "/%61"),
    ],
)  # fmt: skip
def test_what_is_no_route_is_refused_when_it_is_added(method, pattern):
    with pytest.raises(ValueError, match="found"):
        router((method, pattern))


def test_a_second_handler_or_other_names_for_the_same_parameters_are_refused():
    with pytest.raises(ValueError, match="second handler"):
        router(("GET", "/a"), ("GET", "/a"))
    with pytest.raises(ValueError, match="second handler"):
        router(("GET", "/{a}"), ("GET", "/{a}"))
    with pytest.raises(ValueError, match="other parameters"):
        router(("GET", "/{a}"), ("POST", "/{b}"))


def test_a_route_that_is_added_later_counts_at_once():
    made = router(("GET", "/{a}"))
    made.memory[b"head"] = "what a transport remembers"
    assert ask(made, "POST", "/x").status == 405
    made.add("POST", "/{a}", names("new"))
    assert ask(made, "POST", "/x").status == 200
    assert not made.memory


class Callable:
    async def __call__(self, request):
        return Response(200, b"called")


async def coroutine(request, text=b"awaited"):
    await asyncio.sleep(0)
    return Response(200, text)


@pytest.mark.parametrize(
    ("handler", "body"),
    [
        (lambda request: Response(200, b"plain"), b"plain"),
        (coroutine, b"awaited"),
        (functools.partial(coroutine, text=b"partial"), b"partial"),
        (lambda request: coroutine(request), b"awaited"),
        (Callable(), b"called"),
    ],
)
def test_handlers_are_plain_functions_or_anything_that_gives_a_coroutine(handler, body):
    made = Router()
    made.add("GET", "/", handler)
    assert ask(made, "GET", "/").body == body


def test_a_plain_handler_needs_no_event_loop():
    assert isinstance(TABLES.answer(Request("GET", "/v1/tables")), Response)


ERRORS = [
    (BadRequest("keys", "none", "one or more"), 400),
    (NotServed("ads", ["users"]), 404),
    (Overloaded("full"), 429),
    (Unavailable("gone"), 503),
    (DeadlineExceeded("late"), 504),
    (HttpError(418, "a teapot"), 418),
]


def raising(error):
    def plain(request):
        raise error

    async def later(request):
        raise error

    return plain, later


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_serving_error_becomes_its_status_and_its_text(error, status):
    for handler in raising(error):
        made = Router()
        made.add("GET", "/", handler)
        response = ask(made, "GET", "/")
        assert error_of(response) == (status, str(error))
        assert response.content_type == "application/json"


@pytest.mark.parametrize("wrong", [ZeroDivisionError("secret"), asyncio.CancelledError("secret")])
def test_a_bug_is_an_internal_error_whose_details_stay_in_the_log(wrong, caplog):
    handlers = raising(wrong)[1:] if isinstance(wrong, asyncio.CancelledError) else raising(wrong)
    for handler in handlers:
        caplog.clear()
        made = Router()
        made.add("GET", "/where", handler)
        assert error_of(ask(made, "GET", "/where")) == (500, "internal error; the server's log has it")
        assert "GET /where failed" in caplog.text
        assert "secret" in caplog.text


@pytest.mark.parametrize("returned", [None, b"bytes", (200, b"")])
def test_a_handler_that_returns_no_response_is_an_internal_error(returned, caplog):
    async def later(request):
        return returned

    for handler in (lambda request: returned, later):
        made = Router()
        made.add("GET", "/", handler)
        assert ask(made, "GET", "/").status == 500
    assert "found" in caplog.text or "await" in caplog.text


def test_a_caller_who_gives_up_cancels_the_handler():
    seen = []

    async def slow(request):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def run():
        made = Router()
        made.add("GET", "/", slow)
        for steps in (0, 1, 2):  # before it has begun, too
            task = asyncio.create_task(made.answer(Request("GET", "/")))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=60)
            assert task.cancelled()

    asyncio.run(run())
    assert seen == ["cancelled"] * 2


# ---- compression ----


@pytest.mark.parametrize(
    ("accept", "accepts"),
    [
        ("", False), ("gzip", True), ("GZip", True), ("x-gzip", True), ("deflate, gzip;q=0.5", True), ("*", True),
        ("gzip;q=0", False), ("gzip;q=0.000", False), ("gzip;q=0, *", False), ("*;q=0", False), ("br", False),
        ("gzip ; q=1.0 , br", True), ("gzip;q=x", False), ("gzipped", False), (",,gzip", True), ("identity", False),
    ],
)  # fmt: skip
def test_a_client_says_whether_it_reads_gzip(accept, accepts):
    assert accepts_gzip(accept) is accepts


def compressing(body, **facts):
    made = Router()
    made.add("GET", "/", lambda request: Response(200, body, compress=True, **facts))
    return made


@pytest.mark.parametrize("body", [TEXT, bytearray(TEXT), [TEXT[:1000], b"", memoryview(TEXT)[1000:]]])
def test_a_response_is_compressed_for_who_reads_that(body):
    response = ask(compressing(body), "GET", "/", headers={"accept-encoding": "gzip"})
    assert gzip.decompress(b"".join(buffers(response.body))) == TEXT
    assert ("content-encoding", "gzip") in response.headers
    assert ("vary", "accept-encoding") in response.headers


@pytest.mark.parametrize(
    ("body", "headers", "accept"),
    [(TEXT, [], ""), (b"short", [], "gzip"), (TEXT, [("Content-Encoding", "br")], "gzip")],
)
def test_a_response_is_left_alone_where_compression_is_of_no_use(body, headers, accept):
    response = ask(compressing(body, headers=headers), "GET", "/", headers={"accept-encoding": accept})
    assert response.body == body
    # a short one is never compressed, whoever asks
    assert list(response.headers) == ([*headers, ("vary", "accept-encoding")] if body == TEXT else [])


def test_a_body_that_comes_in_pieces_is_compressed_piece_by_piece_and_closed():
    closed = []

    async def pieces():
        try:
            for at in range(0, len(TEXT), 100):
                yield TEXT[at : at + 100]
        finally:
            closed.append(True)

    async def run():
        made = Router()
        made.add("GET", "/", lambda request: Response(200, pieces(), compress=True))
        response = made.answer(Request("GET", "/", headers={"accept-encoding": "gzip"}))
        assert is_streamed(response)
        reader, text = zlib.decompressobj(31), b""
        async for piece in response.body:
            text += reader.decompress(piece)
            assert len(text) % 100 == 0, "a piece arrives whole"
        assert (text, reader.eof) == (TEXT, True)
        response = made.answer(Request("GET", "/", headers={"accept-encoding": "gzip"}))
        await anext(response.body)
        await response.body.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert closed == [True, True]


def packed(data, encoding):
    press = zlib.compressobj(6, zlib.DEFLATED, 31 if "gzip" in encoding else 15)
    return press.compress(data) + press.flush()


@given(
    st.binary(max_size=5_000).map(lambda data: data * 20),
    st.sampled_from(["gzip", "x-gzip", "deflate", "GZIP"]),
    st.lists(st.integers(0, 100_000), max_size=5),
    st.one_of(st.none(), st.integers(1, 3_000)),
)
def test_a_body_is_decoded_in_any_split_and_in_any_portions(data, encoding, cuts, at_most):
    sent, reader, got = packed(data, encoding.lower()), Inflater(encoding, 100_000), b""
    bounds = sorted({0, len(sent), *(cut % (len(sent) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(bounds):
        part = reader.inflate(sent[start:end], at_most)
        got += part
        while at_most is not None and len(part) == at_most:
            part = reader.inflate(b"", at_most)
            got += part
    reader.finish()
    assert got == data


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = packed(bytes(50 << 20), "gzip")
    assert len(bomb) < 60_000
    reader = Inflater("gzip", 1_000)
    with pytest.raises(HttpError, match="at most") as raised:
        reader.inflate(bomb)
    assert raised.value.wire.http == 413
    reader = Inflater("gzip", 1_000)
    assert len(reader.inflate(bomb, 900)) == 900
    with pytest.raises(HttpError, match="at most"):
        reader.inflate(b"", 900)


def test_a_body_of_exactly_the_limit_is_not_refused():
    reader = Inflater("gzip", 1_000)
    assert reader.inflate(packed(bytes(1_000), "gzip")) == bytes(1_000)
    reader.finish()


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("gzip", b"no gzip at all", 400),
        ("deflate", packed(b"x", "gzip"), 400),
        ("gzip", packed(b"x", "gzip") + b"more", 400),
        ("gzip", packed(b"x", "gzip") * 2, 400),
        ("gzip", packed(TEXT, "gzip")[:-1], 400),
        ("gzip", packed(TEXT, "gzip")[:-8] + bytes(8), 400),
        ("gzip", b"", 400),
        ("br", b"", 415),
        ("gzip, gzip", b"", 415),
        ("", b"", 415),
    ],
)
def test_what_does_not_decode_is_refused(encoding, data, status):
    with pytest.raises(HttpError) as raised:  # noqa: PT012    # each of the three steps may be the one
        reader = Inflater(encoding, 1 << 20)
        reader.inflate(data)
        reader.finish()
    assert raised.value.wire.http == status


# ---- small things ----


def test_headers_are_looked_up_in_lower_case_and_repeated_ones_joined():
    headers = Headers(
        [(b":path", b"/"), (b"X-A", b" one "), (b"x-a", b"two"), (b"Cookie", b"a=1"), (b"cookie", b"b=2"), (b"E", b"")]
    )
    assert dict(headers) == {"x-a": "one, two", "cookie": "a=1; b=2", "e": ""}
    assert "X-A" not in headers
    assert len(headers) == 3


def test_the_buffers_of_a_body_are_its_bytes_uncopied():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    parts = buffers([array, b"abc", bytearray(b"d"), np.zeros((0, 4)), memoryview(b"xyz")[1:]])
    assert [bytes(part) for part in parts] == [array.tobytes(), b"abc", b"d", b"", b"yz"]
    array[0, 0] = 7
    assert bytes(parts[0]) == array.tobytes()
    assert buffers(b"abc") == [b"abc"]


@pytest.mark.parametrize("body", ["text", None, 3, ["text"], np.arange(12).reshape(3, 4).T, object()])
def test_what_is_no_buffer_is_refused(body):
    with pytest.raises((TypeError, BufferError, ValueError)):
        buffers(body)
