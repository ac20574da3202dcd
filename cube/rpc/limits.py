"""What a connection, a call and a process may cost. Every bound of the RPC stack is here, with its reason."""

from dataclasses import dataclass

from cube.errors import BadConfig


@dataclass(frozen=True)
class Limits:
    """Bounds on what peers may ask of us. Read at start; a change needs a restart."""

    connections: int = 20_000  # open at once on one listener; an idle one costs a few KB
    streams: int = 1_000  # calls in flight on one connection (SETTINGS_MAX_CONCURRENT_STREAMS)
    message_bytes: int = 256 << 20  # one message, after decompression: a batch of 4 M keys and then some
    header_bytes: int = 32 << 10  # one header list, counted as RFC 9113 §6.5.2 does: grpcio's own limit is 16 KiB
    body_bytes: int = 256 << 20  # one HTTP/1.1 body, after decompression
    connection_bytes: int = 512 << 20  # requests being received and replies being sent, one connection
    total_bytes: int = 4 << 30  # the same, all connections of a process
    window_bytes: int = 16 << 20  # flow-control credit given to a peer, per stream and per connection; 65,535 or more
    frame_bytes: int = 1 << 20  # largest frame accepted; larger ones save little and delay what shares the connection
    useless_frames: int = 1_000  # frames that carry no work, between two ticks of the listener's clock
    handshake_s: float = 10.0  # from accepting a connection to the peer's greeting (TLS included)
    idle_s: float = 3600.0  # without a call in flight; 0: never closed. Clients keep channels open for hours
    stall_s: float = 60.0  # in the middle of a request or a reply with less than 1 KiB of it moving

    def __post_init__(self) -> None:
        if not 65_535 <= self.window_bytes < 1 << 31:  # a peer may use the protocol's default before it knows of ours
            raise BadConfig("window_bytes", self.window_bytes, "65,535 to 2,147,483,647")


class Budget:
    """Bytes in flight in a whole process: requests being received, replies being sent."""

    __slots__ = ("_total", "used")

    def __init__(self, total: int):
        self._total, self.used = total, 0

    @property
    def exceeded(self) -> bool:
        """Whether a new request is to be refused rather than received."""
        return self.used > self._total

    def take(self, count: int) -> None:
        """Count bytes as in flight."""
        self.used += count

    def give(self, count: int) -> None:
        """Count bytes as gone."""
        self.used -= count
