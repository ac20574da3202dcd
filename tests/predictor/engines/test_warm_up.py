"""Requests to warm up with: made up, and recorded."""

import contextlib
import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.errors import BadData
from predictor.engines.warm_up import random_feeds, recorded
from predictor.tensors import Texts
from trainer_tools.manifest import Tensor

X = np.ones((3, 2), np.float32)
KNOWN = [Tensor("x", "FP32", [-1, 2]), Tensor("keys", "UINT64", [-1]), Tensor("texts", "BYTES", [-1])]


class Ragged:
    """What an engine says of its inputs."""

    inputs = [Tensor("words", "INT64", [-1, 1]), Tensor("x", "FP32", [-1, 4])]  # noqa: RUF012
    lod_levels = {"words": 1}  # noqa: RUF012


@pytest.mark.parametrize("samples", [1, 5, 64])
def test_made_up_feeds_are_what_an_engine_takes(samples):
    (words, offsets), x = random_feeds(Ragged(), samples)
    assert (words.dtype, words.shape) == (np.int64, (offsets[-1], 1))
    assert (offsets.dtype, offsets.shape, offsets[0]) == (np.int64, (samples + 1,), 0)
    assert (np.diff(offsets) >= 0).all()
    assert (x.dtype, x.shape) == (np.float32, (samples, 4))
    assert set(words.ravel()) <= {0, 1}


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_recorded_file_is_one_request_or_several(tmp_path):
    x, keys, texts = np.ones((3, 2), np.float32), np.arange(4, dtype=np.uint64), np.array([b"a", b"", b"ccc"])
    (one,) = recorded(saved(tmp_path / "one.npz", x=x, keys=keys), KNOWN)
    assert np.array_equal(one["x"], x)
    assert np.array_equal(one["keys"], keys)
    assert not one["x"].flags.writeable
    path = saved(tmp_path / "two.npz", **{"x/0": x, "keys/0": keys, "x/1": x[:1], "texts/1": texts})
    first, second = recorded(path, KNOWN)
    assert sorted(first) == ["keys", "x"]
    assert isinstance(second["texts"], Texts)
    assert second["texts"].sizes.tolist() == [1, 0, 3]
    assert second["texts"].data.tobytes() == b"accc"


def written(path, content):
    path.write_bytes(content)
    return path


def one_array(says=3):
    """The bytes of an .npy file of three numbers. says: how many there are."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (says,)})
    return file.getvalue() + np.ones(3).tobytes()


def long_head():
    """An array with a head so long that numpy asks whether the file is trusted."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }".ljust(20_000) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(4)


def zipped(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def with_a_password(path):
    """An archive whose only array says that it is encrypted."""
    raw = bytearray(zipped(path, "x.npy", one_array()).read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(magic) + flags] |= 1
    return written(path, bytes(raw))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "No such file"),
        (lambda p: written(p, b""), "found an empty file, expected an .npz file"),
        (lambda p: written(p, b"no zip"), "found bytes of some other kind, expected an .npz file"),
        (lambda p: written(p, np.random.default_rng(3).bytes(999)), "found bytes of some other kind, expected an .npz"),
        (lambda p: written(p, pickle.dumps({"x": 1})), "found a pickle, which is never read, expected an .npz file"),
        (lambda p: written(p, one_array()), "found one array, as numpy.save writes it, expected an .npz file"),
        (lambda p: written(p, saved(p, x=X).read_bytes()[:-30]), "found an archive that is cut off or damaged, exp"),
        (lambda p: written(p, saved(p, x=X).read_bytes()[:60]), "found an archive that is cut off or damaged, expec"),
        (lambda p: zipped(p, "x.npy", b"junk"), "'x': found no array, or one with a damaged head, expected an array"),
        (lambda p: zipped(p, "x.npy", pickle.dumps([1])), "'x': found no array, or one with a damaged head"),
        (lambda p: zipped(p, "x.npy", one_array()[:-1]), "'x': found a damaged array, expected an array of numbers"),
        (lambda p: zipped(p, "x.npy", one_array(1 << 45)), "'x': found an array for which there is not enough memory"),
        (lambda p: zipped(p, "x.npy", long_head()), "'x': found no array, or one with a damaged head"),
        (lambda p: zipped(p, "x.txt", b"junk"), r"found an array 'x\.txt', expected what requests hold"),
        (with_a_password, "found an archive that is cut off or damaged"),
        (lambda p: saved(p), "found no arrays, expected requests 0, 1, 2"),
        (lambda p: saved(p, y=np.ones(3)), "found an array 'y', expected what requests hold: x, keys, texts"),
        (lambda p: saved(p, **{"x/one": np.ones(3)}), "found an array 'x/one'"),
        (lambda p: saved(p, **{"x/-1": np.ones(3)}), "found an array 'x/-1'"),
        (lambda p: saved(p, **{"x/1": np.ones((3, 2), np.float32)}), "found requests 1, expected requests 0, 1, 2"),
        (lambda p: saved(p, x=np.ones((3, 2))), r"'x': found float64 \[3, 2\], expected FP32 \[-1, 2\]"),
        (lambda p: saved(p, x=np.ones((3, 3), np.float32)), r"'x': found float32 \[3, 3\], expected FP32 \[-1, 2\]"),
        (lambda p: saved(p, texts=np.array(["a"])), r"'texts': found <U1 \[1\], expected BYTES \[-1\]"),
        (lambda p: saved(p, x=np.array([{}, None], object)), "'x': found an array of Python objects, expected an arr"),
        (lambda p: saved(p, x=np.zeros(2, [("a", "O")])), "'x': found an array of Python objects, expected an array"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path, make, message):
    with pytest.raises(BadData, match=message) as refused:
        recorded(make(tmp_path / "warm.npz"), KNOWN)
    assert str(refused.value).startswith(f"{tmp_path}/warm.npz")
    assert "allow_pickle" not in str(refused.value)  # no advice to unpickle what somebody has put there


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_a_damaged_recording_is_refused_or_still_one(tmp_path_factory, data, compressed):
    """Bytes flipped, cut or put in: BadData, or whatever else the bytes now say, but no other error."""
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    (np.savez_compressed if compressed else np.savez)(
        path, **{"x/0": np.ones((3, 2), np.float32), "x/1": np.ones((1, 2))}
    )
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.sampled_from([0, 1, 1, 40]))] = data.draw(st.binary(max_size=2))
    path.write_bytes(raw)
    with contextlib.suppress(BadData):
        recorded(path, KNOWN)
