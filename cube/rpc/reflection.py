"""Server reflection: what is served here, described to tools such as grpcurl that have no .proto files.

A service is described under the name it is served as. Where that name belongs to someone else (`inference`,
`grpc.health.v1`) ours is declared in a package of our own, so what is described is a copy with the package renamed:

    cube_serving.kserve.GRPCInferenceService of kserve.proto    declared
    inference.GRPCInferenceService of inference/kserve.proto    served, and described

Everything is made and checked when the server starts; a request is answered by looking it up.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

from cube.pb import reflection_pb2 as pb
from cube.rpc.calls import Call, Kind, Method, parse

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
MAX_REQUEST_BYTES = 64 << 10  # a request is one name

_NOT_FOUND, _INVALID_ARGUMENT = 5, 3  # the protocol's own errors carry gRPC status codes as numbers


class Reflection:
    """Describes services. Made before the port opens, not changed afterwards."""

    def __init__(self, services: Mapping[str, FileDescriptor]):
        """services: by the full name it is served as, the file that declares a service of that last name."""
        self._pool: Any = DescriptorPool()  # of our own: nothing but what is served can be asked for
        self._files: dict[str, tuple[bytes, ...]] = {}  # by file name: itself, then what it needs, serialized
        self._methods: dict[str, FileDescriptor] = {}  # by a method's full name: the pool does not find methods
        described = dict(services) | dict.fromkeys(SERVICES, pb.DESCRIPTOR)
        for name, file in described.items():
            self._add(name, file)
        self._list = pb.ListServiceResponse(service=[pb.ServiceResponse(name=name) for name in sorted(described)])

    def handlers(self) -> dict[str, Method]:
        """By gRPC path."""
        method = Method(self.answer, Kind.BIDI, MAX_REQUEST_BYTES)
        return {f"/{service}/ServerReflectionInfo": method for service in SERVICES}

    async def answer(self, requests: AsyncIterator[bytes | memoryview], call: Call) -> AsyncIterator[bytes]:
        """One ServerReflectionResponse for each ServerReflectionRequest; raises BadRequest."""
        async for message in requests:
            yield self._answer(parse(pb.ServerReflectionRequest, message)).SerializeToString()

    def _answer(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        reply = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        asked = request.WhichOneof("message_request")
        try:
            match asked:
                case "list_services":
                    reply.list_services_response.CopyFrom(self._list)
                case "all_extension_numbers_of_type":
                    name = request.all_extension_numbers_of_type
                    extensions = self._pool.FindAllExtensions(self._pool.FindMessageTypeByName(name))
                    reply.all_extension_numbers_response.base_type_name = name
                    reply.all_extension_numbers_response.extension_number.extend(sorted(e.number for e in extensions))
                case None:
                    reply.error_response.error_code = _INVALID_ARGUMENT
                    reply.error_response.error_message = "request: found no kind of request, expected one of the five"
                case _:
                    file = self._file(asked, request)
                    reply.file_descriptor_response.file_descriptor_proto.extend(self._files[file])
        except KeyError:
            reply.error_response.error_code = _NOT_FOUND
            reply.error_response.error_message = f"{asked}: not described here"
        return reply

    def _file(self, asked: str, request: pb.ServerReflectionRequest) -> str:
        """Name of the file that is asked for; raises KeyError."""
        if asked == "file_by_filename":
            return request.file_by_filename
        if asked == "file_containing_extension":
            wanted = request.file_containing_extension
            message = self._pool.FindMessageTypeByName(wanted.containing_type)
            file = self._pool.FindExtensionByNumber(message, wanted.extension_number).file
        else:
            symbol = request.file_containing_symbol
            file = self._methods.get(symbol) or self._pool.FindFileContainingSymbol(symbol)
        return str(file.name)

    def _add(self, served_as: str, file: FileDescriptor) -> None:
        """Describe a service; raises ValueError where `file` does not declare it."""
        package, _, name = served_as.rpartition(".")
        if name not in file.services_by_name:
            declared = ", ".join(file.services_by_name) or "no service"
            raise ValueError(f"service {served_as}: found {declared} in {file.name}, expected {name}")
        protos = [_proto(f) for f in _with_dependencies(file)]
        if package != file.package:
            protos = list(_renamed(protos, file.package, package))
        for proto in protos:
            # The pool refuses a file that does not fit those before it; the same file again is nothing new to it.
            self._pool.AddSerializedFile(proto.SerializeToString())
        mine: FileDescriptor = self._pool.FindFileByName(protos[-1].name)
        for file in _with_dependencies(mine):
            needed = reversed(_with_dependencies(file))  # the one that was asked for comes first
            self._files[file.name] = tuple(_proto(f).SerializeToString() for f in needed)
        self._methods |= {method.full_name: mine for method in mine.services_by_name[name].methods}


def _proto(file: FileDescriptor) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)  # type: ignore[no-untyped-call]
    for described, message in zip(file.message_types_by_name.values(), proto.message_type, strict=True):
        _add_json_names(described, message)
    return proto


def _add_json_names(described: Descriptor, proto: DescriptorProto) -> None:
    """Copies lack them; without them clients show fields under other names than JSON's."""
    for field, copied in zip(described.fields, proto.field, strict=True):
        copied.json_name = field.json_name
    for nested, message in zip(described.nested_types, proto.nested_type, strict=True):
        _add_json_names(nested, message)


def _with_dependencies(file: FileDescriptor) -> list[FileDescriptor]:
    """The file after everything that it needs, each once."""
    found: dict[str, FileDescriptor] = {}

    def visit(file: FileDescriptor) -> None:
        if file.name not in found:
            for needed in file.dependencies:
                visit(needed)
            found[file.name] = file

    visit(file)
    return list(found.values())


def _renamed(protos: list[FileDescriptorProto], old: str, new: str) -> Iterator[FileDescriptorProto]:
    """The files, dependencies first, with package `old` named `new`.

    A file that changes gets a name of its own, new/package/file.proto: the one that it was may be described too.
    """
    files: dict[str, str] = {}  # new names by old
    types: set[str] = set()  # top-level types of the package: a.b.C may also be type C of package a.b
    for proto in protos:
        if proto.package == old or any(needed in files for needed in proto.dependency):
            files[proto.name] = f"{new.replace('.', '/')}/{proto.name}"
            proto.name = files[proto.name]
            proto.dependency[:] = [files.get(needed, needed) for needed in proto.dependency]
            if proto.package == old:
                proto.package = new
                types |= {message.name for message in proto.message_type} | {enum.name for enum in proto.enum_type}
            for holder, field in _references(proto):
                name = getattr(holder, field).removeprefix(f".{old}.")
                if name.split(".")[0] in types and getattr(holder, field) == f".{old}.{name}":
                    setattr(holder, field, f".{new}.{name}")
        yield proto


def _references(proto: FileDescriptorProto | DescriptorProto) -> Iterator[tuple[Message, str]]:
    """Every place that names a type: what holds the name, and in which field. Names are full ones after a dot."""
    fields = proto.field if isinstance(proto, DescriptorProto) else ()
    for field in (*fields, *proto.extension):
        yield from ((field, "type_name"), (field, "extendee"))
    messages = proto.nested_type if isinstance(proto, DescriptorProto) else proto.message_type
    for message in messages:
        yield from _references(message)
    if isinstance(proto, FileDescriptorProto):
        for service in proto.service:
            for method in service.method:
                yield from ((method, "input_type"), (method, "output_type"))
