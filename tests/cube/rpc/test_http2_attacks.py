"""What hostile peers do to a Connection, and what friendly ones that look alike are spared."""

import itertools
import random
import tracemalloc
from typing import Any, NamedTuple

import pytest
from frames import (
    BODY,
    END_HEADERS,
    GET,
    INDEXING,
    MAX_WINDOW,
    OK,
    POST,
    PREFACE,
    SETTINGS_ACK,
    Code,
    Kind,
    Peer,
    Set,
    Windows,
    answer,
    block,
    consume,
    continuation,
    data,
    frame,
    goaway,
    headers,
    indexed,
    literal,
    ping,
    priority,
    priority_fields,
    rst_stream,
    settings,
    told,
    weight,
    window_update,
)
from hypothesis import example, given
from hypothesis import settings as how
from hypothesis import strategies as st

from cube.rpc.headers import encode
from cube.rpc.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    HeadersReceived,
    State,
    StreamReset,
    TrailersReceived,
)
from cube.rpc.limits import Limits

GET_BLOCK, POST_BLOCK, OK_BLOCK = block(GET), block(POST), block(OK)
MORE, MALFORMED = block([("x", "y")]), block([*GET, ("connection", "close")])
CALM = Code.ENHANCE_YOUR_CALM
PATIENCE = 200
LIMITS = Limits(useless_frames=PATIENCE, streams=50)


# Floods. A flood is the frames of its n-th turn; `costs` is what a turn spends at least, in useless frames.


class Flood(NamedTuple):
    name: str
    turn: Any  # number → bytes
    first: bytes = b""
    ends: tuple[str, ...] = ("server", "client")


def stream_number(n: int) -> int:
    return 2 * n + 3


def new(n: int, raw: bytes = GET_BLOCK, ended: bool = True) -> bytes:
    return headers(stream_number(n), raw, ended)


FLOODS = [
    Flood("PING", lambda n: ping()),
    Flood("PING answers nobody asked for", lambda n: ping(ack=True)),
    Flood("SETTINGS", lambda n: settings()),
    Flood("SETTINGS with every setting", lambda n: settings((1, 0), (3, 100), (4, 65_535), (5, 16_384), (6, 1_000))),
    Flood("SETTINGS that move the windows", lambda n: settings((Set.INITIAL_WINDOW, 65_535 - n % 2))),
    Flood("SETTINGS acknowledgements", lambda n: SETTINGS_ACK),
    Flood("PRIORITY of idle streams", lambda n: priority(2 * n + 1001)),
    Flood("PRIORITY of one stream", lambda n: priority(1)),
    Flood("unknown frames", lambda n: frame(0x42)),
    Flood("unknown frames with a payload", lambda n: frame(0xFF, 1, bytes(10_000))),
    Flood("WINDOW_UPDATE of the connection", lambda n: window_update(0, 1)),
    Flood("WINDOW_UPDATE of a stream", lambda n: window_update(1, 1)),
    Flood("empty DATA", lambda n: data(1)),
    Flood("DATA that is all padding", lambda n: data(1, pad=255)),
    Flood("GOAWAY", lambda n: goaway(MAX_WINDOW)),
    Flood("RST_STREAM of a closed stream", lambda n: rst_stream(1)),
    Flood("WINDOW_UPDATE of a closed stream", lambda n: window_update(1, 1), rst_stream(1)),
    Flood("DATA of a closed stream", lambda n: data(1), rst_stream(1)),
    Flood("HEADERS of a closed stream", lambda n: headers(1, MORE, True), rst_stream(1)),
    Flood("interim responses", lambda n: headers(1, block([(":status", "103")])), ends=("client",)),
    *(
        Flood(name, turn, first, ends=("server",))
        for name, turn, first in [
            ("rapid reset", lambda n: new(n) + rst_stream(stream_number(n)), b""),
            ("rapid reset of unfinished requests", lambda n: new(n, ended=False) + rst_stream(stream_number(n)), b""),
            (
                "rapid reset behind a byte of data",
                lambda n: new(n, ended=False) + data(stream_number(n), b"x") + rst_stream(stream_number(n)),
                b"",
            ),
            (
                "rapid reset behind a few bytes of data",
                lambda n: new(n, ended=False) + data(stream_number(n), b"x") * 4 + rst_stream(stream_number(n)),
                b"",
            ),
            ("malformed requests", lambda n: new(n, MALFORMED), b""),
            (
                "requests that turn out malformed",
                lambda n: new(n, block([*POST, ("content-length", "1")]), False) + data(stream_number(n), b"xy"),
                b"",
            ),
            (
                "resets provoked by a window that overflows",
                lambda n: new(n) + window_update(stream_number(n), MAX_WINDOW),
                b"",
            ),
            (
                "resets provoked by a window that does not grow",
                lambda n: new(n) + window_update(stream_number(n), 0),
                b"",
            ),
            ("resets provoked by DATA after the end", lambda n: new(n) + data(stream_number(n), b"x"), b""),
            ("resets provoked by HEADERS after the end", lambda n: new(n) + new(n), b""),
            (
                "resets provoked by PRIORITY of a wrong size",
                lambda n: new(n) + frame(Kind.PRIORITY, stream_number(n), b"1234"),
                b"",
            ),
            (
                "resets provoked by dependence on oneself",
                lambda n: new(n) + priority(stream_number(n), depends=stream_number(n)),
                b"",
            ),
            (
                "resets provoked by trailers that do not end",
                lambda n: new(n, ended=False) + headers(stream_number(n), MORE),
                b"",
            ),
            (
                "requests over the limit",
                lambda n: headers(101 + 2 * n, GET_BLOCK, True),
                b"".join(headers(2 * n + 1, POST_BLOCK) for n in range(1, 50)),
            ),
            (
                "empty CONTINUATION",
                lambda n: continuation(3, b"", done=False),
                headers(3, GET_BLOCK, done=False),
            ),
            (
                "header blocks in many pieces",
                lambda n: (
                    headers(stream_number(n), GET_BLOCK[:1], True, False)
                    + b"".join(continuation(stream_number(n), GET_BLOCK[at : at + 1], False) for at in range(1, 9))
                    + continuation(stream_number(n), GET_BLOCK[9:])
                    + rst_stream(stream_number(n))
                ),
                b"",
            ),
        ]
    ),
]


def suffered(flood: Flood, end: str, app: Any, at_once: bool) -> Peer:
    """A Connection after the flood, or after 3 times what it is to bear."""
    if end == "server":
        peer = Peer(limits=LIMITS, app=app)
        peer.send(headers(1, POST_BLOCK))
    else:
        peer = Peer(is_client=True, limits=LIMITS, app=app)
        peer.open()
        if flood.name != "interim responses":
            peer.send(headers(1, OK_BLOCK))
    if flood.first:
        peer.send(flood.first)
    peer.turns = 0
    if at_once:
        peer.send(b"".join(map(flood.turn, range(3 * PATIENCE))))
    else:
        while not peer.connection.closed and peer.turns < 3 * PATIENCE:
            peer.send(flood.turn(peer.turns))
            peer.turns += 1
    return peer


@pytest.mark.parametrize(
    ("flood", "end"),
    [pytest.param(flood, end, id=f"{flood.name} to a {end}") for flood in FLOODS for end in flood.ends],
)
def test_a_flood_ends_in_enhance_your_calm(flood, end):
    peer = suffered(flood, end, consume, at_once=False)
    assert peer.failure == CALM
    assert peer.turns <= PATIENCE + 60
    assert isinstance(peer.events[-1], ConnectionFailed)
    assert suffered(flood, end, consume, at_once=True).failure == CALM


@pytest.mark.parametrize("flood", [f for f in FLOODS if f.first == b"" and "client" in f.ends], ids=lambda f: f.name)
def test_a_frame_now_and_then_is_no_flood(flood):
    """The same frames, with the clock's renewal between them."""
    peer = suffered(Flood("none", lambda n: b"", b""), "server", consume, at_once=True)
    for n in range(3 * PATIENCE):
        peer.send(flood.turn(n))
        if n % (PATIENCE // 2) == 0:
            peer.connection.renew()
    assert peer.failure is None


def test_a_flood_of_the_default_size_ends_too():
    peer = Peer()
    peer.send(ping() * (Limits.useless_frames + 100))
    assert peer.failure == CALM
    assert len(peer.of(Kind.PING)) <= Limits.useless_frames


@pytest.mark.parametrize(
    "turn",
    [lambda n: window_update(1, 1), lambda n: settings((Set.INITIAL_WINDOW, n + 1))],
    ids=["WINDOW_UPDATE", "SETTINGS"],
)
def test_windows_that_open_a_byte_at_a_time_are_a_flood(turn):
    """CVE-2019-9511, data dribble: a large reply is asked for and let through in frames of one byte."""
    peer = Peer(limits=LIMITS, greeting=((Set.INITIAL_WINDOW, 0),))
    peer.send(headers(1, GET_BLOCK, True))
    stream = peer.connection.streams[1]
    peer.connection.send_headers(stream, encode([(b":status", b"200")]))
    peer.connection.send_data(stream, [bytes(1 << 20)], ended=True)
    for n in range(10 * PATIENCE):
        peer.send(turn(n))
    assert peer.failure == CALM


def test_requests_after_goaway_are_a_flood_too():
    peer = Peer(limits=LIMITS)
    peer.connection.goaway()
    for n in range(10 * PATIENCE):
        peer.send(new(n))
    assert peer.failure == CALM


def test_rapid_reset_never_has_more_streams_open_than_the_limit():
    peer, most = Peer(limits=LIMITS), 0
    for n in range(3 * PATIENCE):
        peer.send(new(n), rst_stream(stream_number(n)) if n % 2 else b"")
        most = max(most, len(peer.connection.streams))
    assert most <= LIMITS.streams
    assert peer.failure == CALM


# Friendly peers that look alike: none of them may be punished. They spend far more frames than the patience.

MANY = 10 * PATIENCE


def test_a_client_that_cancels_3_percent_of_its_calls_is_no_attacker():
    peer, chance = Peer(limits=LIMITS), random.Random(1)
    for n in range(MANY):
        number = stream_number(n)
        if chance.random() < 0.03:
            peer.send(headers(number, POST_BLOCK) + data(number, b"x", True), rst_stream(number))
        else:
            peer.app = answer
            peer.send(headers(number, POST_BLOCK) + data(number, b"x", True))
            peer.app = None
    assert peer.failure is None
    assert len(peer.of(Kind.DATA)) > 0.95 * MANY


def test_a_client_that_pings_every_10_seconds_is_no_attacker():
    peer = Peer(limits=Limits(useless_frames=5))
    for second in range(3_600):
        peer.connection.renew()
        if second % 10 == 0:
            peer.send(ping())
    assert peer.failure is None


def test_a_client_that_probes_the_bandwidth_while_it_sends_is_no_attacker():
    """grpc: a PING when data arrives, its own SETTINGS when the estimate has grown, WINDOW_UPDATE when it reads."""
    peer = Peer(limits=LIMITS, app=consume)
    peer.send(headers(1, POST_BLOCK))
    windows = Windows(peer)
    for n in range(MANY):
        windows.send(1, bytes(5_000))
        if n % 4 == 0:
            peer.send(ping())
        if n % 100 == 0:
            peer.send(settings((Set.INITIAL_WINDOW, 65_535 + n)), window_update(0, 1))
    assert peer.failure is None


@pytest.mark.parametrize("size", [5, 1_000, 16_384])
@pytest.mark.parametrize("levels", [(0,), (1,), (0, 1)], ids=["connection", "stream", "both"])
@pytest.mark.parametrize("end", ["server", "client"])
def test_a_peer_that_answers_every_data_frame_with_window_updates_is_no_attacker(size, levels, end):
    peer = Peer(is_client=end == "client", limits=LIMITS, greeting=((Set.INITIAL_WINDOW, 1 << 30),))
    if end == "client":
        stream = peer.open()
    else:
        peer.send(headers(1, GET_BLOCK, ended=True))
        stream = peer.connection.streams[1]
        peer.connection.send_headers(stream, encode([(b":status", b"200")]))
    peer.send(window_update(0, 1 << 30))
    body = bytes(size)
    for _ in range(MANY // 2):
        peer.connection.send_data(stream, [body])
        peer.send(*(window_update(level, size) for level in levels))
    assert peer.failure is None
    assert len(peer.of(Kind.DATA)) == MANY // 2


@pytest.mark.parametrize("levels", [(0,), (1,), (0, 1)], ids=["connection", "stream", "both"])
def test_a_peer_that_reads_a_long_reply_frame_by_frame_is_no_attacker(levels):
    """As above, from the windows that RFC 9113 begins with: the updates come in bursts, as the frames do."""
    peer = Peer(limits=LIMITS, greeting=((Set.INITIAL_WINDOW, 65_535 if 1 in levels else 1 << 30),))
    peer.send(headers(1, GET_BLOCK, ended=True), b"" if 0 in levels else window_update(0, 1 << 30))
    stream = peer.connection.streams[1]
    peer.connection.send_headers(stream, encode([(b":status", b"200")]))
    peer.connection.send_data(stream, [bytes(600 * 16_384)], ended=True)
    sizes = [len(f.payload) for f in peer.heard() if f.kind == Kind.DATA]
    while sizes and peer.failure is None:
        before = len(peer.frames)
        peer.send(
            b"".join(
                window_update(level, size) for size in sizes for level in levels if stream.state is not State.CLOSED
            )
        )
        sizes = [len(f.payload) for f in peer.frames[before:] if f.kind == Kind.DATA]
    assert peer.failure is None
    assert peer.frames[-1].ended


def test_a_client_with_many_small_calls_is_no_attacker():
    peer = Peer(limits=LIMITS, app=answer)
    for n in range(MANY):
        number = stream_number(n)
        peer.send(
            headers(number, POST_BLOCK) + data(number, b"x") + data(number, b"", True) + window_update(0, len(BODY))
        )
    assert peer.failure is None


def test_a_client_that_sends_large_headers_in_pieces_is_no_attacker():
    peer = Peer(limits=LIMITS, app=answer)
    for n in range(MANY // 2):
        peer.send(headers(stream_number(n), GET_BLOCK, True, done=False) + continuation(stream_number(n), MORE))
    assert peer.failure is None


def test_a_server_that_sends_small_messages_is_no_attacker():
    peer = Peer(is_client=True, limits=LIMITS, app=consume)
    peer.open(GET, ended=True)
    peer.send(headers(1, OK_BLOCK))
    windows = Windows(peer)
    for n in range(MANY):
        windows.send(1, b"tick")
        if n % 2:
            peer.send(ping())
    assert peer.failure is None


# Memory. What a Connection keeps is bounded whatever it is sent; the sender's own patience is not.


def cost(pieces: Any, limits: Limits = LIMITS, peer: Peer | None = None) -> tuple[int, Peer]:
    """The most bytes that were in use, beyond those before, while a Connection took the pieces."""
    peer = peer or Peer(limits=limits)
    connection = peer.connection
    tracemalloc.start()
    try:
        before, most = tracemalloc.get_traced_memory()[0], 0
        for piece in pieces:
            if connection.closed:
                break
            connection.receive(piece)
            most = max(most, tracemalloc.get_traced_memory()[0] - before - len(piece))
    finally:
        tracemalloc.stop()
    return most, peer


def test_a_header_block_that_never_ends_is_refused_at_the_limit():
    pieces = itertools.chain(
        [headers(1, GET_BLOCK, done=False)], (continuation(1, literal(b"x", b"v" * 900), False) for _ in range(10_000))
    )
    most, peer = cost(pieces, Limits(useless_frames=1 << 30))
    peer.heard()
    assert peer.failure == CALM
    assert most < 4 * Limits.header_bytes


def test_a_header_block_that_never_ends_in_pieces_of_nothing_is_refused():
    pieces = itertools.chain([headers(1, b"", done=False)], itertools.repeat(continuation(1, b"", False), 10_000))
    most, peer = cost(pieces, Limits())
    peer.heard()
    assert peer.failure == CALM
    assert most < 1 << 20


def test_a_frame_larger_than_allowed_is_refused_at_its_header():
    for kind in (*Kind, 0x99):
        peer = Peer()
        peer.send(headers(1, POST_BLOCK))
        peer.send((Limits.frame_bytes + 1).to_bytes(3) + bytes((kind, 0)) + (1).to_bytes(4))
        assert peer.connection.closed
        assert peer.failure in (Code.FRAME_SIZE_ERROR, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("kind", [Kind.HEADERS, Kind.SETTINGS, Kind.GOAWAY, Kind.PING, Kind.PRIORITY, 0x99])
def test_a_frame_that_trickles_in_is_kept_once_and_no_more(kind):
    raw = Limits.frame_bytes.to_bytes(3) + bytes((kind, 0)) + (kind == Kind.HEADERS).to_bytes(4) + bytes(1 << 20)
    most, _ = cost(raw[at : at + 20_000] for at in range(0, len(raw) - 20_000, 20_000))
    assert most < 3 << 20


def test_data_is_passed_on_as_it_comes_and_not_kept():
    peer = Peer(app=consume)
    peer.send(headers(1, POST_BLOCK))
    raw = data(1, bytes(Limits.frame_bytes))
    most, _ = cost((raw[at : at + 20_000] for at in range(0, len(raw), 20_000)), peer=peer)
    assert most < 1 << 17


def test_a_bomb_of_references_to_a_large_entry_is_refused_without_being_inflated():
    entry = headers(1, block(GET[:3]) + literal(b"x", b"v" * 3_900, INDEXING), True)
    bomb = headers(3, block(GET[:3]) + indexed(62) * 30_000, True)  # 118 MB
    most, peer = cost([entry, bomb])
    peer.heard()
    assert peer.failure == CALM
    assert most < 1 << 20


def test_a_bomb_in_pieces_is_refused_without_being_inflated():
    entry = headers(1, block(GET[:3]) + literal(b"x", b"v" * 3_900, INDEXING), True)
    pieces = [headers(3, block(GET[:3]), True, False), *[continuation(3, indexed(62) * 500, False)] * 40]
    most, peer = cost([entry, *pieces, continuation(3, indexed(62))])
    peer.heard()
    assert peer.failure == CALM
    assert most < 1 << 20


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("what", ["name", "value", "many", "trailers"])
def test_a_header_list_may_be_exactly_as_large_as_the_limit(what, over):
    """RFC 9113 §6.5.2: name, value and 32 bytes a field, pseudo-fields included."""
    peer = Peer(app=answer)
    rest = Limits.header_bytes + over - (0 if what == "trailers" else sum(len(n) + len(v) + 32 for n, v in GET))
    if what == "name":
        more = literal(b"n" * (rest - 32), b"")
    elif what == "many":
        more = literal(b"n", b"") * (rest // 33 - 1)
        more += literal(b"n", b"v" * (rest - (rest // 33 - 1) * 33 - 33))
    else:
        more = literal(b"n", b"v" * (rest - 33))
    if what == "trailers":
        peer.send(headers(1, POST_BLOCK), headers(1, more, True))
    else:
        peer.send(headers(1, GET_BLOCK + more, True))
    assert peer.failure == (CALM if over else None)
    if not over:
        assert peer.reply(1)[1:] == (BODY, True)


@pytest.mark.parametrize(
    "tail",
    [
        b"\x00" + b"\x7f" + b"\xff" * 3 + b"\x7f",
        b"\x00" + b"\x7f" + b"\xff" * 200 + b"\x00",
        b"\x00" + b"\xff" + b"\xff" * 8 + b"\x01",
        b"\x00\x01a" + b"\x7f" + b"\xff" * 9 + b"\x01",
        b"\xff" * 10 + b"\x00",
        b"\x0f" + b"\xff" * 10 + b"\x00",
        b"\x7f" + b"\xff" * 10 + b"\x00",
        b"\xff" + b"\x80" * 30_000,
    ],
    ids=["name of 268 MB", "endless name", "Huffman name", "value", "index", "name index", "indexing", "zeros"],
)
def test_oversized_integers_of_hpack_are_compression_errors(tail):
    most, peer = cost([headers(1, GET_BLOCK + tail, True)])
    peer.heard()
    assert peer.failure == Code.COMPRESSION_ERROR
    assert most < 1 << 18


def test_a_table_size_of_4_gb_is_refused():
    peer = Peer()
    peer.send(headers(1, b"\x3f\xe0\xff\xff\xff\x0f" + GET_BLOCK, True))
    assert peer.failure == Code.COMPRESSION_ERROR


def test_memory_is_flat_over_many_streams_that_ended_in_every_way():
    """Numbers are skipped, streams malformed, reset by us and by the peer, and served: nothing of them may stay."""
    peer = Peer(limits=Limits(useless_frames=1 << 30, streams=100), app=answer)
    number, sizes = 1, []
    for n in range(12_000):
        raw = [block([*GET, ("x-n", str(n))], huffman=False), MALFORMED, GET_BLOCK, GET_BLOCK, GET_BLOCK][n % 5]
        peer.send(headers(number, raw, n % 3 == 0) + window_update(0, len(BODY)))
        if n % 3 == 1:
            peer.send(rst_stream(number))
        elif number in peer.connection.streams:
            peer.connection.reset(peer.connection.streams[number], ErrorCode.CANCEL)
        number += 2 + 4 * (n % 2)
        peer.heard()
        peer.frames.clear()
        peer.events.clear()
        if n % 2_000 == 1_999:
            sizes.append(weight(peer.connection))
    assert not peer.connection.streams
    assert max(sizes) < 400_000


def test_a_peer_that_reads_nothing_makes_pending_grow_by_what_the_caller_sends_and_no_more():
    peer = Peer(greeting=((Set.INITIAL_WINDOW, 0),), app=None)
    message, sent = bytes(10_000), 0
    for n in range(100):
        peer.send(new(n))
        stream = peer.connection.streams[stream_number(n)]
        peer.connection.send_headers(stream, encode([(b":status", b"200")]))
        for _ in range(5):
            peer.connection.send_data(stream, [message])
            sent += len(message)
        assert stream.pending == 5 * len(message)
    peer.heard()
    assert sum(stream.pending for stream in peer.connection.streams.values()) == sent
    assert weight(peer.connection) < 100 * (4_000 + 5 * 300)  # the one message is shared, nothing is copied
    assert not peer.of(Kind.DATA)
    peer.send(*(window_update(stream_number(n), 1) for n in range(100)))
    assert [len(f.payload) for f in peer.of(Kind.DATA)] == [1] * 100
    for stream in list(peer.connection.streams.values()):
        peer.connection.reset(stream, ErrorCode.CANCEL)
    assert weight(peer.connection) < 200_000


def test_what_is_wrong_with_one_stream_leaves_the_others_alone():
    wrongs = [
        lambda number: headers(number, MALFORMED, True),
        lambda number: headers(number, block([*GET, ("content-length", "9")]), True),
        lambda number: headers(number, POST_BLOCK) + window_update(number, MAX_WINDOW),
        lambda number: headers(number, POST_BLOCK) + window_update(number, 0),
        lambda number: headers(number, GET_BLOCK, True) + data(number, b"late"),
        lambda number: headers(number, POST_BLOCK) + headers(number, MORE),
        lambda number: headers(number, POST_BLOCK) + frame(Kind.PRIORITY, number, b"123"),
        lambda number: headers(number, POST_BLOCK) + rst_stream(number) + data(number, b"late"),
    ]
    peer = Peer(app=consume)
    peer.send(headers(1, POST_BLOCK))
    for n, wrong in enumerate(wrongs * 3):
        peer.send(wrong(stream_number(n)))
        peer.send(data(1, b"%02d" % n))
        assert peer.resets(stream_number(n))
    peer.app = answer
    peer.send(data(1, b"!", True))
    assert (
        b"".join(e.data for e in peer.all(DataReceived) if e.stream.id == 1)
        == b"".join(b"%02d" % n for n in range(len(wrongs) * 3)) + b"!"
    )
    assert peer.reply(1)[1:] == (BODY, True)
    assert not peer.resets(1)


# Fuzz. `survives` is the promise: no exception, whole frames out, bounded, and an end that is an end.

BOUND = 4 << 20


def survives(peer: Peer, pieces: Any) -> None:
    limits, connection = LIMITS, peer.connection
    for piece in pieces:
        news = peer.send(piece)
        assert len(connection.streams) <= max(limits.streams, len(peer.opened))
        for f in peer.frames[-3:]:
            assert len(f.payload) <= (1 << 24) - 1
        failures = [event for event in news if isinstance(event, ConnectionFailed)]
        if failures:
            assert failures == news[-1:]
            assert connection.closed
            assert peer.frames[-1].kind == Kind.GOAWAY
            assert peer.frames[-1].code == failures[0].code
    if connection.closed:
        before = len(peer.frames)
        assert peer.send(ping(), headers(99, GET_BLOCK, True)) == []
        assert len(peer.frames) == before
    seen: dict[int, str] = {}
    for event in told(peer.events):  # a stream's events are in the order of its life
        kind, number = event[0], event[1] if len(event) > 1 else 0
        if kind not in ("head", "data", "trailers", "reset"):
            continue
        allowed = {"": ("head", "reset"), "head": ("data", "trailers", "reset"), "data": ("data", "trailers", "reset")}
        assert kind in allowed.get(seen.get(number, ""), ("reset",)), (event, seen)
        over = kind == "trailers" or (kind in ("head", "data") and event[3])
        seen[number] = "over" if over else "gone" if kind == "reset" else kind
    assert weight(connection) < BOUND


def fuzzed(is_client: bool) -> Peer:
    peer = Peer(is_client=is_client, limits=LIMITS, app=meddle, greeting=None)
    peer.opened = []
    if is_client:
        peer.opened = [peer.open(POST, ended=n % 2 == 0) for n in range(3)]
    return peer


def meddle(connection: Connection, event: Any) -> None:
    """An application that does a bit of everything, and looks at nothing twice."""
    consume(connection, event)
    if isinstance(event, HeadersReceived) and event.stream.id % 4 == 1:
        connection.send_headers(event.stream, encode([(b":status", b"200")]))
        connection.send_data(event.stream, [bytes(70_000)])
    if isinstance(event, DataReceived) and event.stream.id % 8 == 7:
        connection.reset(event.stream, ErrorCode.CANCEL)
    if isinstance(event, TrailersReceived) or getattr(event, "ended", False):
        connection.send_trailers(event.stream, encode([(b"grpc-status", b"0")]))


def chunked(raw: bytes, chance: random.Random) -> list[bytes]:
    if chance.random() < 0.2:
        return [raw]
    size = chance.choice([1, 2, 9, 50, 1_000])
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def valid(chance: random.Random, is_client: bool) -> bytes:
    """What a peer that keeps the rules may send."""
    raw = settings((Set.INITIAL_WINDOW, chance.choice([0, 100, 65_535, 1 << 20])))
    raw = raw if is_client else PREFACE + raw
    top, live = -1, {} if not is_client else {1: "head", 3: "head", 5: "head"}
    for _ in range(chance.randrange(1, 25)):
        what = chance.randrange(9)
        number = chance.choice(list(live)) if live else 0
        if what <= 2 and not is_client:
            top += chance.choice([2, 2, 4])
            fields = block([*POST, ("x", "y" * chance.randrange(50))], huffman=chance.random() < 0.5)
            cut, pad = chance.randrange(len(fields)), chance.choice([None, 0, 9])
            if chance.random() < 0.3:
                raw += headers(top, fields[:cut], done=False, pad=pad) + continuation(top, fields[cut:])
            else:
                raw += headers(
                    top, fields, pad=pad, priority=priority_fields(top - 1) if chance.random() < 0.2 else b""
                )
            live[top] = "body"
        elif what == 3:
            raw += ping(chance.randbytes(8))
        elif what == 4:
            raw += window_update(chance.choice([0, number]), chance.randrange(1, 100_000))
        elif number and live[number] == "head":
            raw += headers(number, block(OK))
            live[number] = "body"
        elif number and what in (5, 6):
            ended = chance.random() < 0.3
            raw += data(number, bytes(chance.choice([0, 1, 500])), ended, chance.choice([None, None, 3]))
            if ended:
                del live[number]
        elif number and what == 7:
            raw += headers(number, MORE, ended=True)
            del live[number]
        elif number and what == 8 and chance.random() < 0.3:
            raw += rst_stream(number)
            del live[number]
    return raw


BOTH = pytest.mark.parametrize("is_client", [False, True], ids=["server", "client"])


@BOTH
@given(st.binary(max_size=300), st.integers(0, 1 << 30))
@how(max_examples=100)
def test_random_bytes_never_raise(is_client, junk, seed):
    chance = random.Random(seed)
    hello = (b"" if is_client else PREFACE) + settings()
    for raw in (junk, hello + junk):
        survives(fuzzed(is_client), chunked(raw, chance))


@BOTH
@pytest.mark.parametrize("seed", range(40))
def test_valid_conversations_are_served(is_client, seed):
    """The generator of what is mutated below says nothing that could be refused, so its mutants get far."""
    chance = random.Random(seed)
    peer = fuzzed(is_client)
    survives(peer, chunked(valid(chance, is_client), chance))
    assert peer.failure is None


@BOTH
@given(st.integers(0, 1 << 40))
@how(max_examples=100)
def test_valid_conversations_with_mutations_never_raise(is_client, seed):
    chance = random.Random(seed)
    raw = bytearray(valid(chance, is_client))
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(min(24 * (not is_client), len(raw) - 1), len(raw))
        match chance.randrange(5):
            case 0:
                raw[at] = chance.randrange(256)
            case 1:
                raw[at] ^= 1 << chance.randrange(8)
            case 2:
                del raw[at : at + chance.randrange(1, 12)]
            case 3:
                raw[at:at] = chance.randbytes(chance.randrange(1, 12))
            case 4:
                raw[at:at] = raw[at : at + chance.randrange(1, 60)]
    survives(fuzzed(is_client), chunked(bytes(raw), chance))


def any_frame(chance: random.Random) -> bytes:
    """A frame with the right shape and the wrong content, or the other way round."""
    number = chance.choice([0, 1, 1, 1, 3, 3, 5, 7, 9, 2, 4, 2**31 - 1])
    flags = chance.choice([0, 1, 4, 5, 4, 5, 8, 0xD, 0x2D, 0x24, chance.randrange(256)])
    payload = chance.choice(
        [
            GET_BLOCK, POST_BLOCK, OK_BLOCK, MORE, MALFORMED, b"", bytes(4), bytes(5), bytes(8), bytes(6), bytes(1_000),
            b"\0\4\0\0\0\0", b"\0\4\0\1\0\0", b"\0\1\0\0\0\0", b"\0\5\0\1\0\0", b"\0\3\0\0\0\0", (1).to_bytes(4),
            MAX_WINDOW.to_bytes(4), indexed(62), literal(b"a", b"b", INDEXING), chance.randbytes(chance.randrange(30)),
        ]
    )  # fmt: skip
    return frame(chance.choice([*Kind, *Kind, 0x42]), number, payload, flags)


@BOTH
@given(st.integers(0, 1 << 40))
@how(max_examples=150)
@example(0)
def test_any_sequence_of_frames_never_raises(is_client, seed):
    chance = random.Random(seed)
    raw = (
        (b"" if is_client else PREFACE) + settings() + b"".join(any_frame(chance) for _ in range(chance.randrange(30)))
    )
    survives(fuzzed(is_client), chunked(raw, chance))


@pytest.mark.parametrize("seed", range(20))
def test_other_streams_are_served_beside_a_fuzzed_one(seed):
    """Random frames for streams 3 and up, as long as the connection bears it: stream 1 must have its answer whole."""
    chance = random.Random(seed)
    peer = Peer(limits=LIMITS, app=consume)
    peer.send(headers(1, POST_BLOCK))
    body = b""
    number = 3
    for n in range(60):
        number += 2 * (chance.random() < 0.5)
        raw = chance.choice(
            [
                headers(number, chance.choice([GET_BLOCK, POST_BLOCK, MALFORMED]), chance.random() < 0.5),
                data(number, b"x"),
                rst_stream(number),
                window_update(number, chance.choice([1, 0, MAX_WINDOW])),
                priority(number, chance.choice([0, 1, number])),
                frame(0x42, number, b"??"),
            ]
        )
        if number not in peer.connection.streams and raw[3] != Kind.HEADERS:
            continue  # an idle stream: that is the connection's matter
        if raw[3] == Kind.HEADERS and number in {stream.id for stream in peer.streams()} | {*map(rid, peer.frames)}:
            continue
        body += b"%03d" % n
        peer.send(raw, data(1, b"%03d" % n))
    peer.app = answer
    peer.send(data(1, b"", True))
    assert peer.failure is None
    assert b"".join(bytes(e.data) for e in peer.all(DataReceived) if e.stream.id == 1) == body
    assert peer.reply(1)[1:] == (BODY, True)


def rid(f: Any) -> int:
    return f.stream if f.kind == Kind.RST_STREAM else 0


def test_a_call_cut_at_every_byte_leaves_nothing_behind():
    """The connection is dropped after each byte of a call: what was received is what the bytes said, and no more."""
    raw = headers(1, POST_BLOCK, pad=3) + data(1, b"12345", pad=2) + headers(1, MORE, True)
    for cut in range(len(raw)):
        peer = Peer()
        peer.send(raw[:cut])
        body = b"".join(bytes(e.data) for e in peer.all(DataReceived))
        assert b"12345".startswith(body)
        assert not peer.all(TrailersReceived)
        assert not peer.all(StreamReset)
        assert len(peer.connection.streams) == (cut >= len(headers(1, POST_BLOCK, pad=3)))


def test_frames_with_flags_that_mean_nothing_are_read_as_without_them():
    meaningless = {
        Kind.DATA: 0xF6,
        Kind.RST_STREAM: 0xFF,
        Kind.PING: 0xFE,
        Kind.WINDOW_UPDATE: 0xFF,
        Kind.PRIORITY: 0xFF,
    }
    peer = Peer(app=answer)
    peer.send(
        headers(1, POST_BLOCK),
        frame(Kind.WINDOW_UPDATE, 1, (5).to_bytes(4), meaningless[Kind.WINDOW_UPDATE]),
        frame(Kind.PRIORITY, 1, bytes(5), meaningless[Kind.PRIORITY]),
        frame(Kind.PING, 0, bytes(8), meaningless[Kind.PING]),
        frame(Kind.DATA, 1, b"x", meaningless[Kind.DATA]),
        data(1, b"", True),
        frame(Kind.HEADERS, 3, GET_BLOCK, END_HEADERS | 1 | 0xD2),
        frame(Kind.HEADERS, 5, POST_BLOCK, END_HEADERS | 0xD2),
        frame(Kind.RST_STREAM, 5, bytes(4), meaningless[Kind.RST_STREAM]),
    )
    assert peer.failure is None
    assert peer.reply(1)[1:] == peer.reply(3)[1:] == (BODY, True)
    assert told(peer.events)[-1] == ("reset", 5, 0, True)
