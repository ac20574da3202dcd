"""Requests to run before the first caller comes: made up from what a model takes, or recorded.

The first run of a net costs more than the others (memory, kernels, thread pools, caches), and a batch of another size
does so again. Arrays are read-only, as those over a request's bytes are: numba compiles kernels for them apart.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from predictor.engines.engine import Engine, Feed
from predictor.tensors import DTYPES, Texts, Value, shape_text, texts
from trainer_tools.manifest import Tensor

SAMPLES = (1, 8, 64)  # of the requests that are made up
_MOST_KEYS = 3  # in a slot or a sequence
# What zipfile raises for bytes that are no archive, or one with a password or a compression that it does not know.
_DAMAGED = (ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
_EXPECTED = "an .npz file: numpy.savez(FILE, INPUT=array, ...), or several requests as INPUT/0, INPUT/1, ..."
_ARCHIVE, _ARRAY, _PICKLE = b"PK", np.lib.format.MAGIC_PREFIX, b"\x80"  # what files begin with
_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # by version
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
    requests: dict[int, dict[str, Value]] = {}
    try:
        with path.open("rb") as file:
            _check_is_archive(file.read(len(_ARRAY)), place)
            with zipfile.ZipFile(file) as archive:
                for part in archive.namelist():
                    stem = part.removesuffix(".npy")
                    name, number = _part(stem, tensors, place)
                    array = _array(archive, part, f"{place} {stem!r}")
                    requests.setdefault(number, {})[name] = _checked(array, tensors[name], f"{place} {stem!r}")
    except OSError as error:
        raise BadData(place, error.strerror or error, _EXPECTED) from error
    except _DAMAGED as error:
        raise BadData(place, "an archive that is cut off or damaged", _EXPECTED) from error
    if sorted(requests) != list(range(len(requests))) or not requests:
        numbers = ", ".join(map(str, sorted(requests)))
        raise BadData(place, f"requests {numbers}" if requests else "no arrays", "requests 0, 1, 2, ...")
    return [requests[number] for number in range(len(requests))]


def save(file: Path | BinaryIO, requests: Sequence[Mapping[str, Value]]) -> None:
    """Write requests, the inputs of each by name, so that `recorded` reads them. Raises BadData: see check_texts."""
    parts: dict[str, NDArray[Any]] = {}
    for number, request in enumerate(requests):
        for name, value in request.items():
            if isinstance(value, Texts):
                check_texts(value, f"{file if isinstance(file, Path) else 'recording'} '{name}/{number}'")
                raw = value.data.tobytes()
                each = [raw[at : at + size] for at, size in zip(value.starts, value.sizes, strict=True)]
                parts[f"{name}/{number}"] = np.array(each, "S").reshape(value.shape)
            else:
                parts[f"{name}/{number}"] = value
    np.savez_compressed(file, allow_pickle=False, **parts)


def check_texts(value: Texts, place: str) -> None:
    """Raise BadData for a text that a recording cannot hold: numpy keeps texts without zeros at their end."""
    last = (value.starts + value.sizes - 1)[value.sizes > 0]
    if not value.data[last].all():
        raise BadData(place, "a text with a zero at its end", "texts without")


def _check_is_archive(begin: bytes, place: str) -> None:
    """begin: of the file. numpy would try to unpickle what it does not know, and speak of that."""
    if begin.startswith(_ARCHIVE):
        return
    known = {_ARRAY: "one array, as numpy.save writes it", _PICKLE: "a pickle, which is never read"}
    found = next((what for magic, what in known.items() if begin.startswith(magic)), "bytes of some other kind")
    raise BadData(place, found if begin else "an empty file", _EXPECTED)


def _array(archive: zipfile.ZipFile, part: str, place: str) -> NDArray[Any]:
    """An array of an archive. Its head is looked at first: one of Python objects would be a pickle."""
    expected = "an array of numbers, or of texts as bytes (dtype S)"
    with archive.open(part) as stream:
        try:
            dtype = _HEADS[np.lib.format.read_magic(stream)](stream)[2]
        except (ValueError, KeyError) as error:
            raise BadData(place, "no array, or one with a damaged head", expected) from error
    if dtype.hasobject:
        raise BadData(place, "an array of Python objects", expected)
    with archive.open(part) as stream:
        try:
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, TypeError) as error:  # its bytes are fewer than the head says
            raise BadData(place, "a damaged array", expected) from error
        except MemoryError as error:
            raise BadData(place, "an array for which there is not enough memory", expected) from error
    return array


def _part(part: str, tensors: dict[str, Tensor], place: str) -> tuple[str, int]:
    """Input and number of the request that an array of a file is for."""
    if part in tensors:
        return part, 0
    name, _, number = part.rpartition("/")
    if name not in tensors or not (number.isascii() and number.isdigit() and len(number) < 10):
        raise BadData(place, f"an array {part!r}", f"what requests hold: {', '.join(tensors)}")
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
