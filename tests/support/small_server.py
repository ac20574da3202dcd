"""A small program that serves, for tests of processes: python small_server.py --listen ADDRESS [--workers N] ...

gRPC: /t.T/Echo, /t.T/Sleep (a number of seconds as text), /t.T/Pid. HTTP: GET /pid.
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager

from cube.errors import ServingError
from cube.rpc.limits import Limits
from cube.rpc.listener import Tls
from cube.rpc.process import run
from cube.rpc.router import Response, Router

STARTED = "serving on "
SLEEPS = "a call sleeps"


async def sleep(message, call):
    print(SLEEPS, file=sys.stderr, flush=True)
    await asyncio.sleep(float(message))
    return b"slept"


HANDLERS = {
    "/t.T/Echo": lambda message, call: message,
    "/t.T/Pid": lambda m, c: b"%d" % os.getpid(),
    "/t.T/Sleep": sleep,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--door", default="lean")
    parser.add_argument("--tls", nargs="+", default=())
    parser.add_argument("--limit", action="append", default=[], help="name=number, of Limits")
    parser.add_argument("--wait-s", type=float, default=0, help="before serving")
    parser.add_argument("--wreck", action="store_true", help="raise what is no ServingError, instead of serving")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    limits = Limits(**{name: json.loads(number) for name, number in (limit.split("=") for limit in args.limit)})

    async def serve(process):
        logging.info("main begins")
        await asyncio.sleep(args.wait_s)
        if args.wreck:
            raise ZeroDivisionError("wrecked")
        router = Router()
        router.add("GET", "/pid", lambda request: Response(body=b"%d" % os.getpid()))
        await process.serve(
            HANDLERS,
            args.listen,
            lambda bound: STARTED + bound,
            door=args.door,
            router=router,
            tls=Tls(*args.tls) if args.tls else None,
            limits=limits,
        )
        logging.info("main ends")

    try:
        run(serve, args.workers)
    except ServingError as error:
        print(f"small-server: {error}", file=sys.stderr)
        sys.exit(1)


class Server:
    """One running."""

    def __init__(self, process):
        self.process = process
        self.address = process.stdout.readline().rstrip("\n").removeprefix(STARTED)
        self._at_rest = self.descriptors if self.address else 0

    @property
    def pid(self):
        return self.process.pid

    def wait_for(self, text):
        """The lines of standard error up to one with `text` in it."""
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"{text!r} was never said: {lines}")

    def end(self, seconds=60):
        """Wait for its end: exit code, the rest of its output, the rest of its errors."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    @property
    def resident_bytes(self):
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def connections(self):
        """Open ones, as the kernel sees it."""
        return self.descriptors - self._at_rest


@contextmanager
def small_server(*flags, new_group=False):
    """Run one; without an address it has failed. It is killed afterwards if it has not ended."""
    command = [sys.executable, __file__, *map(str, flags)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0 if new_group else None
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


if __name__ == "__main__":
    main()
