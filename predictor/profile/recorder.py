"""Requests that really came in, as the file that a server warms up with and times engines on (`predictor.warming`).

Only requests that were answered are kept: one that the service refuses would stop the next start. What they held is
copied while they are answered; the file is made afterwards, in a thread.
"""

import asyncio
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from cube.errors import BadData, FailedPrecondition
from predictor.engines.warm_up import check_texts, save
from predictor.service import Service
from predictor.tensors import Texts, Value
from predictor.warming import may_hold

MOST_REQUESTS = 1_000
MOST_BYTES = 64 << 20  # of all that is kept for one file, uncompressed


class Recording(NamedTuple):
    """A file, and what is in it."""

    npz: bytes
    requests: int
    left_out: int  # requests that were answered meanwhile and cannot be kept


class Recorder:
    """Keeps what requests of a service hold while it watches. Owned by the event loop."""

    def __init__(self, service: Service, most: int, most_bytes: int = MOST_BYTES):
        """most, most_bytes: of requests that are kept."""
        self.requests: list[dict[str, Value]] = []
        self.left_out: Counter[str] = Counter()  # requests, by the reason
        self._service, self._most, self._most_bytes, self._left_bytes = service, most, most_bytes, most_bytes
        self._shapes = {tensor.name: tensor.shape for tensor in may_hold(service.form)}
        self._is_full = asyncio.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what is answered within this block."""
        self._service.recorders.append(self.answered)
        try:
            yield
        finally:
            self._service.recorders.remove(self.answered)

    async def full(self) -> None:
        """Wait until there are as many as wanted."""
        await self._is_full.wait()

    def answered(self, inputs: Mapping[str, Value]) -> None:
        """A request that held this was answered."""
        if self._is_full.is_set():
            return
        try:
            needed = sum(_bytes(value, name) for name, value in inputs.items())
            if needed > self._left_bytes:
                raise BadData("request", "more bytes than are left", f"{self._most_bytes} at most in all requests")
            self.requests.append({name: self._copied(name, value) for name, value in inputs.items()})
        except (BadData, MemoryError) as error:  # the caller gets the answer all the same
            self.left_out[str(error) or "there was not enough memory"] += 1
            return
        self._left_bytes -= needed
        if len(self.requests) == self._most:
            self._is_full.set()

    def _copied(self, name: str, value: Value) -> Value:
        """A value of its own: a caller's is part of a message, which would stay in memory with it."""
        if isinstance(value, Texts):
            first, last = _extent(value)
            return Texts(value.shape, value.data[first:last].copy(), value.starts - first, value.sizes.copy())
        copy = np.array(value)
        # Lengths of single bags may come as [n] or [n, 1]: a file has them as the service's metadata says.
        return copy if copy.ndim == len(self._shapes[name]) else copy.reshape(self._shapes[name])


async def record(service: Service, seconds: float, most: int) -> Recording:
    """Watch for so long, or until so many requests were answered. Raises FailedPrecondition where none can be kept."""
    recorder = Recorder(service, most)
    with recorder.watching(), suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await recorder.full()
    left_out = recorder.left_out.total()
    if not recorder.requests:
        found = f"{left_out or 'no'} requests of {service.name!r} answered within {seconds:g} s"
        why = "".join(f"; {count} of them: {reason}" for reason, count in recorder.left_out.most_common(1))
        raise FailedPrecondition(f"/debug/record: found {found}, expected some that can be kept{why}")
    return Recording(await asyncio.to_thread(_file_of, recorder.requests), len(recorder.requests), left_out)


def _file_of(requests: list[dict[str, Value]]) -> bytes:
    file = io.BytesIO()
    save(file, requests)
    return file.getvalue()


def _bytes(value: Value, name: str) -> int:
    """That a value takes, here or in a file. Raises BadData for texts that no file can hold."""
    if not isinstance(value, Texts):
        return value.nbytes
    check_texts(value, f"input {name!r}")
    first, last = _extent(value)
    return max(last - first, value.sizes.size * int(value.sizes.max(initial=1)))  # there, each as long as the longest


def _extent(value: Texts) -> tuple[int, int]:
    """Where the first of the texts begins, and where the last ends."""
    if not value.starts.size:
        return 0, 0
    return int(value.starts.min()), int((value.starts + value.sizes).max())
