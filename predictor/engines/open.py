"""Opening what runs a program: the engine for its format, or of several the fastest."""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cube.errors import BadConfig
from predictor.engines.auto import Candidate, Undecided, fastest
from predictor.engines.engine import Engine
from predictor.engines.warm_up import SAMPLES, random_feeds

Choice = Literal["AUTO", "TORCH", "ONNXRUNTIME", "PADDLE"]
Compile = Literal["none", "aot"]


class _Kind(NamedTuple):
    """An engine's name in configuration, and what it needs."""

    choice: str
    extra: str  # of this package, which brings `package`
    package: str


_KINDS = {
    "torch.export": _Kind("TORCH", "torch", "torch"),
    "onnx": _Kind("ONNXRUNTIME", "onnx", "onnxruntime"),
    "paddle": _Kind("PADDLE", "paddle", "paddle"),
}  # by a program's format, as in a manifest


def open_engine(
    program: Path,
    format: str,
    *,
    engine: str = "AUTO",
    device: str = "cpu",
    threads: int = 1,
    compile: str = "none",
    memory_limit_mb: int = 0,
    also: Sequence[tuple[Path, str]] = (),
    undecided: bool = False,
) -> Engine:
    """An engine with a program loaded. Raises BadData, and BadConfig for what does not fit or is not to be had here.

    program: its file; parameters lie beside it. format: as in a manifest. engine: the one for a format, or AUTO, which
    times all that can run the program with these settings and keeps the fastest that agrees with the first. device:
    "cpu" or "cuda:N". threads: of one run. compile: "aot" compiles a torch.export program first, see torch_aot_engine.
    memory_limit_mb: of runs, where the engine has such a thing; 0: none. also: the same program in other formats, and
    which. undecided: AUTO waits for requests (`predictor.engines.auto.Undecided`), unless there is nothing to choose.
    """
    forms = [(program, format), *also]
    for file, each in forms:
        if each not in _KINDS:
            raise BadConfig(str(file), f"a program of format {each!r}", " or ".join(_KINDS))
    _check("engine", engine, get_args(Choice))
    _check("compile", compile, get_args(Compile))
    if engine != "AUTO":
        kinds = [_KINDS[each].choice for _, each in forms]
        if engine not in kinds:
            expected = f"{' or '.join(kinds)} or AUTO, for a {format} program"
            raise BadConfig("engine", f"{engine} for {program}", expected)
        forms = [form for form, kind in zip(forms, kinds, strict=True) if kind == engine]
    if compile != "none" and all(each != "torch.export" for _, each in forms):
        raise BadConfig("compile", f"{compile!r} for {program}", f"none, for a {format} program")
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,3}", device):
        raise BadConfig("device", repr(device), "cpu or cuda:N")
    if threads < 1:
        raise BadConfig("threads", threads, "1 or more")
    if memory_limit_mb < 0:
        raise BadConfig("memory_limit_mb", memory_limit_mb, "0 (none) or more")
    settings = {"device": device, "threads": threads, "memory_limit_mb": memory_limit_mb}
    candidates = [one for file, each in forms for one in _candidates(file, each, compile, settings)]
    if engine != "AUTO" or len(candidates) == 1:
        return candidates[-1].open()
    if undecided:
        return Undecided(candidates)
    return fastest(candidates, lambda first: [random_feeds(first, samples) for samples in SAMPLES])


def _candidates(program: Path, format: str, compile: str, settings: Mapping[str, Any]) -> list[Candidate]:
    """What may run a program, what costs least to open first."""
    made = partial(_made, _KINDS[format], program, **settings)
    if format == "onnx":
        return [Candidate("onnxruntime", partial(made, "onnx_engine", "OnnxEngine"))]
    if format == "paddle":
        return [Candidate("paddle", partial(made, "paddle_engine", "PaddleEngine"))]
    candidates = [Candidate("torch", partial(made, "torch_engine", "TorchEngine"))]
    if compile == "aot":
        candidates.append(Candidate("torch, compiled", partial(made, "torch_aot_engine", "TorchAotEngine")))
    return candidates


def _made(kind: _Kind, program: Path, module: str, name: str, **settings: Any) -> Engine:
    """An engine, whose module is imported only now: what it needs is large, and may not be installed."""
    try:
        engine: Callable[..., Engine] = getattr(importlib.import_module(f"predictor.engines.{module}"), name)
    except ImportError as error:
        installed = f"it installed: pip install 'cube-serving[{kind.extra}]'"
        raise BadConfig(str(program), f"no {kind.package} here ({error})", installed) from error
    return engine(program, **settings)


def _check(place: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise BadConfig(place, repr(found), " or ".join(known))
