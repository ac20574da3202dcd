"""The Open Inference Protocol v2 over gRPC: the six RPCs of inference.GRPCInferenceService.

Numeric outputs always go out as raw contents: the common client decodes nothing else.
"""

import importlib.metadata
from collections.abc import Awaitable
from typing import Any

import numpy as np

from cube.errors import BadRequest, Unimplemented
from cube.rpc.calls import Call, Handler, parse
from predictor.pb import kserve_pb2 as pb
from predictor.service import Answer, InferenceService
from predictor.tensors import DTYPES, Value, count_of, datatype_of, decode, encode, texts
from trainer_tools.manifest import Tensor

SERVICE = "/inference.GRPCInferenceService/"

_TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class KServeDoor:
    """Handlers by gRPC path."""

    def __init__(self, service: InferenceService):
        self._service = service
        version = importlib.metadata.version("cube-serving")
        self._server_metadata = pb.ServerMetadataResponse(name="cube-serving", version=version).SerializeToString()

    def handlers(self) -> dict[str, Handler]:
        """By gRPC path."""
        methods = (
            self.ServerLive, self.ServerReady, self.ServerMetadata, self.ModelReady, self.ModelMetadata, self.ModelInfer
        )  # fmt: skip
        return {SERVICE + method.__name__: method for method in methods}

    def ServerLive(self, message: bytes, call: Call) -> bytes:  # noqa: N802  # the protocol's names
        return pb.ServerLiveResponse(live=True).SerializeToString()

    def ServerReady(self, message: bytes, call: Call) -> bytes:  # noqa: N802
        return pb.ServerReadyResponse(
            ready=True
        ).SerializeToString()  # the port opens after every model is loaded and warm

    def ServerMetadata(self, message: bytes, call: Call) -> bytes:  # noqa: N802
        return self._server_metadata

    def ModelReady(self, message: bytes, call: Call) -> bytes:  # noqa: N802
        request = parse(pb.ModelReadyRequest, message)
        self._service.service(request.name, request.version)
        return pb.ModelReadyResponse(ready=True).SerializeToString()

    def ModelMetadata(self, message: bytes, call: Call) -> bytes:  # noqa: N802
        request = parse(pb.ModelMetadataRequest, message)
        service = self._service.service(request.name, request.version)
        reply = pb.ModelMetadataResponse(
            name=service.name,
            versions=[service.version],
            platform=service.platform,
            inputs=[_metadata(tensor) for tensor in service.inputs],
            outputs=[_metadata(tensor) for tensor in service.output_tensors()],
            properties={f"table.{name}": version for name, version in service.tables.items()},
        )
        return reply.SerializeToString()

    def ModelInfer(self, message: bytes, call: Call) -> bytes | Awaitable[bytes]:  # noqa: N802
        request = parse(pb.ModelInferRequest, message)
        service = self._service.service(request.model_name, request.model_version)
        with service.counts.reading:
            priority, inputs = _priority(request), inputs_of(request)
        wanted = [output.name for output in request.outputs]
        answer = service.infer(inputs, wanted, call, priority)
        if isinstance(answer, Answer):
            return _reply(request.id, answer).SerializeToString()
        return _later(request.id, answer)


async def _later(request_id: str, answer: Awaitable[Answer]) -> bytes:
    return _reply(request_id, await answer).SerializeToString()


def _priority(request: pb.ModelInferRequest) -> int:
    _refuse_what_is_not_here(request)
    if "priority" not in request.parameters:
        return 0
    given = request.parameters["priority"]
    kind = given.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise BadRequest("parameter 'priority'", f"a {kind}", "a number: 1 leaves first, 0 last")
    return int(getattr(given, kind))


def _refuse_what_is_not_here(request: pb.ModelInferRequest) -> None:
    """Raise Unimplemented for parameters that would change the answer: shared memory, classification, sequences."""
    names = [name for tensor in request.inputs if tensor.parameters for name in tensor.parameters]
    names += [name for output in request.outputs if output.parameters for name in output.parameters]
    names += [name for name in request.parameters if name.startswith("sequence_")]
    if names:
        raise Unimplemented(f"parameter {min(names)[:100]!r} is not implemented")


def inputs_of(request: pb.ModelInferRequest) -> dict[str, Value]:
    """The request's tensors by name, raw ones without a copy; raises BadRequest."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise BadRequest(
            "raw_input_contents", f"{len(raws)} entries", f"one for each of the {len(request.inputs)} inputs"
        )
    values: dict[str, Value] = {}
    for i, tensor in enumerate(request.inputs):
        place = f"input {tensor.name!r}"
        if tensor.name in values:
            raise BadRequest(place, "the name twice", "once")
        if raws and tensor.HasField("contents"):
            raise BadRequest(place, "both raw and typed contents", "one of the two")
        values[tensor.name] = decode(tensor.datatype, tensor.shape, raws[i], place) if raws else _typed(tensor, place)
    return values


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


def _reply(request_id: str, answer: Answer) -> pb.ModelInferResponse:
    reply = pb.ModelInferResponse(model_name=answer.service.name, model_version=answer.service.version, id=request_id)
    for name, fact in answer.facts.items():
        if isinstance(fact, int):
            reply.parameters[name].int64_param = fact
        else:
            reply.parameters[name].string_param = fact
    for name, value in answer.tensors().items():
        reply.outputs.add(name=name, datatype=datatype_of(value), shape=value.shape)
        reply.raw_output_contents.append(encode(value))
    return reply


def _metadata(tensor: Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
