"""Asks a predictor: the asynchronous client, and a plain face over it."""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.errors import DataCorrupt
from cube.rpc.calls import Buffer, parse
from cube.rpc.channel import Channel
from predictor.pb import kserve_pb2 as pb
from predictor.tensors import Texts, Value, datatype_of, decode, encode

SERVICE = "/inference.GRPCInferenceService/"


class Answer(NamedTuple):
    """Outputs by name, and what they were made from."""

    outputs: dict[str, Value]
    model: str
    version: str
    facts: dict[str, int | str]  # keys, keys_absent, table.<name> = its version


class AsyncClient:
    """Calls to one predictor, from one event loop."""

    def __init__(self, target: str):
        """target: host:port. Connects on first use."""
        self._channel = Channel(target)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any] | Texts],
        outputs: Sequence[str] = (),
        version: str = "",
        timeout_s: float = 10.0,
    ) -> Answer:
        """Run a model. inputs: arrays, or texts(...) for BYTES.

        Outputs: names wanted, all if empty. Raises a ServingError.
        """
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        for name, value in inputs.items():
            value = value if isinstance(value, Texts) else np.asarray(value)
            request.inputs.add(name=name, datatype=datatype_of(value), shape=value.shape)
            request.raw_input_contents.append(encode(value))
        for name in outputs:
            request.outputs.add(name=name)
        return _answer(await self._channel.call(SERVICE + "ModelInfer", request.SerializeToString(), timeout_s))

    async def metadata(self, model: str, timeout_s: float = 10.0) -> pb.ModelMetadataResponse:
        """What a model takes and makes; raises a ServingError."""
        request = pb.ModelMetadataRequest(name=model).SerializeToString()
        reply = await self._channel.call(SERVICE + "ModelMetadata", request, timeout_s)
        return parse(pb.ModelMetadataResponse, reply)

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Client:
    """`AsyncClient` for programs without an event loop. One thread at a time."""

    def __init__(self, target: str):
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(_client(target))

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any] | Texts],
        outputs: Sequence[str] = (),
        version: str = "",
        timeout_s: float = 10.0,
    ) -> Answer:
        """`AsyncClient.infer`."""
        return self._loop.run_until_complete(self._client.infer(model, inputs, outputs, version, timeout_s))

    def close(self) -> None:
        """Disconnect."""
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _client(target: str) -> AsyncClient:
    """A client that belongs to the loop that runs this."""
    return AsyncClient(target)


def _answer(message: Buffer) -> Answer:
    reply = parse(pb.ModelInferResponse, message)
    if len(reply.raw_output_contents) != len(reply.outputs):
        raise DataCorrupt(
            "reply", f"{len(reply.raw_output_contents)} raw contents", f"one for each of {len(reply.outputs)} outputs"
        )
    outputs = {
        tensor.name: decode(tensor.datatype, tensor.shape, raw, f"output {tensor.name!r}")
        for tensor, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }
    facts = {
        name: fact.int64_param if fact.HasField("int64_param") else fact.string_param
        for name, fact in reply.parameters.items()
    }
    return Answer(outputs, reply.model_name, reply.model_version, facts)
