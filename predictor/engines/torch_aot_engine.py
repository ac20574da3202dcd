"""torch.export programs, translated to C++ by AOTInductor when they are loaded, on the CPU.

A run is one call into compiled code: a net of three layers takes 10 µs for one sample, and 38 µs op by op. It has its
price: half a minute for every start, and torch holds Python's lock for the whole of a run, so that nothing else goes on
in the process, not even another run. It suits small nets, with more processes rather than more threads.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from cube.errors import BadConfig, BadRequest
from predictor.engines.engine import Feed, place_of
from predictor.engines.torch_engine import pure, refusal, silence_read_only_warning
from trainer_tools.programs import torch_export

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class TorchAotEngine:
    """One program as compiled code. A run uses the calling thread, and `threads - 1` more."""

    platform = "torch_aoti"
    lod_levels: ClassVar[dict[str, int]] = {}

    def __init__(self, program: Path, *, device: str = "cpu", threads: int = 1, memory_limit_mb: int = 0):
        """Load and compile a .pt2; raises BadData, and BadConfig where it cannot be compiled here."""
        if device != "cpu":
            raise BadConfig("device", f"{device} for a compiled program", "cpu; or compile: none")
        if memory_limit_mb:
            raise BadConfig("memory_limit_mb", f"{memory_limit_mb} for a compiled program", "0: it has no limit")
        self._place = place_of(program)
        torch.set_num_threads(threads)
        silence_read_only_warning()
        exported = pure(program)
        self.inputs, self.outputs = torch_export.inputs_of(exported), torch_export.outputs_of(exported)
        self._sizes = _sizes(exported, str(program))
        self._loader = _compiled(exported, str(program))
        self._one_at_a_time = Lock()  # torch waits for a run's end with Python's lock in hand, which that run may need

    def run(self, feeds: Sequence[Feed]) -> list[NDArray[Any]]:
        """See Engine. Compiled code believes that sizes and strides are as the program says: both are looked at."""
        arrays, found = [feed for feed in feeds if not isinstance(feed, tuple)], dict[str, int]()
        for at, axis, symbol, least, most in self._sizes:
            size = arrays[at].shape[axis]
            if found.setdefault(symbol, size) != size or not least <= size <= most:
                expected = f"{found[symbol]}, as in another input" if least <= size <= most else f"{least} to {most}"
                raise BadRequest(f"input {self.inputs[at].name!r} dimension {axis}", size, expected)
        tensors = [torch.from_numpy(array).contiguous() for array in arrays]
        try:
            with self._one_at_a_time:
                return [output.numpy() for output in self._loader.boxed_run(tensors)]
        except (MemoryError, RuntimeError) as error:  # what happened is also on standard error, which torch writes to
            raise refusal(error, self._place) from error

    def close(self) -> None:
        """See Engine."""
        del self._loader


class _Size(NamedTuple):
    """A dimension of an input. Those of one symbol are equal."""

    at: int  # number of the input
    axis: int
    symbol: str
    least: int
    most: int


def _sizes(exported: ExportedProgram, place: str) -> list[_Size]:
    """Raises BadConfig for sizes that are computed from others: nothing would check them."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    found = []
    for at, name in enumerate(exported.graph_signature.user_inputs):
        for axis, size in enumerate(nodes[str(name)].meta["val"].shape):
            if isinstance(size, int):
                found.append(_Size(at, axis, f"{name} {axis}", size, size))
                continue
            expression = size.node.expr
            if not expression.is_symbol:
                raise BadConfig(
                    f"{place} input {name}", f"a size of {expression}", "sizes to compile for; or compile: none"
                )
            bounds = exported.range_constraints[expression]
            most = int(bounds.upper) if bounds.upper.is_Integer else (1 << 63) - 1
            found.append(_Size(at, axis, str(expression), int(bounds.lower), most))
    return found


def _compiled(exported: ExportedProgram, place: str) -> Any:
    """A program as code in this process. Its files are gone once it is loaded."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    # AOTInductor wants examples, of which it reads what the trace has: sizes and datatypes.
    exported._example_inputs = (tuple(nodes[str(n)].meta["val"] for n in exported.graph_signature.user_inputs), {})
    try:
        with _private_cache() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of torch
            package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{scratch}/program.pt2")
            return torch._C._aoti.AOTIModelPackageLoader(package, "model", False, 1, -1)
    except Exception as error:  # torch raises whatever its parts raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadConfig(
            f"{place} compile", said, "a program that torch can compile, and g++; or compile: none"
        ) from error


@contextmanager
def _private_cache() -> Iterator[str]:
    """A directory that is ours alone, also for what torch keeps of a compilation.

    Where torch puts that by itself is a directory of a known name in /tmp, which anybody may have made before, and what
    it finds there it runs.
    """
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix="predictor-aot.") as scratch:
        os.environ[_CACHE] = before or scratch
        try:
            yield scratch
        finally:
            if before is None:
                del os.environ[_CACHE]
