"""TLS without a socket: certificates that may change while we serve, and sessions that turn bytes into bytes.

The event loop's own TLS layer is not used: it costs three times as much for a small call, makes a record of every
buffer of a reply, and does not tell of handshakes that failed.
"""

import contextlib
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path

from cube.errors import BadConfig
from cube.rpc.http2 import Buffer

log = logging.getLogger(__name__)

PROTOCOLS = ["h2", "http/1.1"]
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; all of 1.3's are sound. RFC 9113 §9.2.2 forbids most others
_RECORD = 16 << 10  # the most that one record carries, and that one read gives
_PIECE = 32 << 10  # what goes through a session at once: its two buffers grow to that and never shrink


class Tls:
    """Who we are to our clients, and which of them we let in.

    certificate, key: PEM files, the certificate followed by those between it and the root. client_ca: PEM file of the
    roots that clients' certificates must come from (mTLS); without it clients need none. The files may be replaced at
    any time: see `refresh`.
    """

    def __init__(self, certificate: str | Path, key: str | Path, client_ca: str | Path | None = None):
        """Raises BadConfig for files that are missing, or are no certificate with its key."""
        self._certificate, self._key, self._client_ca = Path(certificate), Path(key), client_ca and Path(client_ca)
        self._seen = self._signature()
        try:
            self._context = self._load()
        except (OSError, ValueError) as error:
            raise BadConfig(
                f"TLS files {self._names()}", str(error), "a certificate and its key, PEM, not encrypted"
            ) from error

    def session(self) -> "Session":
        """The server's end of a new connection, with the certificate that is in force now."""
        return Session(self._context)

    def refresh(self) -> None:
        """Load the files again if they have changed. Connections that are open stay as they are.

        Cheap where nothing has changed. Files that cannot be used are logged once and what was loaded before stays in
        force: a certificate and its key are two files, and between the first and the second write they do not fit.
        """
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._context = self._load()
        except (OSError, ValueError) as error:
            log.warning("TLS files %s changed but cannot be used, the old ones stay: %s", self._names(), error)
        else:
            log.info("TLS files %s changed: new connections use them", self._names())

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        context.set_alpn_protocols(PROTOCOLS)
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(self._certificate, self._key, password="")  # else it asks the terminal
        if self._client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._client_ca)
        return context

    def _files(self) -> list[Path]:
        return [self._certificate, self._key, *([self._client_ca] if self._client_ca else [])]

    def _names(self) -> str:
        return ", ".join(map(str, self._files()))

    def _signature(self) -> list[tuple[int, int, int] | None]:
        """What differs when a file has been written or replaced."""
        return [_stamp(file) for file in self._files()]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


class Session:
    """One connection's end of TLS. Its methods never raise."""

    __slots__ = ("_incoming", "_outgoing", "_tls", "failure", "is_closed", "is_open")

    def __init__(self, context: ssl.SSLContext):
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.is_open = False  # the handshake is complete
        self.is_closed = False  # the peer has said that it sends no more
        self.failure: ssl.SSLError | None = None  # what the peer sent is not TLS, or not such as we accept

    @property
    def protocol(self) -> str | None:
        """What ALPN agreed on."""
        return self._tls.selected_alpn_protocol()

    def receive(self, data: bytes) -> list[bytes]:
        """What is in the peer's records, as far as they are whole and sound. Then see `failure` and `pending`."""
        if len(data) <= _PIECE:
            return self._receive(data)
        view = memoryview(data)
        return [piece for at in range(0, len(data), _PIECE) for piece in self._receive(view[at : at + _PIECE])]

    def _receive(self, data: Buffer) -> list[bytes]:
        incoming, tls, pieces = self._incoming, self._tls, list[bytes]()
        incoming.write(data)
        try:
            if not self.is_open:
                tls.do_handshake()
                self.is_open = True
            while incoming.pending:  # else the next read would only raise SSLWantReadError
                piece = tls.read(_RECORD)
                if not piece:
                    self.is_closed = True
                    break
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.failure = error
        return pieces

    def send(self, buffers: Sequence[Buffer]) -> list[bytes]:
        """The records that carry these buffers; few, where the buffers are small."""
        out: list[bytes] = []
        try:
            if sum(map(len, buffers)) <= _PIECE:
                self._encrypt(b"".join(buffers), out)
            else:
                self._encrypt_large(buffers, out)
        except ssl.SSLError as error:  # after a failure
            self.failure = self.failure or error
        return out

    def _encrypt_large(self, buffers: Sequence[Buffer], out: list[bytes]) -> None:
        small: list[Buffer] = []
        for buffer in buffers:
            if len(buffer) < _RECORD:
                small.append(buffer)
                continue
            self._encrypt(b"".join(small), out)
            view, small = memoryview(buffer), []
            for at in range(0, len(buffer), _PIECE):
                self._encrypt(view[at : at + _PIECE], out)
        self._encrypt(b"".join(small), out)

    def _encrypt(self, data: Buffer, out: list[bytes]) -> None:
        if data:
            self._tls.write(data)
            out.append(self._outgoing.read())

    @property
    def pending(self) -> int:
        """Whether `take` has something."""
        return self._outgoing.pending

    def take(self) -> bytes:
        """What TLS itself has to send: of the handshake, or an alert."""
        return self._outgoing.read()

    def close(self) -> bytes:
        """What tells the peer that nothing more comes."""
        with contextlib.suppress(ssl.SSLError, ValueError):  # the usual case: the peer has not said so yet
            self._tls.unwrap()
        return self._outgoing.read()
