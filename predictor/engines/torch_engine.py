"""torch.export programs (.pt2) by torch, on the CPU or a GPU."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from cube.errors import BadConfig, BadData, BadRequest, OutOfMemory
from predictor.engines.engine import FITTING, Feed, place_of
from trainer_tools.programs import torch_export


class TorchEngine:
    """One program, its weights shared by all threads. On the CPU a run uses its thread, and `threads - 1` more."""

    platform = "torch_export"
    lod_levels: ClassVar[dict[str, int]] = {}

    def __init__(self, program: Path, *, device: str = "cpu", threads: int = 1, memory_limit_mb: int = 0):
        """Load a .pt2; raises BadData, and BadConfig for a device that is not there.

        device: "cpu" or "cuda:N". threads: of one run on the CPU; torch knows one number for the whole process, and
        takes that of the model loaded last. memory_limit_mb: of the GPU, for all that torch does there in this process,
        weights included; 0: none.
        """
        self._place, self._device = place_of(program), _device(device)
        _limit_memory(self._device, memory_limit_mb)
        torch.set_num_threads(threads)
        silence_read_only_warning()
        exported = pure(program)
        self.inputs, self.outputs = torch_export.inputs_of(exported), torch_export.outputs_of(exported)
        if self._device.type != "cpu":
            exported = move_to_device_pass(exported, str(self._device))
        self._function = _bound(torch_export.runnable(exported))

    def run(self, feeds: Sequence[Feed]) -> list[NDArray[Any]]:
        """See Engine."""
        try:
            with torch.inference_mode():
                if self._device.type == "cpu":
                    return [output.numpy() for output in self._function(*map(torch.from_numpy, feeds))]
                tensors = [torch.from_numpy(feed).to(self._device, non_blocking=True) for feed in feeds]
                return [output.cpu().numpy() for output in self._function(*tensors)]
        except (MemoryError, RuntimeError, IndexError, ValueError) as error:
            raise refusal(error, self._place) from error

    def close(self) -> None:
        """See Engine."""
        del self._function


def pure(path: Path) -> ExportedProgram:
    """The program in a .pt2; raises BadData, also for one that keeps something from one run to the next."""
    exported = torch_export.load(path)
    if torch_export.is_stateful(exported):
        expected = "a program whose answer depends on its inputs only"
        raise BadData(str(path), "a program that changes its own parameters (max_norm), buffers or inputs", expected)
    return exported


def refusal(error: Exception, place: str) -> Exception:
    """What torch's error in a run means to the caller; the error itself where it is no matter of the inputs."""
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:  # that has no class
        return OutOfMemory(f"{place}: not enough memory for this request")
    if isinstance(error, getattr(torch, "AcceleratorError", ())):  # the GPU's state is unknown from here on
        return error
    return BadRequest(place, f"inputs it cannot compute with ({said})", FITTING)


def _bound(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A program as a plain function of its inputs.

    Its weights are arguments, given now: looking each up in its module on each call, and torch's way of calling a
    module, cost more than a small net computes.
    """
    taken: Any = module
    graph, copies, weights = fx.Graph(), dict[fx.Node, fx.Node](), []
    for node in taken.graph.nodes:
        if node.op == "get_attr":
            copies[node] = graph.placeholder(node.name)
            weights.append(reduce(getattr, node.target.split("."), module))
    for node in taken.graph.nodes:
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return partial(fx.GraphModule(module, graph).forward, *weights)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            raise BadConfig("device", name, f"one that torch sees: cpu{''.join(f', cuda:{i}' for i in range(there))}")
    return device


def _limit_memory(device: torch.device, limit_mb: int) -> None:
    """Raises BadConfig where torch has no limit."""
    if not limit_mb:
        return
    if device.type == "cpu":
        raise BadConfig(
            "memory_limit_mb", f"{limit_mb} for torch on the CPU", "0: torch has no limit there, only on GPUs"
        )
    whole = torch.cuda.get_device_properties(device).total_memory
    if limit_mb << 20 > whole:
        raise BadConfig("memory_limit_mb", limit_mb, f"at most {whole >> 20}, which {device} has")
    torch.cuda.set_per_process_memory_fraction((limit_mb << 20) / whole, device)


def silence_read_only_warning() -> None:
    """torch warns once per process of a tensor over a read-only array. Ours lie over a request's bytes: only read."""
    read_only = np.zeros(1, np.float32)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(read_only)
