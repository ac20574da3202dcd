"""The requests of a service before its first caller comes: those recorded for its models, and made-up ones.

They load, allocate and compile what would make the first answers late; they tell whether rows mix, so that requests
must not be merged; and engines that are undecided are timed on what reaches them.
"""

import asyncio
import logging
import struct
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import Executor as Threads
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cube.errors import BadData, BadRequest, Internal, Overloaded
from predictor.engines.auto import Undecided
from predictor.engines.warm_up import recorded
from predictor.models import Model
from predictor.requests import Form
from predictor.service import Service
from predictor.tensors import texts
from trainer_tools.manifest import Tensor

log = logging.getLogger(__name__)

_NOT_FITTING = (BadRequest, Internal, Overloaded)  # what a request may be at fault for: not a cube that is not there
_SIDE = 16  # pixels of a made-up image


async def warm_up(
    service: Service,
    used: Sequence[Model],
    threads: Threads,
    *,
    parts: Sequence[Service] = (),
    knows: bool = False,
    elsewhere: Collection[str] = (),
) -> None:
    """Run what was recorded, else made-up requests; then see whether rows mix.

    They are not counted, and no deadline of a node applies to them.

    used: the models whose recordings are run. threads: where engines are timed. parts: the services within one that
    only passes requests on. knows: whether made-up requests are known to fit, and so run in any case; where callers'
    may fit and made-up ones do not, the log has a warning. elsewhere: models that other services use as well, for whose
    requests a recording may be. Raises BadData for any other that does not fit, and what requests raise.
    """
    fits = list(parts) or [service]
    with ExitStack() as stack:
        for lane in service.lanes:
            stack.enter_context(lane.executor.untimed())
        has_run = False
        for model in used:
            if model.recording is not None:
                has_run |= await _run_recorded(service, model.recording, model.name in elsewhere)
        for part in fits if knows or not has_run else []:
            try:
                await _run_made_up(part)
            except _NOT_FITTING as error:
                if knows:
                    raise
                text = "service %s: warm-up failed (%s), so its first request will be slow"
                log.warning(text, service.name, error)
        for model in used:
            if isinstance(model.engine, Undecided):
                await asyncio.get_running_loop().run_in_executor(threads, model.engine.decide)
        for part in fits:
            try:
                await part.try_company()
            except _NOT_FITTING as error:  # then its warm-up has failed, or images and recordings were looked at there
                log.info("service %s: made-up rows were not tried in company (%s)", part.name, error)
    if len(used) == 1:
        service.platform = used[0].engine.platform


def may_hold(form: Form) -> list[Tensor]:
    """All that a request may hold: of a lookup its keys, and the raw texts that may stand in their place."""
    tensors = form.tensors()
    by_name = {tensor.name: tensor for tensor in tensors}
    raw = {k.text: Tensor(k.text, "BYTES", by_name[k.keys].shape) for k in form.lookups}
    return [*tensors, *raw.values()]


async def _run_recorded(service: Service, recording: Path, is_elsewhere: bool) -> bool:
    """Whether the recording is one of requests of this service."""
    try:
        requests = recorded(recording, may_hold(service.form))
        await service.warm_up(requests)
    except BadData as error:
        wrong = error
    except _NOT_FITTING as error:
        wrong = BadData(str(recording), error, f"requests that {service.name} answers")
        wrong.__cause__ = error
    else:
        return True
    if not is_elsewhere:
        raise wrong
    log.warning("service %s warms up without a recording, which is another service's: %s", service.name, wrong)
    return False


async def _run_made_up(service: Service) -> None:
    """Zeros and empty texts; where they are refused, images instead of texts."""
    try:
        await service.warm_up()
    except BadRequest:
        pictured = _with_images(service.form)
        if pictured is None:
            raise
        await service.warm_up([pictured])


def _with_images(form: Form) -> dict[str, Any] | None:
    """A request of three samples, each BYTES input of which holds images; None where there is no such input."""
    names = [name for name, port in form.dense.items() if port.datatype == "BYTES" and port.shape == (-1,)]
    if not names or any(form.dense[name].ragged for name in names):
        return None
    images = [_image(seed) for seed in range(3)]
    return {**form.examples(len(images))[0], **{name: texts(images) for name in names}}


def _image(seed: int) -> bytes:
    """A PNG of noise, RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (_SIDE, 3 * _SIDE), np.uint8)
    rows = np.concatenate([np.zeros((_SIDE, 1), np.uint8), pixels], axis=1)  # before each its filter: none
    head = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
