"""ONNX programs by ONNX Runtime, on the CPU or a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, BadRequest, OutOfMemory
from predictor.engines.engine import FITTING, Feed, place_of
from trainer_tools.manifest import Tensor

_DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
}  # fmt: skip
_OUT_OF_MEMORY = (
    "bad_alloc",
    "Failed to allocate",
    "out of memory",
    "smaller than requested bytes",
)  # there is no class of error for it


class OnnxEngine:
    """One program, its weights shared by all threads. A run uses the calling thread, and `threads - 1` more."""

    platform = "onnxruntime_onnx"  # as Triton calls it
    lod_levels: ClassVar[dict[str, int]] = {}

    def __init__(self, program: Path, *, device: str = "cpu", threads: int = 1, memory_limit_mb: int = 0):
        """Load a .onnx; raises BadData, and BadConfig for a device that this ONNX Runtime cannot use.

        memory_limit_mb: for what all runs of this program make; on a GPU for its weights too. 0: none.

        Parameters in files of their own must lie in the program's directory: ONNX Runtime refuses others.
        """
        self._place = place_of(program)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores alone
        # An arena keeps the memory of the largest request for ever, and saved no time on batches of 1 to 8192.
        options.enable_cpu_mem_arena = False
        if memory_limit_mb and device == "cpu":
            _give_arena(memory_limit_mb)
            options.enable_cpu_mem_arena = True
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.log_severity_level = 4  # what fails is raised; the log would say it again
        try:
            self._session = onnxruntime.InferenceSession(
                program, options, providers=_providers(device, memory_limit_mb)
            )
        except BadConfig:
            raise
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise BadData(str(program), _said(error), "an ONNX program that ONNX Runtime can load") from error
        self.inputs = [_described(node, f"{program} input {node.name!r}") for node in self._session.get_inputs()]
        self.outputs = [_described(node, f"{program} output {node.name!r}") for node in self._session.get_outputs()]
        self._input_names = [tensor.name for tensor in self.inputs]
        self._output_names = [tensor.name for tensor in self.outputs]

    def run(self, feeds: Sequence[Feed]) -> list[NDArray[Any]]:
        """See Engine. Inputs are not copied: ONNX Runtime reads the arrays where they are."""
        try:
            made: list[NDArray[Any]] = self._session.run(
                self._output_names, dict(zip(self._input_names, feeds, strict=True))
            )
        except Exception as error:
            said = _said(error)
            if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
                raise OutOfMemory(f"{self._place}: not enough memory for this request") from error
            raise BadRequest(self._place, f"inputs it cannot compute with ({said})", FITTING) from error
        return made

    def close(self) -> None:
        """See Engine."""
        del self._session


def _described(node: Any, place: str) -> Tensor:
    if node.type not in _DATATYPES:
        raise BadData(place, node.type, f"a tensor of {', '.join(_DATATYPES.values())}")
    return Tensor(node.name, _DATATYPES[node.type], [size if isinstance(size, int) else -1 for size in node.shape])


def _give_arena(limit_mb: int) -> None:
    """Have the next session that asks for one get an arena of its own that holds so much at most."""
    kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    as_needed = onnxruntime.OrtArenaCfg({"max_mem": limit_mb << 20, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use), as_needed)


def _providers(device: str, memory_limit_mb: int) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BadConfig(
            "device", device, "cpu: this ONNX Runtime has no CUDA; pip install onnxruntime-gpu instead of it"
        )
    settings = {"device_id": int(device.removeprefix("cuda:"))}
    if memory_limit_mb:
        settings["gpu_mem_limit"] = memory_limit_mb << 20
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def _said(error: Exception) -> str:
    """An error's first line, without ONNX Runtime's prefix `[ONNXRuntimeError] : number : CODE : `."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(" : ", 3)[-1][:200]
