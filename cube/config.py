"""Settings of a program: flag > environment > file > default.

The file is protobuf text format, its schema the message passed in. Strict: an unknown or mistyped field is an error
with file, line and the nearest name.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cube.errors import BadConfig

M = TypeVar("M", bound=Message)
_UNKNOWN = re.compile(r'has no field named "(\w+)"')


def read(path: Path, message: M) -> M:
    """Parse a .prototxt file into `message`; raises BadConfig naming file, line and column."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(str(path), getattr(error, "strerror", None) or error, "a readable text file") from error
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as error:
        place = f"{path}:{error.GetLine() or 1}:{error.GetColumn() or 1}"
        found = str(error).split(" : ", 1)[-1].strip()
        if unknown := _UNKNOWN.search(found):
            names = [n for d in (message.DESCRIPTOR, *_nested(message)) for n in d.fields_by_name]
            near = difflib.get_close_matches(unknown[1], names, 1)
            raise BadConfig(
                place, f"unknown field {unknown[1]!r}", repr(near[0]) if near else f"one of {names}"
            ) from error
        raise BadConfig(place, found, f"a {message.DESCRIPTOR.name} in protobuf text format") from error


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


def _nested(message: Message) -> list[Any]:
    return [f.message_type for f in message.DESCRIPTOR.fields if f.message_type is not None]
