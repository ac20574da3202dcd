"""cube-server's plain HTTP, on the port that answers gRPC: metrics, tables, lookups, and the ancestor's interface.

    GET  /metrics                 Prometheus' text format: telemetry.py
    GET  /v1/tables               what is served, JSON
    POST /v1/tables/NAME:lookup   rows of one table: raw if the request's content-type says so, else JSON

A lookup in JSON: {"keys": [1, "18446744073709551615"], "version": "7@0", "format": "floats"}; the last two may be left
out. Keys are integers, or strings of decimal digits for languages whose numbers end at 2^53. The answer is {"version":
"7@0", "dim": 2, "rows": [[0.5, 1.0], [0.0, 0.0]], "found": [true, false]}; a NaN or an infinity is null. With "format":
"stored", rows are strings, base64 of the bytes as they are stored, and "row_format" says what these are.

A raw lookup, `content-type: application/octet-stream`, with ?version=7@0&format=stored if wanted: the body is the keys,
packed little-endian uint64. The answer's body is the rows, x-cube-row-bytes for each key in order (float32, or as they
are stored), and after them one byte for each key: 1 found, 0 absent. The headers x-cube-version, -dim, -row-format,
-row-bytes and -absent say the rest. It is many times cheaper than JSON.

The ancestor (Paddle Serving's cube) answered POST /DictService/seek and POST /ControlService/cmd; `LegacyApi` does.
"""

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.control import CubeControl
from cube.errors import BadRequest, NotServed, ServingError
from cube.rpc.calls import Buffer, Call
from cube.rpc.router import Handler, HttpError, Request, Response
from cube.service import Ask, CubeService, version_of
from cube.table import Table, check_keys
from cube.telemetry import CONTENT_TYPE, Telemetry
from cube.version import Version

MOST_JSON_KEYS = 65_536  # of one call: Python holds its lock while it reads or writes JSON, and everybody else waits
_KEY_BYTES, _REST_BYTES = 24, 64 << 10  # of JSON: a key in quotes with a comma, everything else
_KEY_RANGE = "0 to 18446744073709551615, an integer or a string of decimal digits"
_NUMBERS_ON_LOOP = 16_384  # that are written as JSON without a thread: about 2 ms
_ROWS_AT_ONCE = 1_024  # in a thread, so that the loop may have the interpreter in between
_MISSING = {"status": 0xFFFFFFFF, "value": ""}


class HttpRoute(NamedTuple):
    """What `Router.add` takes."""

    method: str
    pattern: str
    handler: Handler
    max_body_bytes: int = _REST_BYTES


class _Lookup(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[int | str]
    version: str | None = None
    format: Literal["floats", "stored"] = "floats"


class HttpApi:
    """Lookups and what is served. Owned by the event loop."""

    def __init__(self, service: CubeService, telemetry: Telemetry, max_keys: int, refresh: Callable[[], None]):
        """refresh: called before metrics are read, to bring this process's up to date."""
        self._service, self._telemetry, self._max_keys, self._refresh = service, telemetry, max_keys, refresh

    def routes(self) -> list[HttpRoute]:
        """Where they belong."""
        body = max(8 * self._max_keys, _json_bytes(self._max_keys))
        return [
            HttpRoute("GET", "/metrics", self._metrics),
            HttpRoute("GET", "/v1/tables", self._tables),
            HttpRoute("POST", "/v1/tables/{name}:lookup", self._lookup, body),
        ]

    def _metrics(self, request: Request) -> Response:
        self._refresh()
        return Response(body=self._telemetry.text(), content_type=CONTENT_TYPE, compress=True)

    def _tables(self, request: Request) -> Response:
        facts = self._service.facts()
        tables = [
            {
                "name": table.table,
                "current": str(version_of(table.current)),
                "versions": [
                    {
                        "version": str(version_of(v.version)),
                        "dim": v.dim,
                        "rows": v.keys,
                        "row_format": v.row_format,
                        "engine": v.engine,
                        "file_bytes": v.file_bytes,
                        "verified": v.verified,
                    }
                    for v in table.versions
                ],
            }
            for table in facts.tables
        ]
        return _json({"shard": facts.shard, "shards": facts.shards, "workers": facts.workers, "tables": tables})

    def _lookup(self, request: Request) -> Any:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        place = f"table {request.args['name']!r} keys"
        if content_type == "application/octet-stream":
            given = parse_qsl(request.query, keep_blank_values=True)
            settings = dict(given)
            if len(settings) != len(given):
                raise BadRequest("query", repr(request.query), "each parameter once")
            if unknown := settings.keys() - {"version", "format"}:
                raise BadRequest("query", f"{min(unknown)!r}", "version or format")
            if settings.get("format", "floats") not in ("floats", "stored"):
                raise BadRequest("format", repr(settings["format"]), "floats or stored")
            keys = check_keys(place, request.body or b"", self._max_keys)
            return self._answer(
                request, keys, settings.get("version"), settings.get("format") == "stored", lambda ask: 0, _raw
            )
        if request.query:  # whoever writes ?version= there must not be answered another one
            raise BadRequest("query", repr(request.query), "none: a lookup in JSON says version and format in its body")
        body = request.body or b""
        if len(body) > (most := _json_bytes(self._max_keys)):  # the route admits raw bodies
            raise HttpError(413, f"body: found {len(body)} bytes of JSON, expected at most {most}")
        asked = _decode(body, _Lookup)
        keys = _keys(place, asked.keys, self._max_keys)
        return self._answer(request, keys, asked.version, asked.format == "stored", _numbers, _rows_as_json)

    def _answer(
        self,
        request: Request,
        keys: NDArray[np.uint64],
        version: str | None,
        stored: bool,
        work: Callable[[Ask], int],
        write: Callable[[Ask], Response],
    ) -> Any:
        """A response, or a coroutine of one. work: how many numbers `write` will have to write."""
        wanted = None if version is None else Version.parse(version)
        ask = self._service.ask(request.args["name"], wanted, keys, stored=stored)
        return look_up(self._service, ask, request, work, write)


def look_up(
    service: CubeService, ask: Ask, request: Request, work: Callable[[Ask], int], write: Callable[[Ask], Response]
) -> Any:
    """The rows of `ask`, written as a response: at once where both are short, else a coroutine."""
    finish = service.look_up([ask], Call(request.path, deadline=request.deadline, peer=request.peer))
    if finish is None and work(ask) <= _NUMBERS_ON_LOOP:
        return write(ask)

    async def later() -> Response:
        if finish is not None:
            await finish()
        if work(ask) <= _NUMBERS_ON_LOOP:
            return write(ask)
        return await asyncio.to_thread(write, ask)

    return later()


def _raw(ask: Ask) -> Response:
    about = ask.store.about
    headers = [
        ("x-cube-version", str(about.version)),
        ("x-cube-dim", str(about.dim)),
        ("x-cube-row-format", about.row_format.text if ask.stored else "f32"),
        ("x-cube-row-bytes", str(about.row_bytes if ask.stored else 4 * about.dim)),
        ("x-cube-absent", str(ask.absent)),
    ]
    return Response(body=[ask.rows.data, ask.found.data], content_type="application/octet-stream", headers=headers)


def _numbers(ask: Ask) -> int:
    return ask.found.size * (1 if ask.stored else 1 + ask.store.about.dim)


def _rows_as_json(ask: Ask) -> Response:
    about, rows = ask.store.about, ask.rows
    head: dict[str, Any] = {"version": str(about.version), "dim": about.dim}
    if ask.stored:
        head["row_format"] = about.row_format.text
    pieces: list[Buffer] = [msgspec.json.encode(head)[:-1], b',"rows":[']
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[at : at + _ROWS_AT_ONCE]
        pieces += [b"," if at else b"", msgspec.json.encode(base64_rows(some) if ask.stored else some.tolist())[1:-1]]
    pieces += [b'],"found":', msgspec.json.encode(ask.found.tolist()), b"}"]
    return Response(body=b"".join(pieces), compress=True)


def base64_rows(rows: NDArray[np.generic]) -> list[str]:
    """Base64 of the bytes of each row; rows: [n, dim], C order, dim at least 1."""
    raw = rows.view(np.uint8)
    size, groups = raw.shape[1], -(-raw.shape[1] // 3)
    padded = np.zeros((len(raw), 3 * groups), np.uint8)
    padded[:, :size] = raw
    text = np.frombuffer(bytearray(base64.b64encode(padded.data)), np.uint8).reshape(len(raw), 4 * groups)
    if size % 3:
        text[:, size % 3 - 3 :] = ord("=")
    strings: list[str] = text.view(f"S{4 * groups}").ravel().astype(str).tolist()
    return strings


class LegacyApi:
    """POST /DictService/seek and POST /ControlService/cmd, about one table, for clients of Paddle Serving's cube.

    seek: {"keys": [...], "version_required": true} → {"values": [{"status": 0, "value": BASE64}, ...], "version":
    "7@0"}; a value is a row as little-endian float32, an absent key has status 4294967295 and an empty value.

    cmd: {"cmd": ...}, with "version" ("7@0"; 7 is 7@0) or "version_path", whose last part then is the version. Answers
    200, 400 for what is no JSON object or has no cmd, 500 otherwise:

        status                       {"cur_version": "7@0", "bg_version": "8@0", "status": 0}; status is 1 while loading
        bg_load_base, bg_load_patch  load: the files under `data` say by themselves whether they are a base or a delta
        bg_switch                    switch to the newest version that is not current
        enable                       switch to "version", which must be loaded
        bg_unload                    unload "version", or the newest that is not current, if there is one
        reload_base, reload_patch    load, switch, and unload what was current before

    Where the ancestor was wrong, we are not: a reload that failed answers 500 and leaves everything as it was (there,
    200, because the last step's result covered that of the first), a patch before any base is such a failure (there, a
    read outside of an empty vector), status reports versions (there, text that had been freed).
    """

    def __init__(self, service: CubeService, control: CubeControl, table: str, max_keys: int):
        """table: empty for the only one, if there is one."""
        self._service, self._control, self._max_keys = service, control, max_keys
        self._name = table or (next(iter(service.tables)) if len(service.tables) == 1 else "")

    def routes(self) -> list[HttpRoute]:
        """Where they belong."""
        return [
            HttpRoute("POST", "/DictService/seek", self._seek, _json_bytes(self._max_keys)),
            HttpRoute("POST", "/ControlService/cmd", self._cmd),
        ]

    def _table(self) -> Table:
        if not self._name:
            raise NotServed("the ancestor's interface without a legacy_table in the settings", [])
        return self._service.tables[self._name]

    def _seek(self, request: Request) -> Any:
        asked = _decode(request.body, _Seek)
        name = self._table().name
        ask = self._service.ask(name, None, _keys("keys", asked.keys, self._max_keys))
        write = partial(_values, with_version=asked.version_required)
        return look_up(self._service, ask, request, lambda ask: 8 * ask.found.size, write)

    async def _cmd(self, request: Request) -> Response:
        try:
            asked = _decode(request.body, _Cmd)
        except BadRequest as error:
            raise HttpError(400, str(error)) from error
        try:
            return _json(await self._carry_out(asked))
        except ServingError as error:
            raise HttpError(500, f"cmd {asked.cmd[:50]!r}: {error}") from error

    async def _carry_out(self, asked: "_Cmd") -> dict[str, Any]:
        table, control = self._table(), self._control
        beside = [version for version in table.versions if version != table.current]
        match asked.cmd:
            case "status":
                background = str(beside[0]) if beside else ""
                return {"cur_version": str(table.current), "bg_version": background, "status": int(control.busy)}
            case "bg_load_base" | "bg_load_patch":
                await control.load(table.name, asked.named())
            case "reload_base" | "reload_patch":
                await control.reload(table.name, asked.named())
            case "enable":
                await control.switch(table.name, asked.named())
            case "bg_switch":
                if not beside:
                    raise NotServed(f"table {table.name!r} in the background", [str(table.current)])
                await control.switch(table.name, beside[0])
            case "bg_unload":
                if asked.version or beside:
                    await control.unload(table.name, asked.named() if asked.version else beside[0])
            case _:
                raise BadRequest("cmd", repr(asked.cmd), "one of the ancestor's commands")
        return {}


class _Seek(msgspec.Struct):
    keys: list[int | str]
    version_required: bool = False


class _Cmd(msgspec.Struct):
    cmd: str
    version: str | int = ""
    version_path: str = ""

    def named(self) -> Version:
        """The version it is about; raises BadData."""
        return Version.parse(str(self.version) or self.version_path.rstrip("/").rpartition("/")[2])


def _values(ask: Ask, with_version: bool) -> Response:
    values = [
        {"status": 0, "value": value} if found else _MISSING
        for value, found in zip(base64_rows(ask.rows), ask.found.tolist(), strict=True)
    ]
    return _json({"values": values, **({"version": str(ask.version)} if with_version else {})})


def _json(value: Any) -> Response:
    return Response(body=msgspec.json.encode(value), compress=True)


def _decode(body: bytes | None, kind: type[Any]) -> Any:
    """A body as a struct; raises BadRequest."""
    try:
        return msgspec.json.decode(body or b"", type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest("body", error, "JSON as documented") from error
    except UnicodeDecodeError as error:
        raise BadRequest("body", error, "UTF-8") from error
    except RecursionError as error:
        raise BadRequest("body", "brackets within brackets within brackets", "JSON as documented") from error


def _json_bytes(max_keys: int) -> int:
    """The most that a lookup in JSON can need."""
    return _KEY_BYTES * min(max_keys, MOST_JSON_KEYS) + _REST_BYTES


def _keys(place: str, keys: list[int | str], limit: int) -> NDArray[np.uint64]:
    """Raises BadRequest."""
    if len(keys) > min(limit, MOST_JSON_KEYS):
        raise BadRequest(place, f"{len(keys)} in JSON", f"at most {min(limit, MOST_JSON_KEYS)}; raw calls take more")
    digits = "".join([key for key in keys if isinstance(key, str)])
    if digits and not (digits.isascii() and digits.isdigit()):  # NumPy takes " 1", "1_0" and digits of all scripts
        raise BadRequest(place, "a string that is no key", _KEY_RANGE)
    try:
        return np.array(keys, np.uint64)
    except (OverflowError, ValueError) as error:
        raise BadRequest(place, "a number that does not fit", _KEY_RANGE) from error
