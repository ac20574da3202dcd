"""From a target's text to its endpoints, and news of them.

    host:port    [v6]:port    unix:/path       that one endpoint
    list://host:port,host:port*3               these; the second takes three times as much
    file:///absolute/path  file://relative     a file: `host:port [weight]` a line, `#` comments; looked at every second
    dns://host:port                            every address of the name; resolved again every 10 seconds

`?refresh=SECONDS` after a file or a name sets how often. What is found later and is of no use (a file that has become
unreadable, empty or wrong, a name that does not resolve) changes nothing: the last good list stands, and a warning says
so once. A file had better be replaced by renaming another over it: an edit in place may be seen half done.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from cube.errors import BadConfig, ServingError, Unavailable
from cube.rpc.channel import Endpoint

FILE_REFRESH_S, DNS_REFRESH_S = 1.0, 10.0
MOST_FILE_BYTES = 1 << 20  # some 30,000 endpoints
_FORMS = "host:port, [IPv6]:port, unix:/path, list://, file:// or dns://"

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """An endpoint, and its share of the calls in relation to the others'."""

    target: str  # as Channel takes it
    weight: float = 1.0


class Naming:
    """Where a target's endpoints are known from. One reader: `first`, then `changes`."""

    def __init__(
        self,
        text: str,
        look: Callable[[], Awaitable[tuple[Place, ...]]] | None,
        refresh_s: float,
        known: tuple[Place, ...] = (),
        authority: str | None = None,
    ):
        """Use `parse` or `of`. look: find the places, or raise BadConfig, Unavailable; None: `known` never changes."""
        self.text = text
        self.known = known  # the places found last, or given from the start
        self.authority = authority  # what all endpoints are called (TLS checks it), if that is not their own target
        self._look, self._refresh_s = look, refresh_s
        self._problem = ""  # the one that was warned of

    @classmethod
    def parse(cls, text: str) -> "Naming":
        """Read a target. Raises BadConfig for what is none; files and names are not looked at yet."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls.of([text])
        if scheme == "list":
            return cls._fixed(text, [_listed(part.strip(), text) for part in rest.split(",")])
        if scheme not in ("file", "dns"):
            raise BadConfig(f"target {text!r}", f"{scheme}://", _FORMS)
        where, asked, query = rest.partition("?")
        refresh_s = FILE_REFRESH_S if scheme == "file" else DNS_REFRESH_S
        if asked:
            name, _, value = query.partition("=")
            refresh_s = _positive(value)
            if name != "refresh" or math.isnan(refresh_s):
                raise BadConfig(f"target {text!r}", f"?{query}", "?refresh=SECONDS, more than 0")
        if scheme == "dns":
            endpoint = _endpoint(where, f"target {text!r}")
            if endpoint.path:
                raise BadConfig(f"target {text!r}", where, "host:port to resolve")
            return cls(text, lambda: _resolve(endpoint.host, endpoint.port, text), refresh_s, (), where)
        if not where or "\0" in where:
            raise BadConfig(f"target {text!r}", repr(where), "the path of a file")
        return cls(text, _File(where).look, refresh_s)

    @classmethod
    def of(cls, targets: Sequence[str]) -> "Naming":
        """Endpoints that are known, each host:port, [v6]:port or unix:/path, and *weight if need be."""
        text = ",".join(targets)
        return cls._fixed(text, [_listed(target, text) for target in targets])

    @classmethod
    def _fixed(cls, text: str, places: Iterable[Place]) -> "Naming":
        known: dict[str, Place] = {}
        for place in places:
            if place.target in known:
                raise BadConfig(f"target {text!r}", f"{place.target} twice", "every endpoint once")
            known[place.target] = place
        if not known:
            raise BadConfig("target", "no endpoint", "one or more")
        return cls(text, None, math.inf, tuple(known.values()))

    @property
    def is_fixed(self) -> bool:
        """Whether the places are known from the start, and never change."""
        return self._look is None

    async def first(self) -> tuple[Place, ...]:
        """The places now, at least one. Raises BadConfig naming file and line, Unavailable for a name nobody knows."""
        if self._look is not None:
            self.known = await self._look()
        return self.known

    async def changes(self) -> AsyncIterator[tuple[Place, ...]]:
        """All places, each time they are others than `first` or this gave last. Ends at once for fixed ones."""
        while self._look is not None:
            await asyncio.sleep(self._refresh_s)
            try:
                found = await self._look()
            except ServingError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    _log.warning("%s; going on with the %d endpoints known before", error, len(self.known))
                continue
            self._problem = ""
            if found != self.known:
                self.known = found
                yield found


class _File:
    """A file of places."""

    def __init__(self, path: str):
        self._path = path
        self._data: bytes | None = None  # what `_places` was read from
        self._places: tuple[Place, ...] = ()

    async def look(self) -> tuple[Place, ...]:
        # Read, not only stat'ed: two edits within a tick of the file system's clock can have one time and one size.
        data = await asyncio.to_thread(_read, self._path)
        if data != self._data:
            self._places = parse_file(data, self._path)
            self._data = data
        return self._places


def parse_file(data: bytes, path: str) -> tuple[Place, ...]:
    """The places in a file. Raises BadConfig naming file and line."""
    known: dict[str, tuple[int, Place]] = {}
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise BadConfig(path, f"byte {data[error.start]:#04x} at offset {error.start}", "UTF-8") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        if len(words) > 2:
            raise BadConfig(where, f"{len(words)} words", "host:port [weight]")
        endpoint = _endpoint(words[0], where)
        place = Place(endpoint.text, _weight(words[1], where) if len(words) == 2 else 1.0)
        if place.target in known:
            raise BadConfig(where, f"{place.target} again, as in line {known[place.target][0]}", "every endpoint once")
        known[place.target] = number, place
    if not known:
        raise BadConfig(path, "no endpoint", "one or more lines of host:port [weight]")
    return tuple(place for _, place in known.values())


def _read(path: str) -> bytes:
    """Blocks. Raises BadConfig for what cannot be read, or is more than a list can be."""
    try:
        # Not blocking: to open a named pipe would wait for somebody to write into it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadConfig(path, "something else", "a regular file")
            data = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise BadConfig(path, error.strerror or type(error).__name__, "a readable file of endpoints") from error
    if len(data) > MOST_FILE_BYTES:
        raise BadConfig(path, f"more than {MOST_FILE_BYTES} bytes", "a list of endpoints")
    return data


async def _resolve(host: str, port: int, text: str) -> tuple[Place, ...]:
    """Every address of a name, in an order that does not depend on the resolver's. Raises Unavailable."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:  # socket.gaierror
        unavailable = Unavailable(f"{text}: the name does not resolve ({error.strerror or error})")
        unavailable.never_processed = True
        raise unavailable from error
    addresses = sorted({str(address[0]) for *_, address in found})
    return tuple(Place(f"[{address}]:{port}" if ":" in address else f"{address}:{port}") for address in addresses)


def _listed(part: str, text: str) -> Place:
    """host:port or host:port*weight."""
    where = f"target {text!r}"
    target, starred, weight = part.partition("*")
    return Place(_endpoint(target, where).text, _weight(weight, where) if starred else 1.0)


def _endpoint(target: str, where: str) -> Endpoint:
    """Stricter than a channel, which is given what a person has looked at: `1::2:80` has two readings."""
    host, _, port = target.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    doubtful = not target.startswith("unix:") and (
        any(character in host for character in "/@?#*,") or not port.isascii() or (":" in host and not is_bracketed)
    )
    if doubtful or any(character.isspace() or character < " " for character in target):
        raise BadConfig(where, repr(target), "host:port, [IPv6]:port or unix:/path")
    try:
        return Endpoint.parse(target)
    except BadConfig as error:
        raise BadConfig(where, error.found, error.expected) from error


def _weight(text: str, where: str) -> float:
    weight = _positive(text)
    if math.isnan(weight):
        raise BadConfig(where, f"weight {text!r}", "a number greater than 0")
    return weight


def _positive(text: str) -> float:
    """A number that is greater than 0 and finite; NaN for what is none."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value < math.inf:
            return value
    return math.nan
