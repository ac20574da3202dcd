"""Server reflection behind both doors: what grpcurl shows, and every kind of request."""

import json

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from rpc_doors import DOORS, grpcurl, with_door

from cube.errors import BadRequest, Overloaded
from cube.pb import cube_pb2, health_pb2
from cube.pb import reflection_pb2 as pb
from cube.rpc.calls import Kind
from cube.rpc.health import Health
from cube.rpc.reflection import MAX_REQUEST_BYTES, SERVICES, Reflection
from predictor.pb import kserve_pb2

SERVED = {
    "inference.GRPCInferenceService": kserve_pb2.DESCRIPTOR,
    "cube_serving.cube.Cube": cube_pb2.DESCRIPTOR,
    "grpc.health.v1.Health": health_pb2.DESCRIPTOR,
}

each_door = pytest.mark.parametrize("door", DOORS)
each_protocol = pytest.mark.parametrize("protocol", SERVICES)


def ready(message, call):
    asked = kserve_pb2.ModelReadyRequest.FromString(bytes(message))
    return kserve_pb2.ModelReadyResponse(ready=asked.name == "ctr").SerializeToString()


def infer(message, call):
    request = kserve_pb2.ModelInferRequest.FromString(bytes(message))
    reply = kserve_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    reply.parameters["inputs"].int64_param = len(request.inputs)
    return reply.SerializeToString()


def served(door, work, services=SERVED):
    handlers = {
        "/inference.GRPCInferenceService/ModelReady": ready,
        "/inference.GRPCInferenceService/ModelInfer": infer,
        **Health().handlers(),
        **Reflection(services).handlers(),
    }
    return with_door(door, "ours", handlers, work)


def answers(requests, door="lean", protocol=SERVICES[0], services=SERVED):
    async def work(w):
        path = f"/{protocol}/ServerReflectionInfo"
        replies = await w.ask(path, *(r.SerializeToString() for r in requests), kind=Kind.BIDI)
        return [pb.ServerReflectionResponse.FromString(message) for message in replies.messages]

    return served(door, work, services)


def answer(services=SERVED, **request):
    (one,) = answers([pb.ServerReflectionRequest(**request)], services=services)
    return one


def files_in(reply):
    assert reply.WhichOneof("message_response") == "file_descriptor_response", reply
    return [FileDescriptorProto.FromString(raw) for raw in reply.file_descriptor_response.file_descriptor_proto]


# ------------------------------------------------------------------------------------------------------------ grpcurl


@each_door
def test_grpcurl_lists_the_services_under_the_names_they_are_served_as(door):
    async def work(w):
        listed = await grpcurl(w.target, "list")
        methods = await grpcurl(w.target, "list", "inference.GRPCInferenceService")
        return listed, methods

    listed, methods = served(door, work)
    assert listed.out.split() == sorted([*SERVED, *SERVICES])
    assert methods.out.split() == [
        f"inference.GRPCInferenceService.{method}"
        for method in ("ModelInfer", "ModelMetadata", "ModelReady", "ServerLive", "ServerMetadata", "ServerReady")
    ]


@each_door
def test_grpcurl_describes_services_methods_and_messages(door):
    async def work(w):
        names = (
            "inference.GRPCInferenceService", "inference.GRPCInferenceService.ModelReady",
            "inference.ModelInferRequest", "cube_serving.cube.LookupReply", "grpc.health.v1.HealthCheckResponse",
            "grpc.reflection.v1alpha.ServerReflection",
        )  # fmt: skip
        return [await grpcurl(w.target, "describe", name) for name in names]

    described = served(door, work)
    assert [one.code for one in described] == [0] * 6, [one.err for one in described]
    service, method, infer, reply, health, reflection = (one.out for one in described)
    assert "rpc ModelInfer ( .inference.ModelInferRequest ) returns ( .inference.ModelInferResponse );" in service
    assert "rpc ModelReady ( .inference.ModelReadyRequest ) returns ( .inference.ModelReadyResponse );" in method
    assert "map<string, .inference.InferParameter> parameters = 4;" in infer
    assert "repeated .inference.ModelInferRequest.InferInputTensor inputs = 5;" in infer
    assert "repeated .cube_serving.cube.TableRows tables = 1;" in reply
    assert ".grpc.health.v1.HealthCheckResponse.ServingStatus status = 1;" in health
    assert ".grpc.reflection.v1alpha.ServerReflectionRequest" in reflection


@each_door
def test_grpcurl_describes_all_there_is_and_says_what_is_not(door):
    async def work(w):
        return await grpcurl(w.target, "describe"), await grpcurl(w.target, "describe", "nope.Nope")

    everything, nothing = served(door, work)
    assert everything.code == 0, everything.err
    assert everything.out.count(" is a service:") == len(SERVED) + len(SERVICES)
    assert nothing.code != 0
    assert "not found: nope.Nope" in nothing.err


@each_door
def test_grpcurl_calls_a_method_that_it_knows_from_reflection_only(door):
    async def work(w):
        ready = await grpcurl("-d", '{"name": "ctr"}', w.target, "inference.GRPCInferenceService/ModelReady")
        request = {"model_name": "m", "id": "7", "inputs": [{"name": "x", "parameters": {"p": {"bool_param": True}}}]}
        infer = await grpcurl(
            "-d", json.dumps(request), w.target, "inference.GRPCInferenceService/ModelInfer"
        )  # fmt: skip
        return ready, infer

    ready, infer = served(door, work)
    assert json.loads(ready.out) == {"ready": True}
    assert json.loads(infer.out) == {"modelName": "m", "id": "7", "parameters": {"inputs": {"int64Param": "1"}}}


# ----------------------------------------------------------------------------------------------------------- requests


@each_door
@each_protocol
def test_each_request_is_answered_in_order_and_repeated_in_its_answer(door, protocol):
    requests = [
        pb.ServerReflectionRequest(host="h", list_services=""),
        pb.ServerReflectionRequest(host="i", file_containing_symbol="inference.ModelInferRequest"),
        pb.ServerReflectionRequest(file_by_filename="cube.proto"),
        pb.ServerReflectionRequest(file_by_filename="nope.proto"),
    ]
    replies = answers(requests, door, protocol)
    assert [reply.original_request for reply in replies] == requests
    assert [reply.valid_host for reply in replies] == ["h", "i", "", ""]
    assert [reply.WhichOneof("message_response") for reply in replies] == [
        "list_services_response", "file_descriptor_response", "file_descriptor_response", "error_response",
    ]  # fmt: skip


def test_what_is_listed_is_what_is_served_and_reflection_itself():
    listed = answer(list_services="*").list_services_response.service
    assert [service.name for service in listed] == sorted([*SERVED, *SERVICES])


@pytest.mark.parametrize(
    "symbol",
    [
        "inference.GRPCInferenceService",
        "inference.GRPCInferenceService.ModelInfer",
        "inference.ModelInferRequest",
        "inference.ModelInferRequest.InferInputTensor",
        "inference.ModelInferRequest.InferInputTensor.shape",
        "inference.ModelInferRequest.model_name",
        "inference.InferParameter.parameter_choice",
    ],
)
def test_a_symbol_is_found_in_the_file_that_declares_it_as_it_is_served(symbol):
    (file,) = files_in(answer(file_containing_symbol=symbol))
    assert (file.name, file.package) == ("inference/kserve.proto", "inference")
    assert "cube_serving" not in str(file)


@pytest.mark.parametrize("symbol", ["grpc.health.v1.HealthCheckResponse.ServingStatus", "grpc.health.v1.Health.Watch"])
def test_enums_are_found_and_so_are_methods_of_other_services(symbol):
    assert [file.package for file in files_in(answer(file_containing_symbol=symbol))] == ["grpc.health.v1"]


@pytest.mark.parametrize(
    "request_",
    [
        {"file_containing_symbol": "cube_serving.kserve.ModelInferRequest"},  # the name it is declared under
        {"file_containing_symbol": "inference.Nope"},
        {"file_containing_symbol": ""},
        {"file_containing_symbol": ".inference.ModelInferRequest"},
        {"file_containing_symbol": "cube_serving.config.CubeConfig"},  # in this process, but not served
        {"file_by_filename": "kserve.proto"},
        {"file_by_filename": "../cube.proto"},
        {"file_by_filename": ""},
        {"all_extension_numbers_of_type": "inference.Nope"},
        {"file_containing_extension": {"containing_type": "inference.Nope", "extension_number": 1}},
        {"file_containing_extension": {"containing_type": "inference.ModelInferRequest", "extension_number": 1}},
    ],
    ids=str,
)
def test_what_is_not_described_is_not_found(request_):
    error = answer(**request_).error_response
    assert error.error_code == 5
    assert error.error_message == f"{next(iter(request_))}: not described here"


def test_a_request_that_asks_nothing_is_an_invalid_argument():
    assert answer(host="h").error_response.error_code == 3


@each_door
def test_what_is_no_request_ends_the_call(door):
    async def work(w):
        path = f"/{SERVICES[0]}/ServerReflectionInfo"
        with pytest.raises(BadRequest, match=r"message: found 2 bytes that do not parse"):
            await w.ask(path, b"\xff\xff", kind=Kind.BIDI)
        with pytest.raises(Overloaded):
            await w.ask(path, bytes(MAX_REQUEST_BYTES + 1), kind=Kind.BIDI)

    served(door, work)


# -------------------------------------------------------------------------------- files of several, extensions, names


def pool_of(*files):
    pool = DescriptorPool()
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def message(file, name, **fields):
    """A message with fields of message types, by name."""
    made = file.message_type.add(name=name)
    for number, (field, kind) in enumerate(fields.items(), 1):
        made.field.add(name=field, number=number, label=1, type=11, type_name=kind)
    return made


def services():
    """our.pkg.Front of three files: of its package, of another one that needs it, and of one that neither concerns."""
    plain = FileDescriptorProto(name="plain.proto", package="other", syntax="proto3")
    message(plain, "Plain")
    ours = FileDescriptorProto(name="types.proto", package="our.pkg", syntax="proto2", dependency=["plain.proto"])
    message(ours, "Leaf")
    sub = FileDescriptorProto(name="sub.proto", package="our.pkg.sub", syntax="proto3", dependency=["types.proto"])
    message(sub, "Twig", leaf=".our.pkg.Leaf")
    front = FileDescriptorProto(
        name="front.proto", package="our.pkg", syntax="proto2", dependency=["types.proto", "sub.proto", "plain.proto"]
    )
    tree = message(front, "Tree", leaf=".our.pkg.Leaf", twig=".our.pkg.sub.Twig", plain=".other.Plain")
    tree.extension_range.add(start=100, end=200)
    tree.nested_type.add(name="Inner").field.add(
        name="up", number=1, label=1, type=11, type_name=".our.pkg.Tree"
    )  # fmt: skip
    front.extension.add(name="bark", number=150, label=1, type=11, type_name=".our.pkg.Leaf", extendee=".our.pkg.Tree")
    tree.extension.add(name="moss", number=101, label=1, type=5, extendee=".our.pkg.Tree")
    service = front.service.add(name="Front")
    service.method.add(name="Grow", input_type=".our.pkg.Tree", output_type=".our.pkg.sub.Twig")
    return {"their.Front": pool_of(plain, ours, sub, front).FindFileByName("front.proto")}


def test_a_file_comes_first_and_all_that_it_needs_after_it():
    files = files_in(answer(services(), file_containing_symbol="their.Front"))
    assert files[0].name == "their/front.proto"
    assert {file.name for file in files[1:]} == {"their/types.proto", "their/sub.proto", "plain.proto"}
    pool_of(*reversed(files))  # refuses what does not fit together


def test_every_reference_to_the_renamed_package_is_renamed_and_no_other():
    files = {file.name: file for file in files_in(answer(services(), file_containing_symbol="their.Tree"))}
    front, sub = files["their/front.proto"], files["their/sub.proto"]
    (tree,) = front.message_type
    assert [field.type_name for field in tree.field] == [".their.Leaf", ".our.pkg.sub.Twig", ".other.Plain"]
    assert tree.nested_type[0].field[0].type_name == ".their.Tree"
    assert (front.extension[0].type_name, front.extension[0].extendee) == (".their.Leaf", ".their.Tree")
    assert (tree.extension[0].type_name, tree.extension[0].extendee) == ("", ".their.Tree")
    (grow,) = front.service[0].method
    assert (grow.input_type, grow.output_type) == (".their.Tree", ".our.pkg.sub.Twig")
    assert (sub.package, sub.message_type[0].field[0].type_name) == ("our.pkg.sub", ".their.Leaf")
    assert files["plain.proto"].package == "other"


def test_files_that_are_needed_can_be_asked_for_by_name():
    files = files_in(answer(services(), file_by_filename="their/sub.proto"))
    assert [file.name for file in files] == ["their/sub.proto", "their/types.proto", "plain.proto"]


def test_extensions_are_found_by_their_message_and_number():
    numbers = answer(services(), all_extension_numbers_of_type="their.Tree").all_extension_numbers_response
    assert (numbers.base_type_name, list(numbers.extension_number)) == ("their.Tree", [101, 150])
    none = answer(services(), all_extension_numbers_of_type="their.Leaf").all_extension_numbers_response
    assert (none.base_type_name, list(none.extension_number)) == ("their.Leaf", [])
    for number in (101, 150):
        request = {"containing_type": "their.Tree", "extension_number": number}
        assert files_in(answer(services(), file_containing_extension=request))[0].name == "their/front.proto"
    for symbol in ("their.bark", "their.Tree.moss"):
        assert files_in(answer(services(), file_containing_symbol=symbol))[0].name == "their/front.proto"


def test_a_service_may_be_served_under_two_names():
    both = {
        "a.GRPCInferenceService": kserve_pb2.DESCRIPTOR,
        "cube_serving.kserve.GRPCInferenceService": kserve_pb2.DESCRIPTOR,
    }
    for package in ("a", "cube_serving.kserve"):
        (file,) = files_in(answer(both, file_containing_symbol=f"{package}.ModelInferRequest"))
        assert file.package == package


def test_a_service_that_its_file_does_not_declare_is_refused():
    with pytest.raises(ValueError, match=r"service a\.Nope: found Cube, CubeControl in cube\.proto, expected Nope"):
        Reflection({"a.Nope": cube_pb2.DESCRIPTOR})
