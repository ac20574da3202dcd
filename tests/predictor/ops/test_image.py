"""Image files → arrays, against Pillow and numpy step by step."""

import asyncio
import contextlib
import io
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_op import run

from cube.errors import BadConfig, BadRequest, DeadlineExceeded
from predictor.ops.image import DecodeImage
from predictor.ops.op import Batch, Port
from predictor.tensors import texts

Image = pytest.importorskip("PIL.Image")

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def picture(width=40, height=30, mode="RGB", seed=3):
    smooth = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(smooth).resize((width, height)).convert(mode)


def file_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def slow_twin(file, height, width, resize):
    """What torchvision's transforms compute, written out."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    if resize:
        short = min(image.size)
        image = image.resize(tuple(resize * side // short for side in image.size), Image.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), Image.BILINEAR)
    return ((np.asarray(image).astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("resize", [0, 24])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_become_normalised_pixels(resize, threads):
    files = [
        file_of(picture()),
        file_of(picture(30, 40), "JPEG"),
        file_of(picture(mode="L")),
        file_of(picture(mode="RGBA"), "WEBP", lossless=True),
        file_of(picture(mode="P"), "PNG"),
        file_of(picture(16, 16), "BMP"),
    ]
    op = DecodeImage(height=20, width=24, resize=resize, threads=threads)
    pixels = run(op, {"image": texts(files)}, len(files))["pixels"]
    op.close()
    assert np.array_equal(pixels, np.stack([slow_twin(file, 20, 24, resize) for file in files]))


def test_channels_and_their_order_are_configured():
    files, sizes = texts([file_of(picture())]), {"height": 8, "width": 8}
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    rgb = run(DecodeImage(**sizes, **plain), {"image": files}, 1)["pixels"]
    bgr = run(DecodeImage(**sizes, **plain, channels="BGR", layout="NHWC"), {"image": files}, 1)["pixels"]
    assert np.array_equal(bgr, rgb[:, ::-1].transpose(0, 2, 3, 1))


def bomb(width, height):
    """A PNG whose header says these sizes."""
    file = bytearray(file_of(picture(8, 8)))
    file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "found no image, expected JPEG or PNG or WEBP or BMP"),
        (b"GIF89a", "found no image"),
        (file_of(picture(), "GIF"), "found no image"),
        (file_of(picture(), "JPEG")[:300], "an image that cannot be read"),
        (file_of(picture())[:-30], "an image that cannot be read .* expected a whole one"),
        (file_of(picture(100, 100)), "found 100 x 100 pixels, expected at most 9000 in all"),
        (bomb(60_000, 60_000), "an image that cannot be read"),
        (bomb(9_000, 9_001), "9000 x 9001 pixels"),
        (b"x" * 20_001, "found 20001 bytes, expected at most 20000"),
    ],
)
def test_a_file_that_is_no_good_image_is_refused_by_its_row(file, message):
    op = DecodeImage(height=10, width=10, max_pixels=9_000, max_bytes=20_000)
    with pytest.raises(BadRequest, match=message) as error:
        run(op, {"image": texts([file_of(picture()), file])}, 2)
    assert error.value.place == "input 'image'[1]"


FILES = [file_of(picture(), format) for format in ("PNG", "JPEG", "WEBP", "BMP")]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=8)), max_size=4),
    st.one_of(st.none(), st.integers(0, 10_000)),
)
def test_whatever_a_file_holds_it_is_an_image_or_refused(file, changes, stop):
    broken = bytearray(file)
    for at, put in changes:
        at %= len(broken)
        broken[at : at + len(put)] = put
    op = DecodeImage(height=8, width=8, resize=8, threads=1, max_pixels=100_000)
    with contextlib.suppress(BadRequest):
        assert np.isfinite(run(op, {"image": texts([bytes(broken[:stop])])}, 1)["pixels"]).all()


def test_a_strip_does_not_grow_without_bound():
    with pytest.raises(BadRequest, match=r"resized: found 10 x 40000 pixels, expected at most 9000"):
        run(
            DecodeImage(height=10, width=10, resize=10, max_pixels=9_000),
            {"image": texts([file_of(picture(1, 4000))])},
            1,
        )


def test_nothing_is_decoded_after_the_deadline():
    op = DecodeImage(height=8, width=8)
    op.bind({"image": Port("BYTES")})
    batch = Batch(image=texts([file_of(picture())]))
    batch.rows, batch.deadline = 1, time.monotonic() - 1
    with pytest.raises(DeadlineExceeded):
        asyncio.run(op.run(batch))


def answered(batch, op, step_s=0.001):
    """Whether the op answers, and how often the event loop came round meanwhile."""

    async def main():
        task, rounds = asyncio.ensure_future(op.run(batch)), 0
        while not task.done():
            await asyncio.sleep(step_s)
            rounds += 1
        return (await task)["pixels"], rounds

    return asyncio.run(main())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_event_loop_goes_on_while_an_image_of_few_bytes_and_many_pixels_is_decoded(rows, threads):
    file = file_of(Image.new("RGB", (5_000, 5_000), (9, 9, 9)))
    assert len(file) < 100_000
    op = DecodeImage(height=8, width=8, threads=threads)
    op.bind({"image": Port("BYTES")})
    batch = Batch(image=texts([file] * rows))
    batch.rows, batch.deadline = rows, None
    pixels, rounds = answered(batch, op)
    op.close()
    assert pixels.shape == (rows, 3, 8, 8)
    assert rounds >= 10  # about 100 for each row; on the event loop it would be 1 or 2


def test_what_no_thread_has_begun_is_not_decoded_once_nobody_waits(monkeypatch):
    op = DecodeImage(height=8, width=8, threads=1)
    op.bind({"image": Port("BYTES")})
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def decode(file, place, out):
        seen.append(place)
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(op, "_decode", decode)
    batch = Batch(image=texts([b"x"] * 20))
    batch.rows, batch.deadline = 20, None

    async def main():
        task = asyncio.ensure_future(op.run(batch))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        assert task.cancelled()

    asyncio.run(main())
    op._threads.shutdown()
    assert seen == ["input 'image'[0]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height: found 0, expected 1 or more"),
        ({"resize": 100}, "resize: found 100, expected 0, or at least 224"),
        ({"std": [1.0, 0.0, 1.0]}, "mean and std"),
        ({"mean": [0.5]}, "mean and std"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(BadConfig, match=message):
        DecodeImage(**arguments)
