"""Addresses to listen on, and sockets bound to them."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cube.errors import BadConfig

UNIX_MODE = 0o600  # who may call through a socket file: the user who runs us
# A peer that vanished without a word (no packet says so): noticed after two idle minutes and four probes.
KEEPALIVE = {socket.TCP_KEEPIDLE: 120, socket.TCP_KEEPINTVL: 30, socket.TCP_KEEPCNT: 4}


@dataclass(frozen=True, slots=True)
class Bound:
    """Sockets of one address: bound, not listening yet. One, or one for each address that a host name has."""

    address: str
    sockets: Sequence[socket.socket]
    file: tuple[str, os.stat_result] | None = None  # of a unix socket

    def remove_file(self) -> None:
        """Remove the socket's file, unless another server has put its own there."""
        if self.file is not None:
            path, ours = self.file
            with contextlib.suppress(OSError):
                if os.path.samestat(ours, os.stat(path)):
                    os.unlink(path)


async def bound_sockets(listen: str, reuse_port: bool = False) -> Bound:
    """Bind what Listener.start describes. Raises BadConfig."""
    if listen.startswith("unix:"):
        return _bound_file(listen, reuse_port)
    host, name, port = host_and_port(listen)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sockets = _tcp_sockets(list(dict.fromkeys((info[0], info[4]) for info in found)), reuse_port)
    except (OSError, UnicodeError) as error:
        raise cannot_be_bound(listen) from error
    return Bound(f"{host}:{sockets[0].getsockname()[1]}", sockets)


def host_and_port(listen: str) -> tuple[str, str, int]:
    """The host as it is said, without the brackets of an IPv6 address, and the port. Raises BadConfig."""
    host, _, port = listen.rpartition(":")
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not name or (":" in name and name is host) or not is_port:
        raise BadConfig("listen", repr(listen), "host:port")
    return host, name, int(port)


def cannot_be_bound(listen: str) -> BadConfig:
    """The error for an address that is one, but not free or not ours."""
    return BadConfig("listen", f"{listen}, which cannot be bound", "an address of this machine with a free port")


def _tcp_sockets(addresses: list[tuple[int, Any]], reuse_port: bool) -> list[socket.socket]:
    """A socket for each address, all with the same port."""
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    for family, (host, port, *rest) in addresses:
        if sockets and not port:
            port = sockets[0].getsockname()[1]
        try:
            sockets.append(_tcp_socket(family, (host, port, *rest), reuse_port))
        except OSError as error:
            refused = error
            # "localhost" is ::1 too, even on machines that have no IPv6.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if sockets:
            return sockets
    for one in sockets:
        one.close()
    raise refused or OSError("a name without addresses")


def _tcp_socket(family: int, address: tuple[Any, ...], reuse_port: bool) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # what a predecessor's connections left is no obstacle
        if reuse_port:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        # What connections inherit.
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            one.setsockopt(socket.IPPROTO_TCP, option, value)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def _bound_file(listen: str, reuse_port: bool) -> Bound:
    path = listen.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("///") else path  # unix:///path, as gRPC writes it too
    if not path:
        raise BadConfig("listen", repr(listen), "unix:/path")
    if reuse_port:
        raise BadConfig("listen", f"{listen} for several workers", "host:port: only ports can be shared")
    try:
        one = _unix_socket(path)
        return Bound(f"unix:{path}", [one], (path, os.stat(path)))
    except OSError as error:
        raise BadConfig(
            "listen", f"{listen}, which cannot be bound ({error})", "a path for a socket that no server listens on"
        ) from error


def _unix_socket(path: str) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(one.fileno(), UNIX_MODE)  # bind gives it to the file, which so never has another mode
        try:
            one.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            one.bind(path)
    except OSError:
        one.close()
        raise
    return one


def _is_stale(path: str) -> bool:
    """Whether a file is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED
