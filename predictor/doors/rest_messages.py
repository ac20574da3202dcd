"""A request's body as the Open Inference Protocol v2 has it over HTTP → values; an Answer → the body of its response.

A body is JSON, or JSON followed by raw tensors. Who sends raw tensors asks again and again in the same words: the JSON
is read and checked once, and remembered by its bytes. So are the parts of a response that tell of its outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cube.errors import BadRequest, Unimplemented
from cube.rpc.calls import Buffer
from cube.rpc.router import HttpError, Request, Response
from predictor.doors.json_tensors import elements, value_of
from predictor.service import Answer, Service
from predictor.tensors import DTYPES, Value, count_of, datatype_of, decode, encode

JSON_LENGTH = "inference-header-content-length"
MAX_JSON_BYTES = 16 << 20  # Python holds its lock while it reads JSON, about 0.1 s for so much, and everybody waits
_LONGEST_HEAD, _MOST_HEADS = 2_048, 1_024  # that are remembered: a few MB at most


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] = []
    id: str = ""
    parameters: dict[str, Any] = {}


_NOTHING = memoryview(b"")
_infer_decoder = msgspec.json.Decoder(_Infer)


class Input(NamedTuple):
    """What a request says of a tensor."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: msgspec.Raw  # JSON, where it is not raw
    raw_size: int | None  # in bytes, where it is raw
    dtype: np.dtype[Any] | None  # of a raw one that has so many bytes; None: `decode` has a look at it


class Asked(NamedTuple):
    """A request but for its raw tensors."""

    id: str
    wanted: list[str]  # names of outputs, all if empty
    priority: int
    timeout_us: Any  # in which the answer is of use; as it was given, None: not at all
    inputs: list[Input]
    raw_outputs: Mapping[str, bool]  # whether an output comes raw
    others_raw: bool  # the same of all others

    def values(self, raw: memoryview) -> dict[str, Value]:
        """The tensors by name, read-only. raw: the bytes behind the JSON. Raises BadRequest.

        Raw ones are copied: JSON has any length, and arrays that do not begin at a multiple of their elements' size
        are nothing for kernels.
        """
        values: dict[str, Value] = {}
        at = 0
        for name, datatype, shape, data, size, dtype in self.inputs:
            if size is None:
                values[name] = value_of(datatype, shape, memoryview(data), f"input {name!r}")
                continue
            if size > len(raw) - at:
                raise _wrong_size(name, size, len(raw) - at)
            part = bytes(raw[at : at + size])
            values[name] = (
                decode(datatype, shape, part, f"input {name!r}") if dtype is None else np.ndarray(shape, dtype, part)
            )
            at += size
        if at < len(raw):
            raise BadRequest("body", f"{len(raw) - at} bytes after the last tensor", "none")
        return values


class Requests:
    """Reads requests. Owned by the event loop."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Asked] = {}

    def read(self, request: Request) -> tuple[Asked, memoryview]:
        """What a request asks, and the raw tensors behind it. Raises BadRequest, Unimplemented, HttpError 413."""
        body: bytes = request.body or b""
        said = request.headers.get(JSON_LENGTH)
        if said is None:
            return _read(body), _NOTHING
        if not (said.isascii() and said.isdigit() and len(said) < 16 and int(said) <= len(body)):
            raise BadRequest(JSON_LENGTH, repr(said), f"at most the {len(body)} bytes of the body")
        size = int(said)
        key, raw = body[:size], memoryview(body)[size:]
        asked = self._heads.get(key)
        if asked is None:
            asked = _read(key)
            if size <= _LONGEST_HEAD:
                if len(self._heads) >= _MOST_HEADS:
                    self._heads.clear()
                self._heads[key] = asked
        return asked, raw


def _read(text: bytes) -> Asked:
    if len(text) > MAX_JSON_BYTES:
        expected = f"at most {MAX_JSON_BYTES}: raw tensors may be larger"
        raise HttpError(413, f"body: found {len(text)} bytes of JSON, expected {expected}")
    said: _Infer = decoded(_infer_decoder, text)
    _refuse_what_is_not_here(said)
    names: set[str] = set()
    for tensor in said.inputs:
        if tensor.name in names:
            raise BadRequest(f"input {tensor.name!r}", "the name twice", "once")
        names.add(tensor.name)
    priority = said.parameters.get("priority", 0)
    if type(priority) is not int:
        raise BadRequest("parameter 'priority'", repr(priority), "a number: 1 leaves first, 0 last")
    all_raw = said.parameters.get("binary_data_output") is True
    return Asked(
        said.id,
        [output.name for output in said.outputs],
        priority,
        said.parameters.get("timeout"),
        [_input(tensor) for tensor in said.inputs],
        {output.name: output.parameters.get("binary_data", all_raw) is True for output in said.outputs},
        all_raw,
    )


def decoded(decoder: "msgspec.json.Decoder[Any]", body: Buffer) -> Any:
    """JSON of one kind; raises BadRequest."""
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise BadRequest("body", error, "JSON as the protocol describes it") from error
    except UnicodeDecodeError as error:
        raise BadRequest("body", error, "UTF-8") from error
    except RecursionError as error:
        raise BadRequest("body", "brackets within brackets within brackets", "JSON") from error


def _input(tensor: _Input) -> Input:
    size = tensor.parameters.get("binary_data_size") if tensor.parameters else None
    if size is None:
        return Input(tensor.name, tensor.datatype, tensor.shape, tensor.data, None, None)
    if tensor.data:
        raise BadRequest(f"input {tensor.name!r}", "data as well", "either data or binary_data_size")
    if type(size) is not int or size < 0:
        raise _wrong_size(tensor.name, size, None)
    dtype = DTYPES.get(tensor.datatype)
    try:
        if dtype is not None and count_of(tensor.shape, "") * dtype.itemsize != size:
            dtype = None
    except BadRequest:  # decode says so, when its turn comes
        dtype = None
    return Input(tensor.name, tensor.datatype, tuple(tensor.shape), tensor.data, size, dtype)


def _wrong_size(name: str, found: Any, left: int | None) -> BadRequest:
    expected = "a number of bytes" if left is None else f"at most the {left} bytes that are left of the body"
    return BadRequest(f"input {name!r}", f"binary_data_size {str(found)[:50]}", expected)


def _refuse_what_is_not_here(said: _Infer) -> None:
    """Raise Unimplemented for parameters that would change the answer: shared memory, classification, sequences."""
    names: list[str] = []
    for tensor in said.inputs:
        if tensor.parameters:
            names += [name for name in tensor.parameters if name != "binary_data_size"]
    for output in said.outputs:
        if output.parameters:
            names += [name for name in output.parameters if name != "binary_data"]
    if said.parameters:
        names += [name for name in said.parameters if name.startswith("sequence_")]
    if names:
        raise Unimplemented(f"parameter {min(names)[:100]!r} is not implemented")


# ---- responses ----


def response_of(asked: Asked, answer: Answer) -> Response:
    """The response to a request."""
    service = answer.service
    pieces: list[Buffer] = [_head_of(asked.id, answer)]
    raw: list[Buffer] = []
    for at, (name, value) in enumerate(answer.tensors().items()):
        pieces.append(_about(service, name, value, b"," if at else b""))
        if asked.raw_outputs.get(name, asked.others_raw):
            raw.append(encode(value))
            pieces.append(b',"parameters":{"binary_data_size":%d}}' % len(raw[-1]))
        else:
            pieces += (b',"data":', *elements(value, name), b"}")
    pieces.append(b"]}")
    if not raw:
        return Response(body=b"".join(pieces), compress=True)
    text = b"".join(pieces)
    headers = [(JSON_LENGTH, str(len(text)))]
    return Response(body=[text, *raw], content_type="application/octet-stream", headers=headers)


def _head_of(request_id: str, answer: Answer) -> bytes:
    """All that stands before the outputs."""
    service = answer.service
    if request_id or answer.facts:
        said: dict[str, Any] = {"model_name": service.name, "model_version": service.version}
        if request_id:
            said["id"] = request_id
        if answer.facts:
            said["parameters"] = answer.facts
        return msgspec.json.encode(said)[:-1] + b',"outputs":['
    head = service.reply_heads.get("")
    if head is None:
        said = {"model_name": service.name, "model_version": service.version}
        head = _remember(service, "", msgspec.json.encode(said)[:-1] + b',"outputs":[')
    return head


def _about(service: Service, name: str, value: Value, comma: bytes) -> bytes:
    """The beginning of an output's object."""
    key = comma, name, getattr(value, "dtype", None), value.shape
    about = service.reply_heads.get(key)
    if about is None:
        said = {"name": name, "datatype": datatype_of(value), "shape": value.shape}
        about = _remember(service, key, comma + msgspec.json.encode(said)[:-1])
    return about


def _remember(service: Service, key: Any, made: bytes) -> bytes:
    if len(service.reply_heads) >= _MOST_HEADS:
        service.reply_heads.clear()
    service.reply_heads[key] = made
    return made
