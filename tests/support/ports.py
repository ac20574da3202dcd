"""Loopback ports at which nobody listens until the test does."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port(number: int = 0) -> Iterator[str]:
    """An address that refuses connections, and may be listened at (SO_REUSEADDR) as often as the test likes.

    It is bound all the while: a port that was merely found free may be given to another test's server or client
    before it is used. number: which one; 0 for any. Raises OSError where that one is taken.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", number))
        yield f"127.0.0.1:{holder.getsockname()[1]}"
