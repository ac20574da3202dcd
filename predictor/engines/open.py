"""Opening what runs a program: the engine for its format, or of several the fastest."""

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cube.errors import BadConfig
from predictor.engines.auto import Candidate, fastest
from predictor.engines.engine import Engine, Feed
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
    warm_up: Sequence[Sequence[Feed]] = (),
) -> Engine:
    """An engine with a program loaded. Raises BadData, and BadConfig for what does not fit or is not to be had here.

    program: its file; parameters lie beside it. format: as in a manifest. engine: the one for the format, or AUTO,
    which times all that can run the program with these settings on `warm_up` (made up if empty) and keeps the fastest
    that agrees. device: "cpu" or "cuda:N". threads: of one run. compile: "aot" compiles a torch.export program first,
    see torch_aot_engine.
    """
    kind = _KINDS.get(format)
    if kind is None:
        raise BadConfig(str(program), f"a program of format {format!r}", " or ".join(_KINDS))
    _check("engine", engine, get_args(Choice))
    _check("compile", compile, get_args(Compile))
    if engine not in ("AUTO", kind.choice):
        raise BadConfig("engine", f"{engine} for {program}", f"{kind.choice} or AUTO, for a {format} program")
    if compile != "none" and format != "torch.export":
        raise BadConfig("compile", f"{compile!r} for {program}", f"none, for a {format} program")
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,3}", device):
        raise BadConfig("device", repr(device), "cpu or cuda:N")
    if threads < 1:
        raise BadConfig("threads", threads, "1 or more")
    made = partial(_made, kind, program, device=device, threads=threads)
    if format == "torch.export":
        candidates = [Candidate("torch", partial(made, "torch_engine", "TorchEngine"))]
        if compile == "aot":
            candidates.append(Candidate("torch, compiled", partial(made, "torch_aot_engine", "TorchAotEngine")))
    elif format == "onnx":
        candidates = [Candidate("onnxruntime", partial(made, "onnx_engine", "OnnxEngine"))]
    else:
        candidates = [Candidate("paddle", partial(made, "paddle_engine", "PaddleEngine"))]
    if engine != "AUTO":
        return candidates[-1].open()
    return fastest(candidates, lambda first: warm_up or [random_feeds(first, samples) for samples in SAMPLES])


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
