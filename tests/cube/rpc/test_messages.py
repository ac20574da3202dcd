"""Spliced messages against protobuf: the same bytes are accepted and mean the same, and large values are not copied."""

import contextlib
import time

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cube.errors import BadRequest
from cube.pb import cube_pb2 as pb
from cube.rpc.messages import FEW_FIELDS, INLINE_BYTES, LARGE_BYTES, Large, Spliced
from predictor.pb import kserve_pb2 as kserve

EVERY_WAY = """
name: "every_way.proto" syntax: "proto3"
message_type {
  name: "EveryWay"
  field { name: "top" number: 1 type: TYPE_BYTES label: LABEL_OPTIONAL }
  field { name: "one" number: 2 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_OPTIONAL }
  field { name: "many" number: 3 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_REPEATED }
  field { name: "named" number: 4 type: TYPE_MESSAGE type_name: ".EveryWay.NamedEntry" label: LABEL_REPEATED }
  field { name: "either" number: 5 type: TYPE_BYTES label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "or" number: 600 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "perhaps" number: 700 type: TYPE_BYTES label: LABEL_OPTIONAL oneof_index: 1 proto3_optional: true }
  field { name: "apart" number: 8 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_OPTIONAL }
  oneof_decl { name: "choice" }
  oneof_decl { name: "_perhaps" }
  nested_type {
    name: "NamedEntry"
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_OPTIONAL }
    options { map_entry: true }
  }
}
message_type {
  name: "Part"
  field { name: "data" number: 1 type: TYPE_BYTES label: LABEL_OPTIONAL }
  field { name: "more" number: 2 type: TYPE_BYTES label: LABEL_REPEATED }
  field { name: "part" number: 3 type: TYPE_MESSAGE type_name: ".Part" label: LABEL_OPTIONAL }
  field { name: "numbers" number: 4 type: TYPE_UINT64 label: LABEL_REPEATED }
  field { name: "text" number: 5 type: TYPE_STRING label: LABEL_OPTIONAL }
}
"""
pool = descriptor_pool.DescriptorPool()
pool.Add(text_format.Parse(EVERY_WAY, descriptor_pb2.FileDescriptorProto()))
EveryWay = message_factory.GetMessageClass(pool.FindMessageTypeByName("EveryWay"))
Part = message_factory.GetMessageClass(pool.FindMessageTypeByName("Part"))

LIFTED = {
    pb.LookupRequest: ("tables.keys",),
    pb.LookupReply: ("tables.rows", "tables.found"),
    kserve.ModelInferRequest: ("raw_input_contents", "inputs.contents.bytes_contents"),
    kserve.ModelInferResponse: ("raw_output_contents",),
    EveryWay: (
        "top", "one.data", "one.more", "one.part.data", "many.data", "many.more", "named.value.data", "either",
        "or.data", "perhaps",
    ),
}  # fmt: skip

kinds = st.sampled_from(list(LIFTED))
small_sizes = st.integers(0, 8)  # what tests take for large, so that short messages show everything
F = FieldDescriptor


# Messages and bytes of every kind


@st.composite
def messages(draw, descriptor, depth=4):
    """Any message of a kind."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.booleans()):
            put = scalar(field)
            if field.message_type is not None:
                if depth == 0:
                    continue
                put = messages(field.message_type, depth - 1)
            values = draw(st.lists(put, max_size=3)) if field.is_repeated else [draw(put)]
            target = getattr(message, field.name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                for entry in values:
                    slot = target[entry.key]
                    if isinstance(entry.value, type(slot)):
                        slot.CopyFrom(entry.value)
            elif field.is_repeated:
                target.extend(values)
            elif field.message_type is not None:
                target.CopyFrom(values[0])
            else:
                setattr(message, field.name, values[0])
    return message


def scalar(field):
    return {
        F.TYPE_BYTES: st.binary(max_size=12),
        F.TYPE_STRING: st.text(max_size=4),
        F.TYPE_BOOL: st.booleans(),
        F.TYPE_ENUM: st.integers(0, 2),
        F.TYPE_UINT32: st.integers(0, 2**32 - 1),
        F.TYPE_UINT64: st.integers(0, 2**64 - 1),
        F.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        F.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        F.TYPE_FLOAT: st.floats(width=32),
        F.TYPE_DOUBLE: st.floats(),
    }.get(field.type)


def varint(number, padding=0):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    for _ in range(padding):
        out[-1] |= 128
        out.append(0)
    return bytes(out)


paddings = st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 5])
payloads = {
    0: st.builds(varint, st.integers(0, 2**64 - 1), paddings),
    1: st.binary(min_size=8, max_size=8),
    5: st.binary(min_size=4, max_size=4),
}


@st.composite
def wires(draw, descriptor, depth=4):
    """Bytes such as some peer may write: any order, repeats, unknown fields and groups, other types, long numbers."""
    out = b""
    for _ in range(draw(st.integers(0, 6))):
        field = draw(st.sampled_from(list(descriptor.fields)))
        number = draw(st.sampled_from([field.number] * 6 + [100, 77777]))
        kind = draw(st.sampled_from([2] * 8 + [0, 1, 3, 5]))
        out += varint(number << 3 | kind, draw(paddings))
        if kind == 2:
            if field.message_type is not None and depth:
                value = draw(wires(field.message_type, depth - 1))
            else:
                value = draw(st.binary(max_size=12) if field.type == F.TYPE_BYTES else st.binary(max_size=3))
            out += varint(len(value), draw(paddings)) + value
        elif kind == 3:
            inside = draw(wires(descriptor, depth - 1)) if depth else b""
            out += inside + varint(number << 3 | 4, draw(paddings))
        else:
            out += draw(payloads[kind])
    return out


@st.composite
def damaged(draw, valid):
    """The same with some bytes changed, cut out or put in."""
    wire = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(wire)))
        change = draw(st.sampled_from(["set", "cut", "put", "end"]))
        if change == "set":
            wire[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif change == "cut":
            del wire[at : at + draw(st.integers(1, 4))]
        elif change == "put":
            wire[at:at] = draw(st.binary(min_size=1, max_size=4))
        else:
            del wire[at:]
    return bytes(wire)


# What protobuf would say


def owners(message, names):
    """The messages that a path without its last name leads to."""
    if not names:
        return [message]
    field = message.DESCRIPTOR.fields_by_name[names[0]]
    value = getattr(message, field.name)
    if field.message_type.GetOptions().map_entry:
        return [owner for key in value for owner in owners(value[key], names[2:])]
    if field.is_repeated:
        return [owner for sub in value for owner in owners(sub, names[1:])]
    return owners(value, names[1:]) if message.HasField(field.name) else []


def change_lifted(message, change):
    """Put change(value) in place of each value of a lifted field that is set; returns the message."""
    for path in LIFTED[type(message)]:
        *above, name = path.split(".")
        for owner in owners(message, above):
            value = getattr(owner, name)
            if not isinstance(value, bytes):
                value[:] = [change(one) for one in value]
            elif value:
                setattr(owner, name, change(value))
    return message


def written(message):
    return message.SerializeToString(deterministic=True)


def check_like_protobuf(kind, wire, large_bytes):
    spliced = Spliced(kind, *LIFTED[kind], large_bytes=large_bytes)
    try:
        expected = kind.FromString(wire)
    except DecodeError:
        with pytest.raises(BadRequest):
            spliced.decode(wire)
        return
    message, of = spliced.decode(wire)
    change_lifted(message, lambda value: bytes(of(value)))
    if kind is EveryWay:  # a map's entry with an unknown field is an unknown field as a whole, tokens and all
        message.DiscardUnknownFields()
        expected.DiscardUnknownFields()
    assert written(message) == written(expected)


# Reading


@given(st.data(), kinds, small_sizes)
def test_what_protobuf_writes_reads_the_same(data, kind, large_bytes):
    check_like_protobuf(kind, written(data.draw(messages(kind.DESCRIPTOR))), large_bytes)


@given(st.data(), kinds, small_sizes)
def test_what_any_peer_may_write_reads_as_protobuf_reads_it(data, kind, large_bytes):
    check_like_protobuf(kind, data.draw(wires(kind.DESCRIPTOR)), large_bytes)


@given(st.data(), kinds, small_sizes)
def test_damaged_bytes_are_refused_exactly_if_protobuf_refuses_them(data, kind, large_bytes):
    valid = st.one_of(messages(kind.DESCRIPTOR).map(written), wires(kind.DESCRIPTOR))
    check_like_protobuf(kind, data.draw(damaged(valid)), large_bytes)


@given(st.binary(max_size=200), kinds, small_sizes)
def test_noise_is_refused_exactly_if_protobuf_refuses_it(wire, kind, large_bytes):
    check_like_protobuf(kind, wire, large_bytes)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x0a\x85\x80\x80\x80\x80\x00hello", id="size of six bytes"),
        pytest.param(b"\x0a\x85\x80\x80\x80\x80\x80\x80\x80\x80\x00hello", id="size of ten bytes"),
        pytest.param(b"\x0a\x85\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00hello", id="size of eleven bytes"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0fhello", id="size of 4 GiB"),
        pytest.param(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01hello", id="size of minus one"),
        pytest.param(b"\x8a\x80\x80\x80\x00\x05hello", id="tag of five bytes"),
        pytest.param(b"\x8a\x80\x80\x80\x10\x05hello", id="tag of 33 bits"),
        pytest.param(b"\x8a\x80\x80\x80\x80\x00\x05hello", id="tag of six bytes"),
        pytest.param(b"\x0a\x05hello\x02\x01x", id="field number 0"),
        pytest.param(b"\x0a\x05hello\x0e", id="wire type 6"),
        pytest.param(b"\x0a\x05hello\x0f", id="wire type 7"),
        pytest.param(b"\x0a\x05hello\x48" + b"\xff" * 9 + b"\x7f", id="number of ten bytes, with more bits than 64"),
        pytest.param(b"\x0a\x05hello\x48" + b"\x80" * 10 + b"\x00", id="number of eleven bytes"),
        pytest.param(b"\x0a\x05hell", id="cut in a value"),
        pytest.param(b"\x0a", id="cut before a size"),
        pytest.param(b"\x0a\x05hello\x49\x00\x00", id="cut in a fixed64"),
        pytest.param(b"\x12\x05\x0a\x05hello", id="value past the end of its sub-message"),
        pytest.param(b"\x12\x02\x0a\x85\x00hello", id="size past the end of its sub-message"),
        pytest.param(b"\x12\x01\x8a\x00\x05hello", id="tag past the end of its sub-message"),
        pytest.param(b"\x12\x02\x20\x80\x01\x0a\x05hello", id="number past the end of its sub-message"),
        pytest.param(b"\x4b\x0a\x05hello\x4c\x0a\x02me", id="group with a field of that number"),
        pytest.param(b"\x4b\x0a\x05hello\x54", id="group that ends as another"),
        pytest.param(b"\x0a\x05hello\x4c", id="end of no group"),
        pytest.param(b"\x0a\x05hello\x4b", id="group without an end"),
        pytest.param(b"\x0a\x05hello" + b"\x4b" * 99 + b"\x4c" * 99, id="groups 99 deep"),
        pytest.param(b"\x0a\x05hello" + b"\x4b" * 5000 + b"\x4c" * 5000, id="groups 5000 deep"),
        pytest.param(b"\x0a\x05hello\x0a\x00", id="the last of two is empty"),
        pytest.param(b"\x2a\x05hello\xc2\x25\x02\x0a\x00", id="another member of the oneof after it"),
        pytest.param(b"\xc2\x25\x07\x0a\x05hello\x2a\x02me", id="another member of the oneof before it"),
        pytest.param(b"\x12\x07\x0a\x05hello\x12\x04\x0a\x02me", id="sub-message twice"),
        pytest.param(b"\x22\x08\x0a\x01k\x12\x03\x0a\x01v\x22\x09\x12\x04\x0a\x02me\x0a\x01k", id="key of a map twice"),
        pytest.param(b"\x12\x09\x2a\x02\xff\xfe\x0a\x03not", id="text that is not UTF-8"),
    ],
)
def test_odd_bytes_mean_what_they_mean_to_protobuf(wire):
    for large_bytes in (0, 1, 3):
        check_like_protobuf(EveryWay, wire, large_bytes)


def test_sub_messages_nested_deep_are_refused_like_protobuf_does():
    wire = b""
    for _ in range(2000):
        wire = b"\x1a" + varint(len(wire)) + wire
    check_like_protobuf(EveryWay, b"\x12" + varint(len(wire)) + wire, 1)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_large_value_is_a_view_into_the_message(kind):
    spliced = Spliced(EveryWay, *LIFTED[EveryWay])
    data = bytes(range(256)) * (LARGE_BYTES // 256)
    whole = EveryWay(top=data, one=Part(data=data, more=[data, b"small"]), many=[Part(), Part(data=data, text="t")])
    whole.named["key"].data = data
    wire = kind(whole.SerializeToString())
    message, of = spliced.decode(wire)
    found = [message.top, message.one.data, message.one.more[0], message.many[1].data, message.named["key"].data]
    for value in map(of, found):
        assert value == data
        assert np.shares_memory(np.frombuffer(value, np.uint8), np.frombuffer(wire, np.uint8))
    assert of(message.one.more[1]) == b"small"
    assert of(message.many[0].data) == b""
    assert message.many[1].text == "t"
    assert len(written(message)) < 300


def test_a_short_message_is_as_protobuf_makes_it():
    whole = EveryWay(top=b"rows", one=Part(data=b"more"))
    message, of = Spliced(EveryWay, *LIFTED[EveryWay]).decode(whole.SerializeToString())
    assert message == whole
    assert of(message.top) == b"rows"
    assert of(message.one.data) == b"more"


@pytest.mark.parametrize("parts", [FEW_FIELDS // 4, 100 * FEW_FIELDS])
def test_among_few_fields_or_many_a_large_value_is_what_was_sent(parts):
    data = bytes(range(256)) * (LARGE_BYTES // 256)
    wire = EveryWay(top=data, many=[Part(text="t")] * parts, perhaps=data).SerializeToString()
    message, of = Spliced(EveryWay, *LIFTED[EveryWay]).decode(wire)
    assert of(message.top) == of(message.perhaps) == data
    assert [part.text for part in message.many] == ["t"] * parts


def test_unknown_groups_and_fields_stand_beside_views():
    data = bytes(LARGE_BYTES)
    beside = b"\xa3\x06\x0a\x01x\xa4\x06\xaa\x06\x02hi"
    wire = beside + EveryWay(top=data).SerializeToString() + beside
    message, of = Spliced(EveryWay, "top").decode(wire)
    assert np.shares_memory(np.frombuffer(of(message.top), np.uint8), np.frombuffer(wire, np.uint8))
    assert beside + beside in written(message)


@pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(b"\x50\x01" * 1_000_000, id="unknown numbers"),
        pytest.param(b"\x0a\x00" * 1_000_000, id="tables"),
        pytest.param(b"\x0a\x80\x89\x7a" + b"\x28\x01" * 1_000_000, id="numbers of one table"),
        pytest.param(b"\x0a\x80\x89\x7a" + b"\x22\x00" * 1_000_000, id="marks of one table"),
        pytest.param(b"\x53" * 1_000_000, id="groups"),
    ],
)
@pytest.mark.alone  # compares times of two decoders
def test_a_million_tiny_fields_cost_little_more_than_protobuf_takes_for_them(tiny):
    spliced = Spliced(pb.LookupReply, *LIFTED[pb.LookupReply])

    def seconds(work):
        best = 1e9
        for _ in range(3):
            start = time.thread_time()
            with contextlib.suppress(DecodeError, BadRequest):
                work(tiny)
            best = min(best, time.thread_time() - start)
        return best

    assert seconds(spliced.decode) < 2 * seconds(pb.LookupReply.FromString) + 0.002


# Writing


@given(st.data(), kinds, small_sizes)
def test_what_is_written_reads_the_same_to_protobuf(data, kind, large_bytes):
    whole = data.draw(messages(kind.DESCRIPTOR))
    expected, large = written(whole), Large(large_bytes)
    buffers = Spliced(kind, *LIFTED[kind]).encode(change_lifted(whole, large.put), large)
    assert written(kind.FromString(b"".join(buffers))) == expected


@given(st.lists(st.one_of(st.integers(0, 3 * LARGE_BYTES), st.integers(0, 3 * INLINE_BYTES)), max_size=10))
def test_values_of_any_size_read_back_the_same(sizes):
    values = [bytes([i]) * size for i, size in enumerate(sizes)]
    spliced, large, whole = Spliced(EveryWay, *LIFTED[EveryWay]), Large(), EveryWay()
    for value in values:
        whole.many.add(data=large.put(value), text="t", more=[large.put(value), b""])
    message, of = spliced.decode(b"".join(spliced.encode(whole, large)))
    assert [of(part.data) for part in message.many] == values
    assert [of(part.more[0]) for part in message.many] == values
    assert {(part.text, len(part.more)) for part in message.many} <= {("t", 2)}


rows = np.arange(2 * LARGE_BYTES, dtype=np.float32).reshape(-1, 16)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(rows, id="rows"),
        pytest.param(rows > 0, id="marks"),
        pytest.param(rows[::2], id="with gaps"),
        pytest.param(rows.T, id="in Fortran's order"),
        pytest.param(rows.astype(">f4"), id="big-endian"),
        pytest.param((rows % 1000).astype(np.float16), id="halves"),
        pytest.param(rows.view([("a", "<f4"), ("b", "<u4")]), id="records"),
        pytest.param(rows[:0], id="none"),
        pytest.param(rows[0, 0], id="a scalar"),
    ],
)
@pytest.mark.parametrize("large_bytes", [0, LARGE_BYTES, 1 << 30])
def test_any_array_is_written_in_its_order(array, large_bytes):
    large = Large(large_bytes)
    buffers = Spliced(EveryWay, "top").encode(EveryWay(top=large.put(array)), large)
    assert all(len(buffer) == memoryview(buffer).nbytes for buffer in buffers)
    assert EveryWay.FromString(b"".join(buffers)).top == array.tobytes()


@pytest.mark.parametrize("large_bytes", [0, LARGE_BYTES, 1 << 30])
def test_a_value_in_pieces_is_written_as_one(large_bytes):
    large = Large(large_bytes)
    whole = EveryWay(top=large.put([b"begin", rows, bytearray(b"middle"), b"", memoryview(b"end")]))
    buffers = Spliced(EveryWay, "top").encode(whole, large)
    assert EveryWay.FromString(b"".join(buffers)).top == b"begin" + rows.tobytes() + b"middleend"


def test_a_large_array_is_sent_from_its_own_memory():
    spliced, large = Spliced(pb.LookupReply, *LIFTED[pb.LookupReply]), Large()
    whole = pb.LookupReply()
    for _ in range(2):
        whole.tables.add(dim=16, rows=large.put(rows), found=large.put(b"\1" * 100), version=pb.Version(base=1))
    buffers = spliced.encode(whole, large)
    shared = [np.shares_memory(np.frombuffer(buffer, np.uint8), rows) for buffer in buffers]
    assert shared == [False, True, False, True, False]


def test_a_message_of_small_values_is_one_buffer():
    large = Large()
    whole = EveryWay(top=large.put(np.arange(26)), one=Part(data=large.put(b"x")))
    (buffer,) = Spliced(EveryWay, *LIFTED[EveryWay]).encode(whole, large)
    assert EveryWay.FromString(buffer).top == np.arange(26).tobytes()


def test_unknown_groups_are_written_beside_large_values():
    unknown = b"\xa3\x06\x0a\x01x\xa4\x06"
    large, whole = Large(), EveryWay.FromString(unknown + b"\x1a\x07" + unknown)
    whole.top, whole.many[0].data = large.put(rows), large.put(rows)
    back = EveryWay.FromString(b"".join(Spliced(EveryWay, *LIFTED[EveryWay]).encode(whole, large)))
    assert back.top == back.many[0].data == rows.tobytes()
    assert written(back).count(unknown) == 2


def test_a_large_value_in_a_field_that_is_not_lifted_is_an_error():
    large = Large()
    with pytest.raises(ValueError, match="EveryWay: found 1 of 1 large values in no lifted field"):
        Spliced(EveryWay, "top").encode(EveryWay(apart=Part(data=large.put(rows))), large)


def test_a_large_value_in_no_field_is_an_error():
    large = Large()
    large.put(rows)
    with pytest.raises(ValueError, match="found 1 of 2 large values"):
        Spliced(EveryWay, "top").encode(EveryWay(top=large.put(rows)), large)


def test_a_large_value_in_two_fields_is_an_error():
    large = Large()
    token = large.put(rows)
    with pytest.raises(ValueError, match="found a large value twice"):
        Spliced(EveryWay, "top", "one.data").encode(EveryWay(top=token, one=Part(data=token)), large)


def test_a_message_beyond_what_protobuf_reads_is_an_error():
    large = Large()
    megabyte = bytes(1 << 20)
    with pytest.raises(ValueError, match="bytes, expected 2147483647 at most"):
        Spliced(EveryWay, "top").encode(EveryWay(top=large.put([megabyte] * 2048)), large)


# Plans


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bottom", "EveryWay.bottom: found no such field, expected one of top, one, many"),
        ("one.bottom", "Part.bottom: found no such field"),
        ("one", "EveryWay.one: found another type, expected bytes"),
        ("one.text", "Part.text: found another type, expected bytes"),
        ("top.data", "EveryWay.top: found another type, expected a message"),
        ("", "EveryWay.: found no such field"),
    ],
)
def test_a_path_that_does_not_lead_to_bytes_is_an_error(path, message):
    with pytest.raises(ValueError, match=message):
        Spliced(EveryWay, path)
