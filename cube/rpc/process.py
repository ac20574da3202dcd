"""A serving process: open the port, say so on one line, wait for a signal, drain."""

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping

import uvloop

from cube.rpc.calls import Handler
from cube.rpc.grpcio_door import GrpcioDoor

log = logging.getLogger(__name__)

DRAIN_S = {
    signal.SIGINT: 0.8,
    signal.SIGTERM: 10.0,
}  # calls in flight may finish; Ctrl-C has someone waiting for the prompt


class Process:
    """What a program's main coroutine is given. Owned by the event loop."""

    def __init__(self, stop: asyncio.Future[signal.Signals]):
        self._stop = stop  # set by the first signal
        self.serving = False

    async def serve(self, handlers: Mapping[str, Handler], listen: str, announce: Callable[[str], str]) -> None:
        """Serve until a signal. `announce` makes the one line for standard output from the address bound."""
        door = GrpcioDoor(handlers)
        bound = await door.start(listen)
        # What was loaded stays: the collector need not walk it again, neither between requests nor at the end, where
        # torch's modules would take it more than a second.
        gc.collect()
        gc.freeze()
        self.serving = True
        print(announce(bound), flush=True)
        reason = await self._stop
        log.info("%s: draining", reason.name)
        await door.drain(DRAIN_S[reason])


def run(main: Callable[[Process], Awaitable[None]]) -> None:
    """Run `main` on a uvloop loop. The first SIGINT or SIGTERM ends `Process.serve`, or what comes before it."""

    async def guarded() -> None:
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[signal.Signals] = loop.create_future()
        process = Process(stop)
        work = asyncio.ensure_future(main(process))

        def stopped(number: signal.Signals) -> None:
            if not stop.done():
                stop.set_result(number)
                if not process.serving:
                    work.cancel()

        for number in DRAIN_S:
            loop.add_signal_handler(number, stopped, number)
        try:
            await work
        except asyncio.CancelledError:
            log.info("stopped before it served")

    uvloop.run(guarded())
