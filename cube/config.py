"""Settings of a program: flag > environment > file > default.

The file is protobuf text format, its schema the message passed in. Strict: an unknown or mistyped field is an error
with file, line and the nearest name.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cube.errors import BadConfig

M = TypeVar("M", bound=Message)
_UNKNOWN = re.compile(r'type "([\w.]+)" has no field named "(\w+)"')


def read(path: Path, message: M) -> M:
    """Parse a .prototxt file into `message`; raises BadConfig naming file, line and column."""
    return parse(text_of(path), path, message)


def text_of(path: Path) -> str:
    """What a file holds; raises BadConfig."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(str(path), getattr(error, "strerror", None) or error, "a readable text file") from error


def parse(text: str, path: Path, message: M) -> M:
    """Parse the text of the .prototxt file at `path` into `message`; raises BadConfig naming file, line and column."""
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as error:
        place = f"{path}:{error.GetLine() or 1}:{error.GetColumn() or 1}"
        found = str(error).split(" : ", 1)[-1].strip()
        raise unexpected(place, found, message) from error


def unexpected(place: str, found: str, message: Message) -> BadConfig:
    """The error for what protobuf says of a file; of an unknown field, with the nearest name of that message."""
    if unknown := _UNKNOWN.search(found):
        names = next(kind.fields_by_name for kind in _kinds(message.DESCRIPTOR, {}) if kind.full_name == unknown[1])
        return BadConfig(place, f"unknown field {unknown[2]!r}", nearest(unknown[2], names))
    return BadConfig(place, found, f"a {message.DESCRIPTOR.name} as the schema in proto/ says")


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say was expected instead of a name that is none of `names`."""
    known = list(names)
    near = difflib.get_close_matches(name, known, 1)
    return repr(near[0]) if near else f"one of {', '.join(known) or 'none'}"


def settle(message: M, path: Path | None, prefix: str, environ: Mapping[str, str], flags: Mapping[str, Any]) -> M:
    """Fill `message` from a file (if given), then <PREFIX>_<FIELD> variables, then flags that are not None.

    Lists take their whole value from the strongest source; in the environment they are separated by commas.
    """
    if path:
        read(path, message)
    for field in message.DESCRIPTOR.fields:
        name = f"{prefix}_{field.name.upper()}"
        if field.message_type is None and name in environ:
            raw = environ[name]
            values = raw.split(",") if field.is_repeated else [raw]
            _set(message, field, [_typed(field, value, f"environment {name}") for value in values])
        if flags.get(field.name) is not None:
            value = flags[field.name]
            _set(message, field, value if field.is_repeated else [value])
    return message


def _set(message: Message, field: FieldDescriptor, values: list[Any]) -> None:
    message.ClearField(field.name)
    try:
        if field.is_repeated:
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, values[0])
    except (TypeError, ValueError) as error:
        raise BadConfig(field.name, values, str(error)) from error


def _typed(field: FieldDescriptor, raw: str, place: str) -> Any:
    """An environment variable's text as the field's type."""
    if field.cpp_type in (FieldDescriptor.CPPTYPE_STRING,):
        return raw
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if raw.lower() not in ("true", "false"):
            raise BadConfig(place, repr(raw), "true or false")
        return raw.lower() == "true"
    if not (raw.isascii() and raw.isdigit() and int(raw) > 0):  # 0 would read as a field that is not set
        raise BadConfig(place, repr(raw), "a whole number of at least 1")
    return int(raw)


def _kinds(schema: Any, seen: dict[str, Any]) -> Iterable[Any]:
    """A message's type and those of its fields, at any depth."""
    if schema.full_name not in seen:
        seen[schema.full_name] = schema
        for field in schema.fields:
            if field.message_type is not None:
                _kinds(field.message_type, seen)
    return seen.values()
