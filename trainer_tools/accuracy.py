"""What the format of rows does to scores: the same samples, with rows as they were trained and as a format keeps them.

Data to measure on: a file of Criteo lines, for a program that takes such, or an .npz with one array for each input of a
request, as the manifest names them, and labels, if there are any, as `label`: one number for each sample, 0 for no
click. The score is the first output of a number a sample ([n] or [n, 1]), or of two ([n, 2]: no click, click).
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cube.client import LocalCube
from cube.errors import BadData
from cube.rows import RowFormat
from trainer_tools import criteo, feeding
from trainer_tools.export_rows import CUBE_DIRECTORY, recode_cube, replace_cube
from trainer_tools.feeding import Pool, Request, Run
from trainer_tools.manifest import Lookup, Manifest

LABEL = "label"
BATCH = 4096
_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip

Scores = Callable[[Request], NDArray[Any]]  # of a request's samples, [n]


class Wanted(NamedTuple):
    """What the user asked for."""

    row_format: RowFormat = RowFormat.F32  # of the local cube
    data: Path | None = None  # to measure scores on
    max_auc_loss: float | None = None  # that is allowed on it; None: any

    def check(self) -> None:
        """Raise BadData for what can be told to be wrong before there is a manifest."""
        if self.data is None and self.max_auc_loss is not None:
            raise BadData("--max-auc-loss", "no data to find the AUC of", "--check DATA")
        if self.data is not None:
            _is_archive(self.data)


class Data(NamedTuple):
    """Samples to measure on."""

    place: str
    batches: Iterable[tuple[Request, NDArray[np.int8] | None]]  # with labels, 0 or 1, or without


class Accuracy(NamedTuple):
    """How scores change."""

    row_format: str
    data: str
    samples: int
    largest_change: float  # of one score; NaN where a score is none
    mean_change: float
    auc: tuple[float, float] | None  # with the rows as trained, and in the format; None: the data has no labels

    @property
    def auc_loss(self) -> float:
        """How much less the AUC is with the format; NaN without labels of both kinds."""
        return self.auc[0] - self.auc[1] if self.auc else float("nan")

    def __str__(self) -> str:
        auc = f"AUC {self.auc[0]:.6f} → {self.auc[1]:.6f}" if self.auc else "no labels, so no AUC"
        return (
            f"{self.row_format} rows on {self.samples:,} samples of {self.data}: scores change by at most "
            f"{self.largest_change:.3g}, by {self.mean_change:.3g} in the mean; {auc}"
        )


def settle(
    draft: Path, out: Path, manifest: Manifest, wanted: Wanted, run: Run | None, pool: Pool | None = None
) -> Accuracy | None:
    """Bring the float32 cube in `draft` into the format wanted, and measure what that does; None without data.

    run: the pruned program; None where nothing can run it. out: where the draft will be. Raises BadData for data that
    does not fit, and where the AUC falls by more than is allowed.
    """
    if manifest.cube is None and wanted != Wanted():
        raise BadData("--format, --check", "rows on a parameter server only", "a program whose tables are in its files")
    versions = {table: version for table, (version, _) in manifest.table_versions().items()}
    is_other = wanted.row_format is not RowFormat.F32
    recoded = recode_cube(draft, versions, wanted.row_format) if is_other else draft / CUBE_DIRECTORY
    found = None
    if wanted.data is not None:
        if run is None:
            raise BadData(f"--check {wanted.data}", "nothing here that runs the program", "what --verify needs, too")
        before, after = (_scores(manifest, run, LocalCube(cube), pool) for cube in (draft / CUBE_DIRECTORY, recoded))
        found = measure(wanted.row_format.text, read(wanted.data, manifest), before, after)
        check_loss(found, wanted.max_auc_loss, out)
    if is_other:
        replace_cube(draft)
    return found


def read(path: Path, manifest: Manifest) -> Data:
    """The samples of a file, lazily. Raises BadData for what does not fit the manifest."""
    if not _is_archive(path):
        return Data(str(path), _criteo(path, manifest))
    request, labels = _npz(path, manifest)
    return Data(str(path), _labelled(manifest, request, labels))


def measure(row_format: str, data: Data, before: Scores, after: Scores) -> Accuracy:
    """Compare scores made in two ways. Raises BadData where there is no sample."""
    firsts, seconds, labels = [], [], []
    for request, label in data.batches:
        firsts.append(before(request))
        seconds.append(after(request))
        labels += [label] if label is not None else []
    if not firsts:
        raise BadData(data.place, "no samples", "at least one")
    one, other = np.concatenate(firsts), np.concatenate(seconds)
    change = np.abs(one.astype(np.float64) - other.astype(np.float64))
    change[one == other] = 0  # infinities among them
    auc = None
    if labels:
        every = np.concatenate(labels)
        auc = criteo.auc(every, one), criteo.auc(every, other)
    return Accuracy(row_format, data.place, one.size, float(change.max()), float(change.mean()), auc)


def check_loss(found: Accuracy, most: float | None, out: Path) -> None:
    """Raise BadData if the AUC falls by more than `most`, or cannot be told."""
    if most is None:
        return
    if not found.auc or np.isnan(found.auc_loss):
        raise BadData("--max-auc-loss", f"{found.data} without labels of both kinds", f"labels 0 and 1 as {LABEL!r}")
    if not found.auc_loss <= most:
        lost = f"an AUC of {found.auc[1]:.6f} with {found.row_format} rows, {found.auc[0]:.6f} with those trained"
        raise BadData(f"{out} accuracy", lost, f"at most {most:g} less: nothing was written")


def _scores(manifest: Manifest, run: Run, cube: LocalCube, pool: Pool | None) -> Scores:
    """Scores with rows from a cube."""

    def scores(request: Request) -> NDArray[Any]:
        outputs = run(feeding.feeds(manifest, request, feeding.rows_in(cube), pool))
        return score_of(manifest, outputs, feeding.len_of(manifest, request))

    return scores


def score_of(manifest: Manifest, outputs: Iterable[Any], samples: int) -> NDArray[Any]:
    """The score of each sample, [n], among the outputs of a program. Raises BadData where none is."""
    shapes = []
    for tensor, array in zip(manifest.outputs, outputs, strict=True):
        if isinstance(array, feeding.Sequences):
            shapes.append(f"{tensor.name} sequences")
        elif array.dtype.kind == "f" and array.shape in ((samples,), (samples, 1), (samples, 2)):
            score: NDArray[Any] = array.reshape(samples, -1)[:, -1]
            return score
        else:
            shapes.append(f"{tensor.name} {array.dtype}{list(array.shape)}")
    raise BadData("outputs", ", ".join(shapes), f"a score: floats [{samples}], [{samples}, 1] or [{samples}, 2]")


def takes_criteo(manifest: Manifest) -> bool:
    """Whether a program's inputs are those of a Criteo line: 13 integers, 26 slots of keys."""
    dense, sparse = manifest.inputs, manifest.lookups
    return (
        [(t.datatype, t.shape) for t in dense] == [("FP32", [-1, criteo.INTEGERS])]
        and [len(k.slots) for k in sparse] == [criteo.SLOTS]
        and sparse[0].lengths is not None
        and sparse[0].weights is None
    )


def criteo_rows(lines: Path) -> Iterator[criteo.CriteoRows]:
    """The samples of a file of Criteo lines, a batch at a time; the same batches each time. Raises BadData."""
    for chunk in criteo.chunks(lines):
        yield from chunk.batches(BATCH)


def criteo_request(manifest: Manifest, rows: criteo.CriteoRows) -> dict[str, NDArray[Any]]:
    """Criteo lines as a request to a program that takes such."""
    (dense,), (lookup,) = manifest.inputs, manifest.lookups
    assert lookup.lengths is not None, "takes_criteo has looked"
    return {dense.name: rows.dense, lookup.keys: rows.keys, lookup.lengths: rows.lengths}


def _is_archive(path: Path) -> bool:
    """Whether a file is an .npz; raises BadData for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise BadData(str(path), error.strerror, "Criteo lines, or an .npz with the inputs of a request") from error


def _criteo(path: Path, manifest: Manifest) -> Iterator[tuple[Request, NDArray[np.int8]]]:
    if not takes_criteo(manifest):
        names = ", ".join(_inputs(manifest))
        raise BadData(str(path), "a file that is no .npz, for a program that does not take Criteo lines", names)
    for rows in criteo_rows(path):
        yield criteo_request(manifest, rows), rows.labels


def _labelled(
    manifest: Manifest, request: Request, labels: NDArray[np.int8] | None
) -> Iterator[tuple[Request, NDArray[np.int8] | None]]:
    at = 0
    for part in feeding.parts(manifest, request, BATCH):
        size = feeding.len_of(manifest, part)
        yield part, None if labels is None else labels[at : at + size]
        at += size


def _npz(path: Path, manifest: Manifest) -> tuple[Request, NDArray[np.int8] | None]:
    """The arrays of a request, of the manifest's datatypes, and the labels."""
    expected = _inputs(manifest)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadData(str(path), error, "an .npz of plain arrays") from error
    wrong = sorted((set(expected) - set(arrays)) | (set(arrays) - set(expected) - {LABEL}))
    if wrong:
        found = f"{'no ' if wrong[0] in expected else 'an array '}{wrong[0]!r}"
        raise BadData(str(path), found, f"the inputs of a request: {', '.join(expected)}; and {LABEL!r}")
    request = {name: _converted(f"{path} {name!r}", arrays[name], expected[name]) for name in expected}
    samples = _agreed_samples(str(path), manifest, request)
    return request, _labels(f"{path} {LABEL!r}", arrays[LABEL], samples) if LABEL in arrays else None


def _inputs(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of each array of a request."""
    found = {tensor.name: (tensor.datatype, tensor.shape) for tensor in manifest.inputs}
    found |= {lengths: ("INT32", [-1]) for lengths in manifest.ragged_lengths().values()}
    for lookup in manifest.lookups:
        if lookup.lengths is None:
            found[lookup.keys] = "UINT64", (lookup.feed_shape or [-1, -1])[:-1]
        else:
            found |= {lookup.keys: ("UINT64", [-1]), lookup.lengths: ("INT32", [-1, len(lookup.slots)])}
        if lookup.weights is not None:
            found[lookup.weights] = "FP32", [-1]
    return found


def _converted(place: str, array: NDArray[Any], wanted: tuple[str, list[int]]) -> NDArray[Any]:
    """As the datatype wanted, if no number changes but for a float's rounding."""
    datatype, shape = wanted
    dtype = np.dtype(_DTYPES[datatype])
    fits = array.ndim == len(shape) and all(want in (-1, got) for got, want in zip(array.shape, shape, strict=True))
    same_kind = array.dtype.kind in ("iu" if dtype.kind in "iu" else dtype.kind)
    if not fits or not same_kind:
        raise BadData(place, f"{array.dtype} {list(array.shape)}", f"{datatype} {shape}, -1 for any size")
    made = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(made, array):
        raise BadData(place, f"numbers from {array.min()} to {array.max()}", datatype)
    return made


def _agreed_samples(place: str, manifest: Manifest, request: Request) -> int:
    """How many samples there are, by every array; raises BadData where arrays or lengths do not agree."""
    ragged = manifest.ragged_lengths()
    counts = {t.name: len(request[t.name]) for t in manifest.inputs if t.shape[:1] == [-1] and t.name not in ragged}
    ragged |= {lookup.keys: lookup.lengths for lookup in manifest.lookups if lookup.lengths is not None}
    for name, lengths_name in ragged.items():
        lengths = request[lengths_name]
        counts[lengths_name] = len(lengths)
        if (lengths < 0).any() or lengths.sum() != len(request[name]):
            found = f"lengths that sum to {lengths.sum()}, {len(request[name])} keys"
            raise BadData(f"{place} {lengths_name!r}", found, "lengths of 0 or more, as many keys as they say")
    for lookup in manifest.lookups:
        if lookup.lengths is None:
            counts[lookup.keys] = len(request[lookup.keys])
        elif lookup.pooling == "none" and not lookup.lod_level:
            _check_widths(place, lookup, request[lookup.lengths])
        if lookup.weights is not None and request[lookup.weights].size != request[lookup.keys].size:
            found = f"{request[lookup.weights].size} weights, {request[lookup.keys].size} keys"
            raise BadData(f"{place} {lookup.weights!r}", found, "one for each key")
    for first, *others in manifest.alike:
        for other in others:
            if not np.array_equal(request[first].ravel(), request[other].ravel()):
                expected = "the same in both: the program joins them"
                raise BadData(f"{place} {first!r} and {other!r}", "different lengths", expected)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
        raise BadData(place, found, "as many samples in every array")
    return next(iter(counts.values()))


def _check_widths(place: str, lookup: Lookup, lengths: NDArray[Any]) -> None:
    """Raise BadData unless every sample has as many keys as the program takes of it."""
    each, width = lengths.sum(axis=1), prod((lookup.feed_shape or [-1, -1])[1:-1])
    expected = width if width > 0 else int(each[:1].sum())
    if (each != expected).any():
        at = int(np.flatnonzero(each != expected)[0])
        raise BadData(f"{place} {lookup.lengths!r}", f"{each[at]} keys in sample {at}", f"{expected} in every sample")


def _labels(place: str, array: NDArray[Any], samples: int) -> NDArray[np.int8]:
    if (
        array.shape not in ((samples,), (samples, 1))
        or array.dtype.kind not in "biuf"
        or not np.isin(array, (0, 1)).all()
    ):
        raise BadData(place, f"{array.dtype} {list(array.shape)}", f"0 or 1 for each of {samples} samples")
    return array.reshape(samples).astype(np.int8)
