"""The service of gRPC's interoperability tests, as handlers of ours: what real clients call in tests."""

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc
from places import ROOT

from cube.rpc.calls import Call, Kind, Method, StatusError, parse

PEERS = ROOT / "tests" / "cube" / "rpc" / "peers"  # the clients that are no Python, and the .proto file of them all
SERVICE = "grpc.testing.TestService"
OBSERVER = "grpc.testing.Observer"

ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"
CALL_ID = "x-call-id"  # a call that carries it can be asked for at the Observer

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def _compiled(name: str):
    """The descriptor of a .proto file of the peers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        line = ["protoc", f"--proto_path={PEERS}", f"--descriptor_set_out={out}", name]
        assert protoc.main(line) == 0, line
        files = FileDescriptorSet.FromString(out.read_bytes())
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool.FindFileByName(name)


FILE = _compiled("interop.proto")
_CLASSES = {name: GetMessageClass(kind) for name, kind in FILE.message_types_by_name.items()}

CallId = _CLASSES["CallId"]
Empty = _CLASSES["Empty"]
SimpleRequest, SimpleResponse = _CLASSES["SimpleRequest"], _CLASSES["SimpleResponse"]
InputRequest, InputResponse = _CLASSES["StreamingInputCallRequest"], _CLASSES["StreamingInputCallResponse"]
OutputRequest, OutputResponse = _CLASSES["StreamingOutputCallRequest"], _CLASSES["StreamingOutputCallResponse"]


class InteropService:
    """Handlers of the service and of the observer. Owned by the event loop."""

    def __init__(self) -> None:
        self._cancelled: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by call id

    def handlers(self) -> dict[str, Method]:
        """By gRPC path. UnimplementedCall is not among them."""
        service = {
            "EmptyCall": Method(self.empty_call),
            "UnaryCall": Method(self.unary_call),
            "StreamingOutputCall": Method(self.streaming_output_call, Kind.SERVER_STREAM),
            "StreamingInputCall": Method(self.streaming_input_call, Kind.CLIENT_STREAM),
            "FullDuplexCall": Method(self.full_duplex_call, Kind.BIDI),
            "HalfDuplexCall": Method(self.half_duplex_call, Kind.BIDI),
        }
        return {f"/{SERVICE}/{name}": method for name, method in service.items()} | {
            f"/{OBSERVER}/Cancelled": Method(self.cancelled)
        }

    def empty_call(self, message, call: Call) -> bytes:
        """Empty → Empty."""
        return parse(Empty, message).SerializeToString()

    def unary_call(self, message, call: Call) -> bytes:
        """A payload of the size that the request asks for, or the status."""
        request = parse(SimpleRequest, message)
        _echo_metadata(call)
        _echo_status(request)
        if request.response_compressed.value:
            call.compression = "gzip"
        return SimpleResponse(payload={"body": bytes(request.response_size)}).SerializeToString()

    async def streaming_output_call(self, message, call: Call) -> AsyncIterator[bytes]:
        """One payload for each response parameter."""
        with self._observing(call):
            _echo_metadata(call)
            async for reply in _replies(parse(OutputRequest, message), call):
                yield reply

    async def streaming_input_call(self, requests: AsyncIterator, call: Call) -> bytes:
        """The size of all payloads together."""
        with self._observing(call):
            _echo_metadata(call)
            size = 0
            async for message in requests:
                size += len(parse(InputRequest, message).payload.body)
            return InputResponse(aggregated_payload_size=size).SerializeToString()

    async def full_duplex_call(self, requests: AsyncIterator, call: Call) -> AsyncIterator[bytes]:
        """As streaming_output_call for each request as it comes."""
        with self._observing(call):
            _echo_metadata(call)
            async for message in requests:
                async for reply in _replies(parse(OutputRequest, message), call):
                    yield reply

    async def half_duplex_call(self, requests: AsyncIterator, call: Call) -> AsyncIterator[bytes]:
        """The same, after the last request."""
        with self._observing(call):
            for request in [parse(OutputRequest, message) async for message in requests]:
                async for reply in _replies(request, call):
                    yield reply

    async def cancelled(self, message, call: Call) -> bytes:
        """CallId → Empty, once the call's handler has been cancelled."""
        await self._cancelled[parse(CallId, message).id].wait()
        return Empty().SerializeToString()

    @contextmanager
    def _observing(self, call: Call) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):  # a generator that waits to be asked on is closed instead
            self._cancelled[str(call.metadata.get(CALL_ID))].set()
            raise


async def _replies(request, call: Call) -> AsyncIterator[bytes]:
    _echo_status(request)
    for wanted in request.response_parameters:
        if wanted.interval_us:
            await asyncio.sleep(wanted.interval_us / 1e6)
        if wanted.compressed.value:
            call.compression = "gzip"
        yield OutputResponse(payload={"body": bytes(wanted.size)}).SerializeToString()


def _echo_metadata(call: Call) -> None:
    if ECHO_INITIAL in call.metadata:
        call.initial_metadata.append((ECHO_INITIAL, call.metadata[ECHO_INITIAL]))
    if ECHO_TRAILING in call.metadata:
        call.trailing_metadata.append((ECHO_TRAILING, call.metadata[ECHO_TRAILING]))


def _echo_status(request) -> None:
    if request.response_status.code:
        raise StatusError(_CODES[request.response_status.code], request.response_status.message)
