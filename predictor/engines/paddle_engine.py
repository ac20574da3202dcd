"""Paddle programs (`__model__`, NAME.pdmodel) by Paddle Inference, in this process."""

import importlib
import os
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadData, BadRequest, OutOfMemory
from predictor.engines.engine import FITTING, Feed, place_of
from predictor.tensors import check_alike
from trainer_tools.programs import paddle as paddle_programs

_DATATYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64")  # that Paddle takes from numpy
_GPU_POOL_MB = 256  # of device memory that Paddle takes at once; it takes more as it needs


class PaddleEngine:
    """One program, its weights shared by all runs. A run has a predictor of its own, cloned when all are busy."""

    platform = "paddle"

    def __init__(self, program: Path, *, device: str = "cpu", threads: int = 1, memory_limit_mb: int = 0):
        """The program in a file, its parameters beside it, as prune-program or Paddle wrote them.

        threads: of one run. Raises BadConfig without Paddle, BadData.
        """
        if memory_limit_mb:
            raise BadConfig("memory_limit_mb", f"{memory_limit_mb} for Paddle", "0: Paddle has no limit that it keeps")
        self._place = place_of(program)
        read = paddle_programs.load(program.parent)
        if read.path != program:
            raise BadData(str(program), f"another program beside it, {read.path.name}", "one in a directory")
        self.inputs, self.outputs = read.inputs(), read.outputs()
        ends = (*self.inputs, *self.outputs)
        self.lod_levels = {t.name: level for t in ends if (level := read.lod_level(t.name))}
        for tensor in (*self.inputs, *self.outputs):
            if tensor.datatype not in _DATATYPES:
                raise BadData(f"{program} {tensor.name!r}", tensor.datatype, f"one of {', '.join(_DATATYPES)}")
            if self.lod_levels.get(tensor.name, 0) > 1:
                raise BadData(f"{program} {tensor.name!r}", "sequences of sequences", "sequences (LoD level 1) at most")
        self._rows, self._alike, self._takes_empty = _rows_of_ids(read), read.alike(), read.takes_empty()
        inference = _paddle_inference(str(program))
        parameters = program.parent / read.combined if read.combined else None
        config = inference.Config(*map(str, (program, parameters) if parameters else (program.parent,)))
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(threads)
        if self.lod_levels:
            config.switch_ir_optim(False)  # its fused recurrences write beyond their memory where a sequence is empty
        else:
            config.enable_memory_optim()
        if device == "cpu":
            config.disable_gpu()
            config.disable_onednn()  # its kernels die of an empty batch (seen with 3.3.1), and small nets gain nothing
        else:
            config.enable_use_gpu(_GPU_POOL_MB, int(device.removeprefix("cuda:")))
            if not config.use_gpu():
                raise BadConfig("device", device, "cpu: this Paddle was built without CUDA")
        try:
            self._first = inference.create_predictor(config)
        except Exception as error:  # Paddle raises what its codes map to: ValueError, RuntimeError, OSError ...
            raise BadData(str(program), f"a program Paddle cannot load ({_said(error)})", "one it can") from error
        self._free: deque[Any] = deque([self._first])
        self._cloning = Lock()

    def run(self, feeds: Sequence[Feed]) -> list[Any]:
        """See Engine."""
        for tensor, feed in zip(self.inputs, feeds, strict=True):
            if tensor.name in self._rows:
                _check_ids(feed[0] if isinstance(feed, tuple) else feed, self._rows[tensor.name], tensor.name)
        lengths = {t.name: np.diff(f[1]) for t, f in zip(self.inputs, feeds, strict=True) if isinstance(f, tuple)}
        check_alike(self._alike, lengths)
        if self._takes_empty or all(each.all() for each in lengths.values()):
            return self._computed(feeds)
        return self._without_empty(feeds, list(lengths.values()))

    def _without_empty(self, feeds: Sequence[Feed], lengths: Sequence[NDArray[np.int64]]) -> list[Any]:
        """Outputs of a program that cannot be given empty sequences: they are left out, and put back where they were.

        That is possible where everything is a sequence, and empty wherever any other of its sample is.
        """
        is_full = np.all([each > 0 for each in lengths], axis=0)
        every = (*self.inputs, *self.outputs)
        if any(t.name not in self.lod_levels for t in every) or any((each[~is_full] > 0).any() for each in lengths):
            found = f"an empty sequence in sample {np.flatnonzero(~is_full)[0]}"
            raise BadRequest(self._place, found, "values in each: Paddle's recurrent ops go wrong without")
        if not is_full.any():
            one = [(np.zeros((1, *feed[0].shape[1:]), feed[0].dtype), np.array([0, 1])) for feed in feeds]
            return [(values[:0], np.zeros(is_full.size + 1, np.int64)) for values, _ in self._computed(one)]
        kept = np.concatenate([[True], is_full])
        made = self._computed([(feed[0], feed[1][kept]) for feed in feeds])
        return [(values, offsets[np.cumsum(kept) - 1]) for values, offsets in made]

    def _computed(self, feeds: Sequence[Feed]) -> list[Any]:
        """Outputs as Paddle makes them."""
        predictor = self._taken()
        try:
            for tensor, feed in zip(self.inputs, feeds, strict=True):
                handle = predictor.get_input_handle(tensor.name)
                if isinstance(feed, tuple):
                    handle.copy_from_cpu(paddle_programs.padded(*feed))
                    handle.set_lod([feed[1].tolist()])
                else:
                    handle.copy_from_cpu(feed)
            predictor.run()
            return [self._made(t.name, predictor.get_output_handle(t.name), feeds) for t in self.outputs]
        except MemoryError as error:
            raise OutOfMemory(f"{self._place}: not enough memory for this request") from error
        except (ValueError, IndexError, RuntimeError, NotImplementedError, OSError) as error:
            raise BadRequest(self._place, f"inputs it cannot compute with ({_said(error)})", FITTING) from error
        finally:
            self._free.append(predictor)

    def _made(self, name: str, handle: Any, feeds: Sequence[Feed]) -> Any:
        """An output, without what it has for rows that no sequence owns."""
        array: NDArray[Any] = handle.copy_to_cpu()
        lod = handle.lod()
        if name not in self.lod_levels:
            return array[: lod[-1][-1]] if lod else array
        given = next(feed[1] for feed in feeds if isinstance(feed, tuple))
        offsets = np.array(lod[-1], np.int64) if lod else given  # some ops forget them
        return array[: offsets[-1]], offsets

    def close(self) -> None:
        """See Engine."""
        self._free.clear()
        del self._first

    def _taken(self) -> Any:
        """A predictor that nobody else uses."""
        try:
            return self._free.pop()  # the one used last, whose memory is in the caches
        except IndexError:
            with self._cloning:
                return self._first.clone()


def _rows_of_ids(program: paddle_programs.PaddleProgram) -> dict[str, int]:
    """The rows of the table that each input's ids are for: Paddle 3 reads beyond a table's end and dies of it.

    Ids that a program arranges from several inputs, or from parts of one, are held to the largest of their tables.
    """
    own: dict[str, int] = {}
    arranged: dict[str, int] = {}
    for lookup in program.lookups():
        if lookup.rows is None or lookup.obstacle:
            continue
        for name in program.ids(lookup).inputs:
            if name == lookup.ids:
                own[name] = min(lookup.rows, own.get(name, lookup.rows))
            else:
                arranged[name] = max(lookup.rows, arranged.get(name, 0))
    return arranged | {name: min(rows, arranged.get(name, rows)) for name, rows in own.items()}


def _check_ids(ids: NDArray[Any], rows: int, name: str) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < rows):
        outside = ids[(ids < 0) | (ids >= rows)]
        raise BadRequest(f"input {name!r}", f"id {outside.flat[0]}", f"0 to {rows - 1}: the rows of its table")


def _paddle_inference(place: str) -> Any:
    """The part of Paddle that runs programs."""
    os.environ.update(FLAGS_enable_pir_api="0")  # Paddle 3 reads a ProgramDesc only so; it looks when it is imported
    try:
        with warnings.catch_warnings():  # of compilers that it would need for ops of one's own
            warnings.simplefilter("ignore")
            return importlib.import_module("paddle.inference")
    except ImportError as error:
        raise BadConfig(
            place, f"no Paddle here ({error})", "it installed: pip install 'cube-serving[paddle]'"
        ) from error


def _said(error: Exception) -> str:
    """The line of Paddle's report that says what is wrong; the others are a C++ stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "Error:" in line), lines[0])[:200]
