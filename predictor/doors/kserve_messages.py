"""ModelInferRequest → values, Answer → ModelInferResponse, the bytes of both.

Callers ask again and again in the same words: of one request and the next only the raw tensors differ, and the id. So
what stands before the tensors, the *head*, is read by protobuf and checked once, and remembered by its bytes. Of the
wire format no more is known here than where a field of the message itself begins and ends; a message that is not laid
out as all clients lay it out (the raw contents last, everything else before them) goes through protobuf whole.

Replies are put together the same way: a head by names, types and shapes of the outputs, then the raw contents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cube.errors import BadRequest, ServingError, Unimplemented
from cube.rpc.calls import Buffer, Reply, parse
from cube.rpc.messages import varint
from predictor.pb import kserve_pb2 as pb
from predictor.service import Answer, Service
from predictor.tensors import DTYPES, Value, count_of, datatype_of, decode, encode, texts

_TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip

# Tags of fields of the messages, all of wire type 2: a size, and so many bytes.
_ID, _RAW_INPUT = 3 << 3 | 2, 7 << 3 | 2
_REPLY_ID, _REPLY_PARAMETER, _RAW_OUTPUT = b"\x1a", b"\x22", b"\x32"
_LONGEST_HEAD, _MOST_INPUTS, _MOST_HEADS = 2_048, 32, 1_024  # that are remembered: some 10 MB at most
_MOST_FIELDS = 128  # of a message that is taken apart here
_COPIED_BYTES = 64 << 10  # a larger output is sent from where it lies


class Input(NamedTuple):
    """What a request says of a tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None  # None: BYTES, or nothing that is known
    size: int  # in bytes, where dtype is there


class Head(NamedTuple):
    """A request but for its tensors and its id."""

    model: str
    version: str
    wanted: list[str]  # names of outputs, all if empty
    priority: int
    timeout_us: int | None  # in which the answer is of use, beside the deadline of the call
    inputs: list[Input]
    refusal: ServingError | None  # what is wrong with it


class Asked(NamedTuple):
    """A request."""

    head: Head
    id: bytes  # UTF-8
    raws: Sequence[bytes]  # of each input
    typed: pb.ModelInferRequest | None  # which has the tensors, where they are not raw

    def values(self) -> dict[str, Value]:
        """The tensors by name; raw ones are not copied again, and read-only. Raises BadRequest, Unimplemented."""
        head = self.head
        if head.refusal is not None:
            raise head.refusal
        if self.typed is not None:
            return {tensor.name: _typed(tensor, f"input {tensor.name!r}") for tensor in self.typed.inputs}
        if len(self.raws) != len(head.inputs):
            expected = f"one for each of the {len(head.inputs)} inputs"
            raise BadRequest("raw_input_contents", f"{len(self.raws)} entries", expected)
        made: dict[str, Value] = {}
        for (name, datatype, shape, dtype, size), raw in zip(head.inputs, self.raws, strict=True):
            if dtype is not None and len(raw) == size:
                made[name] = np.ndarray(shape, dtype, raw)
            else:
                made[name] = decode(datatype, shape, raw, f"input {name!r}")
        return made


class Requests:
    """Reads requests. Owned by the event loop."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def read(self, message: Buffer) -> Asked:
        """Take a message apart. Raises BadRequest for bytes that are no request."""
        split = _split(message)
        if split is None:
            return _whole(message)
        key, request_id, raws = split
        head = self._heads.get(key)
        if head is None:
            whole = _whole(message)  # has the last word on what is right
            head = whole.head
            if whole.typed is not None or head.refusal is not None:
                return whole
            if len(key) > _LONGEST_HEAD or len(head.inputs) > _MOST_INPUTS:
                return whole
            if len(self._heads) >= _MOST_HEADS:
                self._heads.clear()
            self._heads[key] = head
        return Asked(head, request_id, raws, None)


def _split(message: Buffer) -> tuple[bytes, bytes, list[bytes]] | None:
    """The head's bytes, the id, the raw contents of a message as clients lay it out; None for any other."""
    at, end, request_id = 0, len(message), b""
    head_end, id_at, id_end = end, 0, 0
    raws: list[bytes] = []
    fields = 0
    try:
        while at < end:
            fields += 1
            if fields > _MOST_FIELDS:  # a message of a million empty ones would hold the event loop up
                return None
            tag, size, start = message[at], message[at + 1], at + 2
            if size > 127:
                size, start = _varint_at(message, at + 1)
            stop = start + size
            if tag == _RAW_INPUT:
                if not raws:
                    head_end = at
                raws.append(bytes(message[start:stop]))
            elif raws or tag & 7 != 2 or not 0 < tag >> 3 < 7:
                return None
            elif tag == _ID:
                if id_end:
                    return None
                request_id, id_at, id_end = bytes(message[start:stop]), at, stop
            at = stop
    except IndexError:
        return None
    if at != end or not raws or not request_id.isascii():
        return None
    return bytes(message[:id_at]) + bytes(message[id_end:head_end]), request_id, raws


def _varint_at(message: Buffer, at: int) -> tuple[int, int]:
    """A size of several bytes, and where it ends. Raises IndexError for one that is too long or has no end."""
    size = shift = 0
    while shift < 35:
        byte = message[at]
        at += 1
        size |= (byte & 127) << shift
        if byte < 128:
            return size, at
        shift += 7
    raise IndexError


def _whole(message: Buffer) -> Asked:
    request = parse(pb.ModelInferRequest, message)
    raws = request.raw_input_contents
    refusal, priority, timeout_us = None, 0, None
    try:
        _refuse_what_is_not_here(request)
        priority = _whole_number(request, "priority", "a number: 1 leaves first, 0 last") or 0
        timeout_us = _whole_number(request, "timeout", "a whole number of microseconds, at least 1")
        if timeout_us is not None and timeout_us < 1:
            raise BadRequest("parameter 'timeout'", timeout_us, "a whole number of microseconds, at least 1")
        _refuse_mixtures(request)
    except ServingError as error:
        refusal = error
    inputs = [] if refusal is not None else [_input(tensor) for tensor in request.inputs] if raws else []
    wanted = [output.name for output in request.outputs]
    head = Head(request.model_name, request.model_version, wanted, priority, timeout_us, inputs, refusal)
    return Asked(head, request.id.encode(), raws, None if raws else request)


def _input(tensor: pb.ModelInferRequest.InferInputTensor) -> Input:
    shape, dtype = tuple(tensor.shape), DTYPES.get(tensor.datatype)
    try:
        size = 0 if dtype is None else count_of(shape, "") * dtype.itemsize
    except BadRequest:  # decode says so, when its turn comes
        dtype, size = None, 0
    return Input(tensor.name, tensor.datatype, shape, dtype, size)


def _refuse_mixtures(request: pb.ModelInferRequest) -> None:
    names: set[str] = set()
    for tensor in request.inputs:
        if tensor.name in names:
            raise BadRequest(f"input {tensor.name!r}", "the name twice", "once")
        names.add(tensor.name)
        if request.raw_input_contents and tensor.HasField("contents"):
            raise BadRequest(f"input {tensor.name!r}", "both raw and typed contents", "one of the two")


def _whole_number(request: pb.ModelInferRequest, name: str, expected: str) -> int | None:
    """A parameter of the request; None if it is not there."""
    if name not in request.parameters:
        return None
    given = request.parameters[name]
    kind = given.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise BadRequest(f"parameter {name!r}", f"a {kind}", expected)
    return int(getattr(given, kind))


def _refuse_what_is_not_here(request: pb.ModelInferRequest) -> None:
    """Raise Unimplemented for parameters that would change the answer: shared memory, classification, sequences."""
    names = [name for tensor in request.inputs if tensor.parameters for name in tensor.parameters]
    names += [name for output in request.outputs if output.parameters for name in output.parameters]
    names += [name for name in request.parameters if name.startswith("sequence_")]
    if names:
        raise Unimplemented(f"parameter {min(names)[:100]!r} is not implemented")


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, place: str) -> Value:
    field = _TYPED.get(tensor.datatype)
    if field is None:
        raise BadRequest(
            f"{place} datatype", repr(tensor.datatype), f"one of {', '.join(_TYPED)} (FP16 only as raw contents)"
        )
    contents: Any = getattr(tensor.contents, field)
    shape = tuple(tensor.shape)
    if len(contents) != count_of(shape, place):
        raise BadRequest(place, f"{len(contents)} {field}", f"as many as shape {list(shape)} has")
    if tensor.datatype == "BYTES":
        return texts(contents, shape)
    wide = np.array(contents)
    narrow = wide.astype(DTYPES[tensor.datatype]).reshape(shape)
    if wide.dtype.kind in "iu" and not np.array_equal(wide, narrow.ravel()):
        raise BadRequest(place, "a number out of range", tensor.datatype)
    return narrow


# ---- replies ----


def reply_of(request_id: bytes, answer: Answer) -> Reply:
    """A ModelInferResponse."""
    service, tensors = answer.service, answer.tensors()
    about = tuple((name, getattr(value, "dtype", None), value.shape) for name, value in tensors.items())
    head = service.reply_heads.get(about)
    if head is None:
        if len(service.reply_heads) >= _MOST_HEADS:
            service.reply_heads.clear()
        head = service.reply_heads[about] = _reply_head(service, answer)
    pieces: list[Buffer] = [head]
    if request_id:
        pieces += (_REPLY_ID, varint(len(request_id)), request_id)
    pieces += [_number(name, fact) for name, fact in answer.facts.items() if isinstance(fact, int)]
    joins = True
    for value in tensors.values():
        raw = _raw(value)
        size = len(raw)
        pieces += (_RAW_OUTPUT, varint(size), raw)
        joins = joins and size <= _COPIED_BYTES
    return b"".join(pieces) if joins else pieces


def _reply_head(service: Service, answer: Answer) -> bytes:
    """All of a reply that is the same for answers of the same names, types and shapes."""
    reply = pb.ModelInferResponse(model_name=service.name, model_version=service.version)
    for name, fact in answer.facts.items():
        if isinstance(fact, str):
            reply.parameters[name].string_param = fact
    for name, value in answer.tensors().items():
        reply.outputs.add(name=name, datatype=datatype_of(value), shape=value.shape)
    return reply.SerializeToString()


def _raw(value: Value) -> Buffer:
    """A tensor's raw bytes, where they lie if they are many."""
    if type(value) is np.ndarray and value.nbytes > _COPIED_BYTES and value.dtype.isnative and value.flags.c_contiguous:
        return memoryview(value.data).cast("B")
    return encode(value)


def _number(name: str, number: int) -> bytes:
    """A parameter: an entry of a map whose value is an InferParameter with an int64_param, number not below 0."""
    key, value = name.encode(), b"\x10" + varint(number)
    entry = b"\x0a" + varint(len(key)) + key + b"\x12" + varint(len(value)) + value
    return _REPLY_PARAMETER + varint(len(entry)) + entry
