"""The interop service in a process of its own: python interop_server.py [--door grpcio]; it prints its address first.

It ends when its standard input does, so it never outlives the tests that started it.
"""

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from certificates import Authority
from interop_service import FILE, OBSERVER, SERVICE, InteropService

from cube.rpc.grpcio_door import GrpcioDoor
from cube.rpc.listener import Listener, Tls
from cube.rpc.reflection import Reflection
from cube.rpc.router import Request, Response, Router

_READY_S = 100.0

LARGE = bytes(range(256)) * 4096  # what GET /large answers


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """The server's address, while it runs. A server that does not end well is an error."""
    line = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address, f"the interop server ended with {process.wait(_READY_S)}"
        yield address
        process.stdin.close()
        assert process.wait(_READY_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def started_with_tls(folder: Path) -> Iterator[tuple[str, Path]]:
    """The same with TLS: its address, and the root certificate to trust. Its files go to `folder`."""
    authority = Authority(folder)
    certificate, key = authority.issue("server")
    with started("--certificate", str(certificate), "--key", str(key)) as address:
        yield address, authority.roots


def router() -> Router:
    """Some plain HTTP beside the service."""
    router = Router()
    router.add("GET", "/hello", lambda request: Response(body=b'{"hello": "world"}'))
    router.add("GET", "/large", lambda request: Response(body=LARGE, content_type="application/octet-stream"))
    router.add("POST", "/echo", _echo)
    return router


def _echo(request: Request) -> Response:
    return Response(body=request.body, content_type=request.headers.get("content-type", "text/plain"))


async def serve(door: str, tls: Tls | None) -> None:
    """Until standard input ends."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    handlers = InteropService().handlers() | Reflection({SERVICE: FILE, OBSERVER: FILE}).handlers()
    server = GrpcioDoor(handlers) if door == "grpcio" else Listener(handlers, router(), tls=tls)
    print(await server.start("127.0.0.1:0"), flush=True)
    await over.wait()
    await server.drain(0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--door", choices=("lean", "grpcio"), default="lean")
    parser.add_argument("--certificate", help="PEM file; with --key, for TLS at the lean door")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    tls = Tls(arguments.certificate, arguments.key) if arguments.certificate else None
    uvloop.run(serve(arguments.door, tls))
