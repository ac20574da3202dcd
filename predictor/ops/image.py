"""Image files → arrays for a net: decode, resize, normalise, as torchvision's transforms do."""

import asyncio
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cube.errors import BadConfig, BadRequest, DeadlineExceeded
from cube.kernels import kernel
from predictor.ops.op import Batch, Op, Outputs, Port
from predictor.tensors import Texts

try:
    from PIL import Image, UnidentifiedImageError
except ImportError as missing:
    raise BadConfig("op 'image'", "no Pillow here", "it installed: pip install 'cube-serving[image]'") from missing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # fewer decoders, fewer of their faults


class DecodeImage(Op):
    """Files of images, one for each row, as FP32 [-1, 3, height, width], or [-1, height, width, 3].

    As torchvision's Resize, CenterCrop, ToTensor and Normalize on a file that Pillow opened: bilinear with
    antialiasing, transparency dropped, EXIF's orientation not applied. It decodes in threads of its own, never on the
    event loop: a file of a few KB may hold millions of pixels, so nothing tells how long it takes before it is opened.
    """

    def __init__(
        self,
        *,
        input: str = "image",
        output: str = "pixels",
        height: int = 224,
        width: int = 224,
        resize: int = 0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        channels: Literal["RGB", "BGR"] = "RGB",
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        threads: int = 4,
        max_pixels: int = 50_000_000,
        max_bytes: int = 20_000_000,
    ):
        """resize: what the shorter side becomes before the middle is cut out; 0: the image is stretched to its place.

        mean, std: of each channel, in the order of `channels`, of values from 0 to 1. threads: images at once, whatever
        batches they are of. max_pixels, max_bytes: of an image, as its file says before it is decoded; a larger one is
        refused.
        """
        for name, size in (("height", height), ("width", width), ("threads", threads), ("max_pixels", max_pixels)):
            if size < 1:
                raise BadConfig(name, size, "1 or more")
        if resize and resize < max(height, width):
            raise BadConfig("resize", resize, f"0, or at least {max(height, width)}")
        if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
            raise BadConfig("mean and std", f"{list(mean)} and {list(std)}", "3 numbers each, those of std above 0")
        self._input, self._output, self._height, self._width = input, output, height, width
        self._resize, self._layout, self._max_pixels, self._max_bytes = resize, layout, max_pixels, max_bytes
        # What each byte of each channel becomes: a table is exact, and faster than the arithmetic.
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        self._levels = (levels - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
        self._order = np.array((2, 1, 0) if channels == "BGR" else (0, 1, 2))
        self._threads = ThreadPoolExecutor(threads, "image")

    def wanted(self) -> Mapping[str, Port]:
        """The files."""
        return {self._input: Port("BYTES")}

    def bind(self, inputs: Mapping[str, Port]) -> Mapping[str, Port]:
        """See Op."""
        if inputs[self._input] != Port("BYTES"):
            raise BadConfig(f"input {self._input!r}", str(inputs[self._input]), "BYTES [-1], a file for each row")
        return {self._output: Port("FP32", (-1, *self._shape))}

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (3, self._height, self._width) if self._layout == "NCHW" else (self._height, self._width, 3)

    def open(self) -> None:
        """See Op. Pillow loads its decoders, and the kernel is compiled, before the first caller comes."""
        one = io.BytesIO()
        Image.new("RGB", (1, 1)).save(one, "PNG")
        self._decode(np.frombuffer(one.getvalue(), np.uint8), "", np.empty(self._shape, np.float32))

    async def run(self, batch: Batch) -> Outputs:
        """See Op. Of several images that are refused, the error is that of the first row."""
        files: Texts = batch[self._input]
        made = np.empty((batch.rows, *self._shape), np.float32)

        def decode(row: int) -> None:
            if batch.deadline is not None and batch.deadline <= time.monotonic():
                raise DeadlineExceeded("the deadline has passed")
            start = files.starts[row]
            self._decode(files.data[start : start + files.sizes[row]], f"input {self._input!r}[{row}]", made[row])

        rows = [self._threads.submit(decode, row) for row in range(batch.rows)]
        try:
            for row in rows:
                await asyncio.wrap_future(row)
        finally:
            for row in rows:
                row.cancel()  # those that no thread has begun, where one was refused or nobody waits any more
        return {self._output: made}

    def close(self) -> None:
        """See Op."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _decode(self, file: NDArray[np.uint8], place: str, out: NDArray[np.float32]) -> None:
        """One image into its row of the result."""
        if file.size > self._max_bytes:
            raise BadRequest(place, f"{file.size} bytes", f"at most {self._max_bytes}")
        try:
            with Image.open(io.BytesIO(file.tobytes()), formats=FORMATS) as image:
                size = self._resized(*image.size)
                self._check_size(image.size, place)
                self._check_size(size, f"{place} resized")  # a strip of a few pixels may become a large one
                pixels = np.asarray(self._fitted(image.convert("RGB"), size))
        except (MemoryError, BadRequest):
            raise
        except UnidentifiedImageError as error:
            raise BadRequest(place, "no image", " or ".join(FORMATS)) from error
        except Exception as error:  # Pillow raises whatever its decoders raise
            raise BadRequest(place, f"an image that cannot be read ({error})", "a whole one") from error
        by_channel = out if self._layout == "NCHW" else out.transpose(2, 0, 1)
        _look_up(pixels, self._order, self._levels, by_channel)

    def _check_size(self, size: tuple[int, int], place: str) -> None:
        if size[0] * size[1] > self._max_pixels:
            raise BadRequest(place, f"{size[0]} x {size[1]} pixels", f"at most {self._max_pixels} in all")

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image before its middle is cut out."""
        if not self._resize:
            return self._width, self._height
        if width <= height:
            return self._resize, self._resize * height // width
        return self._resize * width // height, self._resize

    def _fitted(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        image = image.resize(size, Image.Resampling.BILINEAR)
        if size == (self._width, self._height):
            return image
        left, top = round((size[0] - self._width) / 2), round((size[1] - self._height) / 2)
        return image.crop((left, top, left + self._width, top + self._height))


@kernel
def _look_up(pixels, order, levels, out):  # type: ignore[no-untyped-def]
    """out[c] is what `levels` has for channel order[c] of each pixel: uint8[h, w, 3] → float32[3, h, w]."""
    for channel in range(order.size):
        for y in range(pixels.shape[0]):
            for x in range(pixels.shape[1]):
                out[channel, y, x] = levels[channel, pixels[y, x, order[channel]]]
