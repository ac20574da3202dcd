"""Requests to run before the first caller comes: made up from what a model takes, or recorded.

The first run of a net costs more than the others (memory, kernels, thread pools, caches), and a batch of another size
does so again. Arrays are read-only, as those over a request's bytes are: numba compiles kernels for them apart.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from predictor.engines.engine import Engine, Feed
from predictor.tensors import DTYPES, Texts, Value, shape_text, texts
from trainer_tools.manifest import Tensor

SAMPLES = (1, 8, 64)  # of the requests that are made up
_MOST_KEYS = 3  # in a slot or a sequence
_UNREADABLE = (OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_UNKNOWN_SIZE = 4  # of dimensions, beyond the first, that a program leaves open


def random_feeds(engine: Engine, samples: int, seed: int = 0) -> list[Feed]:
    """Inputs of so many samples for an engine: floats from 0 to 1; integers 0 or 1, which every table has."""
    rng = np.random.default_rng(seed)
    feeds: list[Feed] = []
    for tensor in engine.inputs:
        if tensor.name in engine.lod_levels:
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, _MOST_KEYS + 1, samples))])
            feeds.append((_random(tensor, int(offsets[-1]), rng), offsets))
        else:
            feeds.append(_random(tensor, samples, rng))
    return feeds


def recorded(path: Path, known: Sequence[Tensor]) -> list[dict[str, Value]]:
    """Requests from an .npz file: an array for each input, or for input x of request i an array x/i.

    known: what a request may hold, of which it need not hold all (keys or texts). BYTES are arrays of dtype S. Raises
    BadData.
    """
    place, tensors = str(path), {tensor.name: tensor for tensor in known}
    expected = "an .npz file: numpy.savez(FILE, INPUT=array, ...), or several requests as INPUT/0, INPUT/1, ..."
    requests: dict[int, dict[str, Value]] = {}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadData(place, "one array", expected)
            for part in archive.files:
                name, number = _part(part, tensors, place)
                requests.setdefault(number, {})[name] = _checked(archive[part], tensors[name], f"{place} {part!r}")
    except _UNREADABLE as error:
        raise BadData(place, error, expected) from error
    if sorted(requests) != list(range(len(requests))) or not requests:
        numbers = ", ".join(map(str, sorted(requests)))
        raise BadData(place, f"requests {numbers}" if requests else "no arrays", "requests 0, 1, 2, ...")
    return [requests[number] for number in range(len(requests))]


def save(path: Path, requests: Sequence[Mapping[str, Value]]) -> None:
    """Write requests, the inputs of each by name, so that `recorded` reads them. Raises BadData.

    BYTES are kept as numpy keeps texts, without zeros at their end: one that has some is refused.
    """
    parts: dict[str, NDArray[Any]] = {}
    for number, request in enumerate(requests):
        for name, value in request.items():
            if isinstance(value, Texts):
                raw = value.data.tobytes()
                each = [raw[at : at + size] for at, size in zip(value.starts, value.sizes, strict=True)]
                if any(text.endswith(b"\0") for text in each):
                    raise BadData(f"{path} '{name}/{number}'", "a text with a zero at its end", "texts without")
                parts[f"{name}/{number}"] = np.array(each, "S").reshape(value.shape)
            else:
                parts[f"{name}/{number}"] = value
    np.savez_compressed(path, allow_pickle=False, **parts)


def _part(part: str, tensors: dict[str, Tensor], place: str) -> tuple[str, int]:
    """Input and number of the request that an array of a file is for."""
    if part in tensors:
        return part, 0
    name, _, number = part.rpartition("/")
    if name not in tensors or not (number.isascii() and number.isdigit() and len(number) < 10):
        raise BadData(place, f"an array {part!r}", f"inputs of the model: {', '.join(tensors)}")
    return name, int(number)


def _checked(array: NDArray[Any], tensor: Tensor, place: str) -> Value:
    fits = array.ndim == len(tensor.shape) and all(
        size in (-1, found) for size, found in zip(tensor.shape, array.shape, strict=True)
    )
    is_bytes = tensor.datatype == "BYTES" and array.dtype.kind == "S"
    if not fits or not (is_bytes or array.dtype == DTYPES.get(tensor.datatype)):
        found = f"{array.dtype} {shape_text(array.shape)}"
        raise BadData(place, found, f"{tensor.datatype} {shape_text(tensor.shape)}")
    return texts(array.ravel().tolist(), array.shape) if is_bytes else _read_only(array)


def _random(tensor: Tensor, first: int, rng: np.random.Generator) -> NDArray[Any]:
    """first: the size of the first dimension, where it varies."""
    shape = [first if at == 0 and size < 0 else _sized(size) for at, size in enumerate(tensor.shape)]
    dtype = DTYPES[tensor.datatype]
    values: NDArray[Any] = rng.random(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
    return _read_only(values.astype(dtype))


def _sized(size: int) -> int:
    return _UNKNOWN_SIZE if size < 0 else size


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
