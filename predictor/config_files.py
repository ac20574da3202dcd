"""Configuration files: protobuf text format or YAML of the same messages, and files of flags as gflags reads them."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from cube.config import nearest, parse, text_of, unexpected
from cube.errors import BadConfig

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_SUFFIXES = (".prototxt", ".yaml", ".yml")
# A text field's value without quotes that can only be a path or the name of a file.
_BARE = re.compile(r"(?m)^(\s*\w+\s*:\s*)(?=\S*[./])((?:[A-Za-z_~]|\.{0,2}/)[^\s\"'{}\[\]<>#;,]*)[ \t]*$")
_STEMS = {
    "inferservice": ("service", "infer_service"), "workflow": ("workflow",), "resource": ("resource",)
}  # fmt: skip
_FLAGS = {f"{what}_{part}" for what in _STEMS for part in ("path", "file")} | {
    "gpuid", "num_threads", "port"
}  # fmt: skip
_WITHOUT_MEANING = {
    "bthread_concurrency": "num_threads is the number of compute threads",
    "bthread_min_concurrency": "num_threads is the number of compute threads",
    "enable_cube": "cube_config_file in the resource file says where the cube is",
    "enable_model_toolkit": "models are those of the model_toolkit file",
    "enable_protocol_list": "gRPC and HTTP are answered on one port",
    "enable_prometheus": "/metrics is always there",
    "g": "flags are read in any case",
    "log_dir": "the log goes to standard error",
    "logger_path": "the log goes to standard error",
    "max_body_size": "message sizes have a fixed limit",
    "max_concurrency": "a workflow's batch { max_waiting_rows } says what is too much",
    "prometheus_port": "/metrics is on the same port",
    "reload_interval_s": "models are loaded at start",
    "request_cache_size": "there is no cache of requests",
    "use_parallel_infer_service": "a service's `parallel` says it",
}


def read(path: Path, message: M) -> M:
    """A file as a message, whichever of the two forms it has."""
    text = text_of(path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(text, path, message)
    # The ancestor's own manual has paths without quotes.
    return parse(_BARE.sub(r'\1"\2"', text), path, message)


def _from_yaml(text: str, path: Path, message: M) -> M:
    try:
        import yaml
    except ImportError as error:
        raise BadConfig(str(path), f"YAML, and no PyYAML here ({error})", "pip install 'cube-serving[yaml]'") from error

    class Loader(yaml.SafeLoader):
        """Plain data only, and every key once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for at, key in enumerate(keys):
                if keys.index(key) != at:
                    line = node.value[at][0].start_mark.line + 1
                    raise BadConfig(f"{path}:{line}", f"{key!r} twice", "once")
            return super().construct_mapping(node, deep)

    try:
        said = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        raise BadConfig(place, error.problem, f"a {message.DESCRIPTOR.name} as YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadConfig(str(path), " ".join(str(error).split()), f"a {message.DESCRIPTOR.name} as YAML") from error
    if not isinstance(said, dict | None):
        raise BadConfig(str(path), f"a {type(said).__name__}", f"the fields of a {message.DESCRIPTOR.name}")
    try:
        return json_format.ParseDict(_with_settings(said or {}, path), message, max_recursion_depth=20)
    except json_format.ParseError as error:
        found = str(error)
        at = re.search(r' at "\w+\.([\w.\[\]]+)"', found) or re.search(r"Failed to parse ([\w.\[\]]+) field", found)
        raise unexpected(f"{path} {at[1]}" if at else str(path), found, message) from error


def _with_settings(said: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same, with each node's `config: {k: 3}` as its messages."""
    for workflow in _objects(said.get("workflows")):
        for node in _objects(workflow.get("nodes")):
            if isinstance(node.get("config"), dict):
                place = f"{path} node {node.get('name')!r} config"
                node["config"] = [_setting(str(key), value, place) for key, value in node["config"].items()]
    return said


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _setting(key: str, value: Any, place: str) -> dict[str, Any]:
    values = value if isinstance(value, list) else [value]
    kinds = {bool: "flag", int: "integer", float: "number", str: "text"}
    if len({type(each) for each in values}) > 1 and all(type(each) in (int, float) for each in values):
        values = [float(each) for each in values]
    for each in values:
        if type(each) not in kinds or type(each) is not type(values[0]):
            found = f"{type(each).__name__} {each!r}"
            raise BadConfig(f"{place} {key!r}", found, "text, a number, true or false, or a list of one of these")
    return {"key": key, "list": isinstance(value, list), **({kinds[type(values[0])]: values} if values else {})}


class Flags:
    """The ancestor's flags, as files of them say."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, str, Path]] = {}  # value, place, directory

    def read(self, path: Path) -> None:
        """Take a file's lines, --name=value or --name; they go before those of earlier files."""
        for number, line in enumerate(text_of(path).splitlines(), 1):
            line, place = line.strip(), f"{path}:{number}"
            if not line or line.startswith("#"):
                continue
            match = re.fullmatch(r"--?(\w+)(?:=(.*))?", line)
            if match is None:
                raise BadConfig(place, repr(line), "--name=value, or --name")
            name, value = match[1], (match[2] or "").strip().strip("\"'")
            if name not in _FLAGS and name.removeprefix("no") in _WITHOUT_MEANING:
                name = name.removeprefix("no")
            if why := _WITHOUT_MEANING.get(name):
                log.info("%s --%s has no meaning here: %s", place, name, why)
            elif name not in _FLAGS:
                raise BadConfig(place, f"unknown flag {name!r}", nearest(name, (*_FLAGS, *_WITHOUT_MEANING)))
            elif not value:
                raise BadConfig(place, f"--{name} without a value", f"--{name}=VALUE")
            else:
                self._said[name] = value, place, path.parent

    def number(self, name: str, least: int, most: int) -> int:
        """A flag's value, 0 if it is not there."""
        value, place, _ = self._said.get(name, ("0", "", Path()))
        if not (value.isascii() and value.isdigit() and least <= int(value[:10]) <= most):
            raise BadConfig(f"{place} --{name}", repr(value), f"a whole number from {least} to {most}")
        return int(value)

    def has(self, name: str) -> bool:
        """Whether a file says it."""
        return name in self._said

    def file(self, what: str, directory: Path) -> Path:
        """The service, workflow or resource file; raises BadConfig if it is not there."""
        path = self.file_or_none(what, directory)
        if path is None:
            known = " or ".join(f"{name}.prototxt" for name in _STEMS[what])
            raise BadConfig(str(directory), f"no {known}", "a file that says it, .prototxt or .yaml")
        return path

    def file_or_none(self, what: str, directory: Path) -> Path | None:
        """The same; None if no flag names it and it is not there."""
        if f"{what}_path" in self._said:
            value, _, base = self._said[f"{what}_path"]
            directory = resolved(value, base)
        if f"{what}_file" in self._said:
            value, place, _ = self._said[f"{what}_file"]
            if not (directory / value).is_file():
                raise BadConfig(f"{place} --{what}_file", f"no file {directory / value}", f"the {what} file")
            return directory / value
        stems = _STEMS[what]
        return one_of(directory, stems)


def one_of(directory: Path, stems: Sequence[str]) -> Path | None:
    found = [path for stem in stems for suffix in _SUFFIXES if (path := directory / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise BadConfig(str(directory), " and ".join(path.name for path in found), "one of them")
    return found[0] if found else None


def resolved(path: str, base: Path) -> Path:
    """A path in a file of the directory `base`: from there if there is something at it, else as it stands."""
    there = base / Path(path).expanduser()
    return there if there.exists() else Path(path).expanduser()
