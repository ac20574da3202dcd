"""Serving what prune-program wrote, within the test's process."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

from cube.rpc.calls import Call
from predictor import models
from predictor.batching import Limits
from predictor.executor import Executor
from predictor.ops.op import Ragged
from predictor.service import Lane, Service
from predictor.workflow import plan
from trainer_tools import manifest

SETTINGS = models.Settings(cube=None, max_samples=100, max_keys=10_000, cube_timeout_s=5, cube_wait_s=5)


def served(directory, *requests):
    """Answers of the service that a directory has, to requests made at the same time, and how they were run.

    A request may be a function that makes it of the service's form.
    """

    async def main():
        model = await models.load(directory, SETTINGS)
        form = model.form(SETTINGS)
        with ThreadPoolExecutor(1) as threads:
            executor = Executor(plan(model.name, model.nodes(SETTINGS), form.ports), threads)
            lane = Lane(executor, Limits())
            service = Service(model.name, model.version, "test", form, [lane], tables=model.tables)
            await service.warm_up()
            await service.try_company()
            given = [request(form) if callable(request) else request for request in requests]
            made = [service.infer(request, (), Call("/test"), then=lambda answer: answer) for request in given]
            answers = [await one if isinstance(one, Awaitable) else one for one in made]
            await model.close()
        return lane, answers

    return asyncio.run(main())


def assert_serves(directory):
    """Requests of one, two and three samples are answered, with as many rows in every output that goes by samples.

    Of a program that takes a fixed number of samples, requests of that.
    """
    said = manifest.read(manifest.Manifest, directory / manifest.MANIFEST_FILE)
    fixed = [lookup.feed_shape[0] for lookup in said.lookups if (lookup.feed_shape or [-1])[0] >= 0]
    counts = fixed or (1, 2, 3)
    _, answers = served(directory, *(lambda form, n=n: form.examples(n)[0] for n in counts))
    for count, answer in zip(counts, answers, strict=True):
        for tensor in said.outputs:
            output = answer.outputs[tensor.name]
            if isinstance(output, Ragged):
                assert output.offsets.size - 1 == count, tensor
            elif tensor.shape[:1] == [-1] and not said.has_fixed_samples():
                assert len(output) == count, tensor
