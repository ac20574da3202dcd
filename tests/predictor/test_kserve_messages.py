"""What is read and written without protobuf against what protobuf makes of it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.errors import BadRequest, ServingError, Unimplemented
from predictor.doors import kserve_messages
from predictor.doors.kserve_messages import Requests, reply_of
from predictor.ops.op import Port, Ragged
from predictor.pb import kserve_pb2 as pb
from predictor.requests import Form
from predictor.service import Answer, Service
from predictor.tensors import DTYPES, encode, texts

names = st.sampled_from(["x", "y", "dense", "ключ"])
shapes = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@st.composite
def tensors(draw):
    """A name, a datatype, a shape and raw bytes, mostly right."""
    datatype = draw(st.sampled_from(["FP32", "UINT64", "INT32", "BOOL", "FP16", "BYTES", "WORD"]))
    shape = draw(shapes)
    count = int(np.prod(shape))
    if datatype == "BYTES":
        raw = encode(texts([draw(st.binary(max_size=3)) for _ in range(count)], tuple(shape)))
    else:
        raw = draw(st.binary(min_size=1)) * 8 * max(count, 1)
        raw = raw[: count * (DTYPES[datatype].itemsize if datatype in DTYPES else 1)]
    if draw(st.integers(0, 9)) == 0:
        raw += b"\0"
    return draw(names), datatype, shape, raw


@st.composite
def requests(draw):
    request = pb.ModelInferRequest(model_name=draw(names))
    for name, datatype, shape, raw in draw(st.lists(tensors(), max_size=3, unique_by=lambda t: t[0])):
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    request.id = draw(st.sampled_from(["", "7", "a" * 200, "ä"]))
    request.model_version = draw(st.sampled_from(["", "1"]))
    for name in draw(st.lists(names, max_size=2)):
        request.outputs.add(name=name)
    if draw(st.booleans()):
        request.parameters["priority"].int64_param = 3
    if draw(st.booleans()):
        request.parameters["timeout"].int64_param = draw(st.integers(-1, 3))
    kind = draw(st.sampled_from(["", "", "", "parameter", "twice", "typed", "both", "too few"]))
    if kind == "parameter":
        request.parameters["sequence_id"].int64_param = 3
    elif kind == "twice" and request.inputs:
        request.inputs.add().CopyFrom(request.inputs[0])
    elif kind == "typed":
        del request.raw_input_contents[:]
        for tensor in request.inputs:
            tensor.contents.fp32_contents.extend([0.5] * int(np.prod(tensor.shape)))
    elif kind == "both" and request.inputs:
        request.inputs[0].contents.bool_contents.append(True)
    elif kind == "too few" and request.inputs:
        del request.raw_input_contents[-1:]
    return request


def fields_of(message):
    """The bytes of each field of a message."""
    at, found = 0, []
    while at < len(message):
        begin, size, shift = at, 0, 0
        at += 1
        while True:
            byte = message[at]
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        at += size
        found.append(bytes(message[begin:at]))
    return found


def read(reader, message):
    """All that a message says, or the error it is refused with."""
    try:
        asked = reader.read(message)
        head = asked.head
        said = (head.model, head.version, list(head.wanted), head.priority, head.timeout_us, asked.id)
        values = {
            name: (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else
            (value.shape, value.data.tobytes(), value.starts.tolist(), value.sizes.tolist())
            for name, value in asked.values().items()
        }  # fmt: skip
    except ServingError as error:
        return type(error), str(error)
    return said, values


class Whole(Requests):
    """The slow twin: protobuf reads every message whole."""

    def read(self, message):
        return kserve_messages._whole(message)


@settings(max_examples=400, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_messages_are_read_as_protobuf_reads_them(made, random, is_view):
    """Again and again by the same reader, their fields in the usual order and in any other."""
    reader = Requests()
    for request, turn in itertools.product(made, range(3)):
        message = request.SerializeToString()
        if turn == 2:
            fields = fields_of(message)
            random.shuffle(fields)
            message = b"".join(fields)
        assert read(reader, memoryview(message) if is_view else message) == read(Whole(), message)


@settings(max_examples=300, deadline=None)
@given(requests(), st.data())
def test_broken_messages_are_refused_or_read_as_protobuf_reads_them(request_, data):
    message = bytearray(request_.SerializeToString())
    if not message:
        return
    reader = Requests()
    read(reader, bytes(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del message[data.draw(st.integers(0, len(message) - 1)) :]
    found, expected = read(reader, bytes(message)), read(Whole(), bytes(message))
    if expected[0] is BadRequest and "do not parse" in expected[1]:
        assert found[0] is BadRequest
    else:
        assert found == expected


def request_of(shape, request_id=""):
    request = pb.ModelInferRequest(model_name="m", id=request_id)
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    request.raw_input_contents.append(bytes(4 * int(np.prod(shape))))
    return request.SerializeToString()


def test_a_head_is_read_once_whatever_the_id_and_the_numbers(monkeypatch):
    parsed = []
    parse = kserve_messages.parse
    monkeypatch.setattr(kserve_messages, "parse", lambda kind, message: parsed.append(kind) or parse(kind, message))
    reader = Requests()
    for number in range(5):
        assert reader.read(request_of((2, 3), str(number))).values()["x"].shape == (2, 3)
    assert len(parsed) == 1
    reader.read(request_of((3, 3)))
    assert len(parsed) == 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(kserve_messages, "_MOST_HEADS", 10)
    reader = Requests()
    for number in range(100):
        reader.read(request_of((number + 1,)))
        assert len(reader._heads) <= 10
    long = pb.ModelInferRequest(model_name="m" * 5_000, raw_input_contents=[b""])
    reader.read(long.SerializeToString())
    assert all(len(key) <= 4_096 for key in reader._heads)


def test_a_message_of_very_many_fields_is_protobufs():
    """Looking at each here would hold the event loop up."""
    message = request_of((1,)) + b"\x3a\x00" * 1_000_000
    assert kserve_messages._split(message) is None
    with pytest.raises(BadRequest, match="raw_input_contents: found 1000001 entries"):
        Requests().read(message).values()


def test_a_refused_head_is_refused_again_and_not_remembered():
    request = pb.ModelInferRequest.FromString(request_of((1,)))
    request.parameters["sequence_id"].int64_param = 1
    reader = Requests()
    for _ in range(3):
        with pytest.raises(Unimplemented, match="sequence_id"):
            reader.read(request.SerializeToString()).values()
    assert not reader._heads


@pytest.mark.parametrize("given", [0, -1, "soon", 1.5, True])
def test_a_timeout_that_is_none_is_refused(given):
    request = pb.ModelInferRequest.FromString(request_of((1,)))
    kind = {int: "int64_param", str: "string_param", float: "double_param", bool: "bool_param"}[type(given)]
    setattr(request.parameters["timeout"], kind, given)
    with pytest.raises(BadRequest, match=r"parameter 'timeout': found .*, expected a whole number of microseconds"):
        Requests().read(request.SerializeToString()).values()


def test_tensors_are_read_only_and_lie_where_numbers_may_lie():
    value = Requests().read(memoryview(b"\x0a\x01m" + request_of((2, 2)))).values()["x"]
    assert not value.flags.writeable
    assert value.flags.aligned


# ---- replies ----


def service_of(outputs):
    service = Service("m", "3", "test", Form({}, [], max_samples=9, max_keys=9, finite=False), [])
    service.outputs = outputs
    return service


@pytest.mark.parametrize("facts", [{}, {"keys": 300, "keys_absent": 0, "table.t": "7@0"}])
@pytest.mark.parametrize("request_id", ["", "abc", "é" * 100])
def test_replies_are_what_protobuf_reads(facts, request_id):
    ragged = Ragged(np.arange(3, dtype=np.int64), np.array([0, 1, 3]))
    service = service_of({"y": Port("FP32", (-1, 2)), "t": Port("BYTES"), "r": Port("INT64", (-1,), ragged=True)})
    for rows in (2, 2, 3):
        y = np.random.default_rng(0).random((rows, 2), np.float32)
        reply = reply_of(request_id.encode(), Answer(service, {"y": y, "t": texts([b"a", b"bc"]), "r": ragged}, facts))
        read = pb.ModelInferResponse.FromString(reply)
        assert (read.model_name, read.model_version, read.id) == ("m", "3", request_id)
        said = {name: fact.string_param or fact.int64_param for name, fact in read.parameters.items()}
        assert said == facts
        about = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in read.outputs]
        assert about == [
            ("y", "FP32", [rows, 2]),
            ("t", "BYTES", [2]),
            ("r", "INT64", [3]),
            ("r.lengths", "INT32", [2]),
        ]
        lengths = np.array([1, 2], np.int32).tobytes()
        text = encode(texts([b"a", b"bc"]))
        assert list(read.raw_output_contents) == [y.tobytes(), text, ragged.values.tobytes(), lengths]
    assert len(service.reply_heads) == 2


@pytest.mark.parametrize(
    "y", [np.ones((200, 300), np.float32), np.ones((300, 200), np.float32).T, np.ones(30_000, ">f8")]
)
def test_large_outputs_in_any_layout(y):
    service = service_of({"y": Port("FP32", (-1, 300))})
    reply = reply_of(b"", Answer(service, {"y": y, "z": np.zeros(2)}, {}))
    joined = reply if isinstance(reply, bytes) else b"".join(map(bytes, reply))
    first, second = pb.ModelInferResponse.FromString(joined).raw_output_contents
    assert first == y.astype(y.dtype.newbyteorder("<")).tobytes()
    assert second == bytes(16)
