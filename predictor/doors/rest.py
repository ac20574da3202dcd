"""The Open Inference Protocol v2 over HTTP, and the ancestor's HTTP interface.

    POST /v2/models/NAME[/versions/V]/infer     JSON, or JSON followed by raw tensors
    GET  /v2/models/NAME[/versions/V][/ready]
    GET  /v2
    POST /NAME/inference                        {"instances": [{INPUT: value, ...}, ...]}: an object for each sample
    POST /NAME/debug                            the same; what every node made of it, and how long that took

Raw tensors are the protocol's binary extension: the header inference-header-content-length says how long the JSON is;
an input with parameters.binary_data_size has that many bytes after it, in the order of the inputs. Outputs come raw
where parameters.binary_data, or binary_data_output of the whole request, asks for it. It is several times cheaper.

In JSON integers are exact at any size, and a NaN or an infinity of an output is null. A deadline is the protocol's
parameter `timeout`, in microseconds, or the header timeout-ms.
"""

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from typing import Any

import msgspec

from cube.errors import BadRequest, DeadlineExceeded
from cube.rpc.calls import Call, Field
from cube.rpc.router import Made, Request, Response, Router
from predictor.doors import json_numbers
from predictor.doors.at_once import AtOnce
from predictor.doors.json_tensors import first_of, numbers, of_instances, rows_of
from predictor.doors.rest_messages import MAX_JSON_BYTES, Requests, decoded, response_of
from predictor.ops.op import Ragged
from predictor.service import Answer, InferenceService, Service
from predictor.tensors import datatype_of
from trainer_tools.manifest import Tensor

MOST_DEBUGGED = 1_000  # elements of a value that /debug shows
_NUMBERS_ON_LOOP = 16_384  # that are written as JSON without a thread: about 2 ms
_EXTENSIONS = ["binary_tensor_data"]


class _Instances(msgspec.Struct, forbid_unknown_fields=True):
    instances: list[dict[str, Any]]


_instances_decoder = msgspec.json.Decoder(_Instances)


class RestDoor:
    """Handlers of HTTP requests."""

    def __init__(self, service: InferenceService):
        self._service, self._debugged = service, AtOnce("/NAME/debug: answers", 4)
        self._requests = Requests()
        json_numbers.warm()
        version = importlib.metadata.version("cube-serving")
        self._about = Response(
            body=msgspec.json.encode({"name": "cube-serving", "version": version, "extensions": _EXTENSIONS})
        )

    def add_to(self, router: Router) -> None:
        """Answer there."""
        router.add("GET", "/v2", lambda request: self._about)
        router.add("GET", "/v2/models", self._models)
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            router.add("GET", model, self._metadata)
            router.add("GET", f"{model}/ready", self._ready)
            router.add("POST", f"{model}/infer", self._infer)
        router.add("POST", "/{name}/inference", self._inference, max_body_bytes=MAX_JSON_BYTES)
        router.add("POST", "/{name}/debug", self._debug, max_body_bytes=MAX_JSON_BYTES)

    def _models(self, request: Request) -> Response:
        return _json({"models": sorted(self._service.services)})

    def _ready(self, request: Request) -> Response:
        return _json({"name": self._asked(request).name, "ready": True})

    def _metadata(self, request: Request) -> Response:
        service = self._asked(request)
        said = {
            "name": service.name,
            "versions": [service.version],
            "platform": service.platform,
            "inputs": [_described(tensor) for tensor in service.inputs],
            "outputs": [_described(tensor) for tensor in service.output_tensors()],
            "properties": {f"table.{name}": version for name, version in service.tables.items()},
        }
        return _json(said)

    def _asked(self, request: Request) -> Service:
        return self._service.service(request.args["name"], request.args.get("version", ""))

    # ---- the protocol ----

    def _infer(self, request: Request) -> Made | Awaitable[Made]:
        service = self._asked(request)
        with service.counts.reading:
            asked, raw = self._requests.read(request)
            inputs, call = asked.values(raw), _call(request, asked.timeout_us)
        write = _unless_long(partial(response_of, asked))
        return _within(call, service.infer(inputs, asked.wanted, call, asked.priority, then=write))

    # ---- the ancestor's ----

    def _inference(self, request: Request) -> Made | Awaitable[Made]:
        service = self._asked(request)
        with service.counts.reading:
            inputs, call = _of_instances(service, request), _call(request)
        return _within(call, service.infer(inputs, (), call, then=_unless_long(_predictions)))

    async def _debug(self, request: Request) -> Response:
        service = self._asked(request)
        with self._debugged.one():  # no batcher bounds them
            told = await service.debug(_of_instances(service, request), _call(request))
        for nodes in told.values():
            for node in nodes.values():
                node["outputs"] = {name: _shown(name, value) for name, value in node["outputs"].items()}
        return _json({"service": service.name, "version": service.version, "workflows": told})


def _call(request: Request, timeout_us: Any = None) -> Call:
    """timeout_us: the protocol's `timeout`; any request may say it in milliseconds in the header timeout-ms."""
    left_s = math.inf
    if timeout_us is not None:
        left_s = _positive("parameter 'timeout'", timeout_us, "microseconds") / 1e6
    if (said := request.headers.get("timeout-ms")) is not None:
        number = int(said) if said.isascii() and said.isdigit() and len(said) < 16 else said
        left_s = min(left_s, _positive("header timeout-ms", number, "milliseconds") / 1e3)
    deadline = request.deadline
    if left_s < math.inf:
        deadline = min(time.monotonic() + left_s, math.inf if deadline is None else deadline)
    return _HttpCall(request, deadline)


class _HttpCall(Call):
    """A call whose metadata are the headers, if somebody asks for them."""

    def __init__(self, request: Request, deadline: float | None):
        super().__init__(request.path, None, deadline, request.peer)
        self._headers = request.headers

    def _decoded(self) -> tuple[Field, ...]:
        return tuple(self._headers.items())


def _positive(place: str, given: Any, unit: str) -> int:
    if type(given) is not int or not 1 <= given < 1 << 63:
        found = "a number of many digits" if type(given) is int and given.bit_length() > 63 else repr(given)[:50]
        raise BadRequest(place, found, f"a whole number of {unit}, at least 1")
    return given


def _is_long(answer: Answer) -> bool:
    return sum(numbers(value) for value in answer.tensors().values()) > _NUMBERS_ON_LOOP


def _unless_long(write: Callable[[Answer], Response]) -> Callable[[Answer], Made]:
    """Write a response at once; if that takes long, in a thread: in pieces, so that the loop may have the interpreter
    in between."""
    return lambda answer: partial(write, answer) if _is_long(answer) else write(answer)


def _within(call: Call, made: Made | Awaitable[Made]) -> Made | Awaitable[Made]:
    """Nobody is kept waiting after the deadline: there is nobody else who would end it here."""
    if call.deadline is None or not isawaitable(made):
        return made
    return _in_time(call.path, call.deadline, made)


async def _in_time(path: str, deadline: float, made: Awaitable[Made]) -> Made:
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
            return await made
    except TimeoutError as error:
        raise DeadlineExceeded(f"{path}: no answer in time") from error


# ---- the ancestor's bodies ----


def _of_instances(service: Service, request: Request) -> dict[str, Any]:
    asked: _Instances = decoded(_instances_decoder, request.body or b"")
    return of_instances(service.form, asked.instances)


def _predictions(answer: Answer) -> Response:
    """An object for each sample; what does not go by samples stands beside them."""
    ports = answer.service.outputs
    by_row = {n: rows_of(v, ports[n].per_row, n) for n, v in answer.outputs.items() if ports[n].goes_by_rows}
    predictions = [dict(zip(by_row, row, strict=True)) for row in zip(*by_row.values(), strict=True)]
    rest = {name: rows_of(value, 1, name) for name, value in answer.outputs.items() if name not in by_row}
    return _json({"predictions": predictions, **({"outputs": rest} if rest else {}), "version": answer.service.version})


def _shown(name: str, value: Any) -> dict[str, Any]:
    """A value for people: its first elements."""
    flat = value.values if isinstance(value, Ragged) else value
    said: dict[str, Any] = {"datatype": datatype_of(flat), "shape": list(flat.shape)}
    if isinstance(value, Ragged):
        said["offsets"] = value.offsets[: MOST_DEBUGGED + 1].tolist()
    return {**said, "data": first_of(flat, MOST_DEBUGGED, name)}


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


def _json(value: Any) -> Response:
    return Response(body=msgspec.json.encode(value), compress=True)
