"""The two JSON files that tie things together, strictly read.

`signature.json` lies beside a trained program and says what its inputs mean; a trainer writes it, prune-program reads
it. `manifest.json` lies beside a pruned program and says what it takes, which rows it reads and in which version, and
where its outputs go; prune-program writes it, the predictor reads it. Dense and sparse move together because the
manifest names both versions.
"""

import hashlib
import importlib.metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cube.errors import BadData
from cube.version import Version

SIGNATURE_FILE, MANIFEST_FILE = "signature.json", "manifest.json"
SCHEMA = 1
DEFAULT_SIGNATURE = "serving_default"  # of programs that have one and do not name it: TensorFlow's name for that

T = TypeVar("T", bound="_Strict")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unknown, missing or mistyped fields are errors that name their path."""

    schema: Literal[1]


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sparse field of a request."""

    name: str
    number: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # seed of the feature sign


Slots = Annotated[list[Slot], msgspec.Meta(min_length=1)]


class TrainedLookup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the inputs of one embedding lookup of a trained program mean."""

    ids: str  # program input: row numbers, int64[keys] of bags, else of any shape
    offsets: str | None = (
        None  # program input, int64[samples * slots + 1]: each bag's first key, and the end, which some
    )
    # programs do without. None: there are no bags, or all are as long as ids has columns
    slots: Slots
    table: str
    vocabulary: str | None = None  # file beside the program, uint64[v]: the key of row i; rows from v on are what an
    # absent key reads. None: keys are row numbers
    parameter: str | None = None  # the table's name in the program, where several are read by the same ids


class Signature(_Strict, frozen=True):
    """signature.json"""

    name: str
    version: Annotated[
        int, msgspec.Meta(ge=0, le=(1 << 63) - 1)
    ]  # of the program and, as base, of its tables; a trainer takes its start time in Unix seconds
    program: str  # file beside this one
    sign: str  # rule that made the keys: cube.keys.SIGN_RULE
    lookups: list[TrainedLookup]
    signature: str = DEFAULT_SIGNATURE


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, datatype as in KServe (FP32, INT64, ...) and shape (-1 where it varies)."""

    name: str
    datatype: str
    shape: list[int]


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The dense program."""

    file: str
    format: Literal["torch.export", "paddle", "onnx"]
    sha256: str  # of the file
    parameters: str | None = None  # file or directory that holds what `file` does not; None: it holds all


class SignVector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A raw feature and its key, to tell whether who reads a manifest signs as who wrote it."""

    slot: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]  # a JSON number that every reader holds exactly
    text: str  # its UTF-8 is the feature
    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]  # hexadecimal: JavaScript rounds numbers above 2**53


class Lookup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One lookup that was cut out: request inputs → rows of `table` → pooled per slot → program input `feed`."""

    keys: str  # request input UINT64 [K]; or raw texts, input `text`
    text: str  # request input BYTES [K]: raw features to sign, instead of keys
    lengths: str | None  # request input INT32 [samples, slots]: keys of each slot of each sample. None: every sample
    # has as many, and the keys (or texts) come in the shape of the feed without its last dimension
    slots: Slots
    table: str
    pooling: Literal["mean", "sum", "max", "none"]  # of an empty slot: zeros; an absent key counts as a row of zeros
    # Numbers that the program added to ids: the key of an id is id + added, modulo 2**64. One for all ids, or one for
    # each id of a sample, in their order, and every sample has as many ids then. Only where keys are row numbers
    added: list[Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]] = []
    weights: str | None = None  # request input FP32 [K]: each row is multiplied by its key's. With pooling "sum" only
    feed: str  # program input FP32 or FP16 [samples * slots, dim]; without pooling a row for each key, in their order
    # Only without pooling, where the program does what follows:
    # [-1, ..., dim]; -1: samples, or with a lod_level all their keys. Not -1: so many samples, every time
    feed_shape: list[int] | None = None
    lod_level: int = 0  # above 0: a sample may have any number of keys, and the program takes their lengths (LoD)
    arranged_from: list[str] = []  # inputs of the trained program that the keys were arranged from, if not one as it is
    padding: int | None = None  # the key (`added` is in it) that stands for no key. Pooled: it is as if it were not
    # there; else it reads 0

    def looked_up(self, ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The keys that a request's ids, or keys, stand for: with `added`, in the same shape."""
        return _sums(ids, np.array(self.added, np.int64)) if self.added else ids

    def asked(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The inverse: what a request holds where these keys are looked up."""
        return _sums(keys, -np.array(self.added, np.int64)) if self.added else keys


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table as the program was trained with it."""

    version: str  # base@delta
    dim: int
    rows: int
    absent: Literal["zeros"]  # what a key that is not there reads


class Manifest(_Strict, frozen=True):
    """manifest.json"""

    name: str
    version: int
    program: Program
    sign: str  # rule that makes a raw feature's key; "none": keys are the program's own ids
    inputs: list[Tensor]  # dense inputs, straight from request to program
    lookups: list[Lookup]
    tables: dict[str, Table]
    outputs: list[Tensor]
    cube: str | None  # directory beside this file that holds a local cube
    source_sha256: str  # of the trained program
    tool: str  # what wrote this
    lod_levels: dict[str, int] = {}  # of inputs whose samples are sequences of different lengths (LoD)
    alike: list[list[str]] = []  # groups of request inputs with lengths that have to be equal: what is joined by key
    signature: str = DEFAULT_SIGNATURE  # what inputs and outputs are called together, as TensorFlow has several of them
    sign_vectors: list[SignVector] = []  # golden vectors of `sign`; none: keys are ids, or an older tool wrote this

    def ragged_lengths(self) -> dict[str, str]:
        """Of each dense input that is ragged, the request input INT32 [samples] with its lengths."""
        return {name: f"{name}.lengths" for name, level in self.lod_levels.items() if level}

    def has_fixed_samples(self) -> bool:
        """Whether the program takes as many samples every time. Then no size of an output counts them."""
        firsts = [tensor.shape[:1] for tensor in self.inputs] + [(k.feed_shape or [-1])[:1] for k in self.lookups]
        return [-1] not in firsts

    def table_versions(self) -> dict[str, tuple[Version, int]]:
        """Version and dim of each table."""
        return {name: (Version.parse(t.version, f"table {name!r}"), t.dim) for name, t in self.tables.items()}


def _sums(ids: NDArray[np.uint64], added: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (ids.reshape(-1, added.size) + added.view(np.uint64)).reshape(ids.shape)


def inside(directory: Path, name: str, place: str) -> Path:
    """A path that a signature or manifest names, which must stay in its directory; raises BadData naming `place`."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise BadData(place, repr(name), "a path inside the directory of the file that names it")
    return directory / path


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tool() -> str:
    """What a manifest says of who wrote it."""
    return f"cube-serving {importlib.metadata.version('cube-serving')}"


def read(kind: type[T], path: Path) -> T:
    """Read a file of one of the kinds above; raises BadData naming file and field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise BadData(str(path), error.strerror, f"a {kind.__name__.lower()}") from error
    except msgspec.MsgspecError as error:
        raise BadData(
            str(path), f"JSON that does not fit ({error})", f"a {kind.__name__.lower()} of schema {SCHEMA}"
        ) from error


def write(value: _Strict, path: Path) -> None:
    """Write what `read` reads, for people to read too."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def check_names(said: Manifest) -> None:
    """Raise BadData where one name of a request would mean two things."""
    meant: dict[str, object] = {tensor.name: tensor for tensor in said.inputs}
    for ragged, lengths in said.ragged_lengths().items():
        if meant.setdefault(lengths, lengths) != lengths:
            raise BadData(f"input {ragged}", f"lengths {lengths!r}, which is another input too", "other names")
    for lookup in said.lookups:
        shape = lookup.lengths or (lookup.feed_shape or [])[:-1]
        parts = {
            lookup.keys: (shape, lookup.added),
            lookup.text: shape,
            lookup.lengths: lookup.lengths,
            lookup.weights: lookup.keys,
        }
        for name, meaning in parts.items():
            if name is not None and meant.setdefault(name, meaning) != meaning:
                raise BadData(f"lookup {lookup.feed}", f"request input {name!r}, which is another's too", "other names")
