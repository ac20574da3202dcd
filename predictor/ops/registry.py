"""A node's type and config → its op.

    make("top_k", {"k": 5, "input": "prob"}, resources)
    make("own_op:Normalise", {"mean": [0.5, 0.5]}, resources)

A type is a name of `TYPES` or `MODEL_TYPES`, one of the ancestor's names, or module:Class for an op of one's own. The
keys of `config` are the keyword arguments of its constructor, whose annotations say what their values must be: str,
int, float, bool, a Literal, a Path (a file that the configuration names), or a sequence of these. Arguments without an
annotation are passed as they come.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

from cube.errors import BadConfig, ServingError
from predictor.models import Model, Settings
from predictor.named import imported
from predictor.ops.gather import Absent, Gather
from predictor.ops.infer import Infer, NanPolicy
from predictor.ops.op import Op
from predictor.ops.pool import Mode, Pool


class Resources(Protocol):
    """What the ops of a process share, for those that need it."""

    @property
    def settings(self) -> Settings:
        """What all models share."""
        ...

    def model(self, name: str | None) -> Model:
        """A model by name; None: the only one. Raises BadConfig where there is none, or more than one."""
        ...

    def path(self, name: str) -> Path:
        """Where a file is that the configuration names."""
        ...


def _infer(
    model: Model, settings: Settings, *, nan: NanPolicy = "pass", threads: int = 0, part_rows: int = 32
) -> Infer:
    return Infer(model.engine, nan=nan, threads=threads, part_rows=part_rows)


def _gather(model: Model, settings: Settings, *, absent: Absent = "zeros") -> Gather:
    return model.gather(settings, absent)


def _pool(model: Model, settings: Settings, *, mode: Mode = "as trained") -> Pool:
    return model.pool(mode)


# Where the class of each type is; its module is imported when a node asks for it.
TYPES = {
    "read": "predictor.ops.values:PassOn",
    "echo": "predictor.ops.values:PassOn",
    "select": "predictor.ops.values:Select",
    "concat": "predictor.ops.values:Concat",
    "cast": "predictor.ops.values:Cast",
    "choose": "predictor.ops.values:Choose",
    "average": "predictor.ops.values:Average",
    "top_k": "predictor.ops.rank:TopK",
    "respond": "predictor.ops.respond:Respond",
    "tokenise": "predictor.ops.text:Tokenise",
    "pad": "predictor.ops.text:Pad",
    "image": "predictor.ops.image:DecodeImage",
    "sign": "predictor.ops.sign:Sign",
}
# Types made of a model, which the key `model` of their config names where there are several.
MODEL_TYPES: dict[str, Callable[..., Op]] = {"gather": _gather, "pool": _pool, "infer": _infer}


class _Alias(NamedTuple):
    """What a type of the ancestor's is here."""

    name: str
    config: Mapping[str, Any] = {}  # unless the node says otherwise


_ALIASES = {
    "ReaderOp": _Alias("read"),
    "GeneralReaderOp": _Alias("read"),
    "CommonEchoOp": _Alias("echo"),
    "ClassifyOp": _Alias("infer"),
    "GeneralInferOp": _Alias("infer"),
    "WriteJsonOp": _Alias("respond", {"json": True}),
    "GeneralResponseOp": _Alias("respond"),
}
# Types that stand for several nodes, each depending on the one before it. The last of them has the node's name.
IN_SERIES: Mapping[str, Sequence[str]] = {"GeneralDistKVInferOp": ("gather", "pool", "infer")}


def make(kind: str, config: Mapping[str, Any], resources: Resources | None = None) -> Op:
    """The op of a node. Raises BadConfig naming type and key, and what the op's constructor raises of cube.errors.

    kind: the node's type. config: str, int, float, bool and lists of these. resources: None where there are none, as in
    a process that only runs this op.
    """
    if kind in IN_SERIES:
        raise BadConfig(f"type {kind!r}", "one node", f"nodes {' → '.join(IN_SERIES[kind])}")
    alias = _ALIASES.get(kind, _Alias(kind))
    name, given, place = alias.name, {**alias.config, **config}, f"op {kind!r}"
    made: Callable[..., Op]
    if name in MODEL_TYPES:
        made = _of_model(MODEL_TYPES[name], given.pop("model", None), place, resources)
    elif name in TYPES or ":" in name:
        made = _imported(TYPES.get(name, name), place)
    else:
        near = difflib.get_close_matches(name, known(), 1)
        expected = repr(near[0]) if near else f"one of {', '.join(known())}, or module:Class"
        raise BadConfig(f"type {kind!r}", "no such op", expected)
    arguments = _arguments(made, given, place, resources)
    try:
        return made(**arguments)
    except BadConfig as error:
        raise BadConfig(f"{place} {error.place}", error.found, error.expected) from error
    except ServingError:
        raise
    except Exception as error:  # the class may be the user's
        expected = "a class that can be made of its config"
        raise BadConfig(place, f"{error.__class__.__name__}: {error}", expected) from error


def series(kind: str) -> Sequence[str]:
    """The types of ours that a node's type stands for: as a rule one."""
    name = _ALIASES.get(kind, _Alias(kind)).name
    return IN_SERIES.get(name, (name,))


def known() -> list[str]:
    """All types but those of one's own."""
    return [*TYPES, *MODEL_TYPES, *_ALIASES, *IN_SERIES]


def _of_model(function: Callable[..., Op], model: Any, place: str, resources: Resources | None) -> Callable[..., Op]:
    """A function of MODEL_TYPES that has its model, and takes the rest of the config."""
    if model is not None and not isinstance(model, str):
        raise BadConfig(f"{place} config 'model'", repr(model), "a text")
    if resources is None:
        raise BadConfig(place, "no models here", "an op that needs none")
    return partial(function, resources.model(model), resources.settings)


def _imported(target: str, place: str) -> type[Op]:
    """The class that module:Class names. What the module does when it is imported happens now."""
    found = imported(target, place, "class")
    if not (isinstance(found, type) and issubclass(found, Op)):
        raise BadConfig(place, f"{target}, which is no op", "a subclass of predictor.ops.op.Op")
    return found


# ---- config → arguments ----


def _arguments(
    made: Callable[..., Any],
    config: Mapping[str, Any],
    place: str,
    resources: Resources | None,
) -> dict[str, Any]:
    """The keyword arguments that `config` gives, checked."""
    parameters = inspect.signature(made).parameters
    taken = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(made)
    arguments = {}
    for name, value in config.items():
        if name not in taken and not takes_any:
            near = difflib.get_close_matches(name, taken, 1)
            expected = repr(near[0]) if near else f"one of {', '.join(taken)}" if taken else "none"
            raise BadConfig(f"{place} config {name!r}", "no such key", expected)
        arguments[name] = _fitted(value, hints.get(name, Any), f"{place} config {name!r}", resources)
    for name, parameter in taken.items():
        if name not in arguments and parameter.default is parameter.empty:
            raise BadConfig(f"{place} config {name!r}", "nothing", _said(hints.get(name, Any)))
    return arguments


def _hints(made: Callable[..., Any]) -> Mapping[str, Any]:
    if isinstance(made, partial):
        made = made.func
    try:
        return get_type_hints(inspect.getattr_static(made, "__init__") if isinstance(made, type) else made)
    except NameError:  # names that only a type checker imports
        return {}


_SCALARS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    Path: ((str,), "the path of a file"),
}


def _fitted(value: Any, hint: Any, place: str, resources: Resources | None) -> Any:
    """A value as an argument of its annotation; raises BadConfig."""
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            if option is not type(None):
                try:
                    return _fitted(value, option, place, resources)
                except BadConfig:
                    continue
        raise BadConfig(place, repr(value), _said(hint))
    if hint in _SCALARS:
        kinds, expected = _SCALARS[hint]
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise BadConfig(place, repr(value), expected)
        if hint is Path:
            return resources.path(str(value)) if resources is not None else Path(str(value))
        return value
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise BadConfig(place, repr(value), _said(hint))
        return value
    if _is_sequence(hint):
        value = (
            value if isinstance(value, list | tuple) else [value]
        )  # text format does not tell one from a list of one
        each = (get_args(hint) or (Any,))[0]
        return [_fitted(v, each, f"{place}[{i}]", resources) for i, v in enumerate(value)]
    return value


def _is_sequence(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple, Sequence)


def _said(hint: Any) -> str:
    """An annotation in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_said(option) for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if _is_sequence(hint):
        return f"a list, each {_said((get_args(hint) or (Any,))[0])}"
    return _SCALARS[hint][1] if hint in _SCALARS else "a value"
