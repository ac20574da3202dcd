"""The Open Inference Protocol v2 over gRPC: the six RPCs of inference.GRPCInferenceService.

Numeric outputs always go out as raw contents: the common client decodes nothing else.
"""

import importlib.metadata
import time
from collections.abc import Awaitable
from functools import partial

from cube.rpc.calls import Buffer, Call, Handler, Reply, parse
from predictor.doors.kserve_messages import Requests, reply_of
from predictor.pb import kserve_pb2 as pb
from predictor.service import InferenceService
from trainer_tools.manifest import Tensor

SERVICE = "/inference.GRPCInferenceService/"


class KServeDoor:
    """Handlers by gRPC path."""

    def __init__(self, service: InferenceService):
        self._service, self._requests = service, Requests()
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

    def ModelInfer(self, message: Buffer, call: Call) -> Reply | Awaitable[Reply]:  # noqa: N802
        asked = self._requests.read(message)
        head = asked.head
        service = self._service.service(head.model, head.version)
        with service.counts.reading:
            inputs = asked.values()
        if head.timeout_us is not None:
            until = time.monotonic() + head.timeout_us / 1e6
            call.deadline = until if call.deadline is None else min(call.deadline, until)
        return service.infer(inputs, head.wanted, call, head.priority, then=partial(reply_of, asked.id))


def _metadata(tensor: Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
