"""A Connection and a peer that keeps the rules: flow control, order, limits, ends; h2 as second opinion."""

import random
import sys
from itertools import pairwise

import pytest
from frames import (
    ACK,
    BODY,
    END_HEADERS,
    END_STREAM,
    GET,
    OK,
    POST,
    PREFACE,
    SETTINGS_ACK,
    Code,
    Frame,
    Kind,
    Peer,
    Set,
    Windows,
    answer,
    apart,
    block,
    consume,
    continuation,
    data,
    goaway,
    headers,
    ping,
    read_frames,
    rst_stream,
    settings,
    told,
    window_update,
)
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived as H2Data,
)
from h2.events import (
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    WindowUpdated,
)
from h2.events import StreamReset as H2Reset
from h2.events import TrailersReceived as H2Trailers
from h2.settings import SettingCodes
from hpack import Decoder as HpackDecoder
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cube.errors import BadConfig
from cube.rpc.headers import encode
from cube.rpc.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    GoAwayReceived,
    HeadersReceived,
    PingAcked,
    Refused,
    SettingsReceived,
    State,
    StreamReset,
    StreamWritable,
    Template,
    TrailersReceived,
)
from cube.rpc.http2 import RequestReceived as WholeRequest
from cube.rpc.http2 import ResponseReceived as WholeResponse
from cube.rpc.limits import Limits

GET_BLOCK, POST_BLOCK, OK_BLOCK, MORE = block(GET), block(POST), block(OK), block([("x-dummy", "one")])
OK_SENT = encode([(b":status", b"200"), (b"content-type", b"text/plain")])
TRAILERS_SENT = encode([(b"grpc-status", b"0")])
PATTERN = bytes(range(251)) * 4_000  # no two places that frames could be confused at look alike


def opened(is_client=False, **options):
    """A peer, and stream 1 of its Connection, open both ways; the head of our half has been sent."""
    peer = Peer(is_client=is_client, **options)
    if is_client:
        return peer, peer.open()
    peer.send(headers(1, POST_BLOCK))
    stream = peer.connection.streams[1]
    peer.connection.send_headers(stream, OK_SENT)
    peer.heard()
    return peer, stream


BOTH = pytest.mark.parametrize("is_client", [False, True], ids=["server", "client"])


# Sending: the peer's windows


class Sending(RuleBasedStateMachine):
    """The slow twin: windows as plain integers. What is heard must fit them, be in order, and be all that fits."""

    @initialize(is_client=st.booleans(), initial=st.sampled_from([None, 0, 1, 100, 70_000]))
    def start(self, is_client, initial):
        self.peer = Peer(is_client=is_client, greeting=((Set.INITIAL_WINDOW, initial),) if initial is not None else ())
        self.initial = 65_535 if initial is None else initial
        self.connection, self.frame, self.heard = 65_535, 16_384, len(self.peer.frames)
        self.streams, self.window, self.queued, self.got, self.ending, self.ended = {}, {}, {}, {}, {}, {}

    def alive(self):
        return [number for number in self.streams if not self.ending[number] and number not in self.gone()]

    def gone(self):
        return {number for number, stream in self.streams.items() if stream.state is State.CLOSED}

    @precondition(lambda self: len(self.streams) < 4)
    @rule()
    def open(self):
        number = 2 * len(self.streams) + 1
        if self.peer.is_client:
            stream = self.peer.open()
        else:
            self.peer.send(headers(number, POST_BLOCK))
            stream = self.peer.connection.streams[number]
            self.peer.connection.send_headers(stream, OK_SENT)
        assert stream.id == number
        self.streams[number], self.window[number] = stream, self.initial
        self.queued[number], self.got[number], self.ending[number], self.ended[number] = b"", b"", "", False

    @precondition(lambda self: self.alive())
    @rule(choice=st.data(), sizes=st.lists(st.sampled_from([0, 0, 1, 5, 100, 16_384, 16_385, 50_000]), max_size=3))
    def send(self, choice, sizes):
        number = choice.draw(st.sampled_from(self.alive()))
        ended = choice.draw(st.sampled_from([False, False, True]))
        parts, at = [], len(self.queued[number])
        for size in sizes:
            kind = choice.draw(st.sampled_from([bytes, bytearray, memoryview]))
            parts.append(kind(PATTERN[at : at + size]))
            at += size
        self.queued[number] = PATTERN[:at]
        self.ending[number] = "data" if ended else ""
        self.peer.connection.send_data(self.streams[number], parts, ended)

    @precondition(lambda self: self.alive())
    @rule(choice=st.data())
    def trailers(self, choice):
        number = choice.draw(st.sampled_from(self.alive()))
        self.ending[number] = "trailers"
        self.peer.connection.send_trailers(self.streams[number], TRAILERS_SENT)

    @rule(more=st.sampled_from([1, 7, 1_000, 30_000, 200_000]))
    def enlarge_connection(self, more):
        self.connection += more
        self.receive(window_update(0, more))

    @precondition(lambda self: self.streams)
    @rule(choice=st.data(), more=st.sampled_from([1, 7, 1_000, 30_000, 200_000]))
    def enlarge_stream(self, choice, more):
        number = choice.draw(st.sampled_from(sorted(self.streams)))
        self.window[number] += more
        self.receive(window_update(number, more))

    @rule(initial=st.sampled_from([0, 1, 2, 100, 20_000, 65_535, 100_000]))
    def change_initial_window(self, initial):
        for number in self.window:
            self.window[number] += initial - self.initial
        self.initial = initial
        self.receive(settings((Set.INITIAL_WINDOW, initial)))

    @rule(size=st.sampled_from([16_384, 16_385, 40_000, (1 << 24) - 1]))
    def change_frame_size(self, size):
        self.frame = size
        self.receive(settings((Set.MAX_FRAME, size)))

    @precondition(lambda self: self.alive())
    @rule(choice=st.data(), by_peer=st.booleans())
    def reset(self, choice, by_peer):
        number = choice.draw(st.sampled_from(self.alive()))
        if by_peer:
            self.receive(rst_stream(number))
        else:
            self.peer.connection.reset(self.streams[number], ErrorCode.CANCEL)

    def receive(self, raw):
        busy = {number for number, stream in self.streams.items() if stream.pending}
        events = self.peer.send(raw)
        assert self.peer.failure is None
        writable = [event.stream.id for event in events if isinstance(event, StreamWritable)]
        assert len(set(writable)) == len(writable)
        drained = {n for n in busy if not self.streams[n].pending and self.streams[n].state is not State.CLOSED}
        assert {number for number in drained if not self.ending[number]} <= set(writable) <= busy
        assert not [number for number in writable if self.streams[number].pending]

    @invariant()
    def what_was_heard_was_allowed_and_nothing_more_would_be(self):
        self.peer.heard()
        for f in self.peer.frames[self.heard :]:
            if f.kind == Kind.DATA:
                size = len(f.payload)
                assert size <= self.frame
                assert size <= max(0, min(self.connection, self.window[f.stream]))
                assert not self.ended[f.stream]
                assert f.payload == self.queued[f.stream][len(self.got[f.stream]) :][:size]
                self.connection -= size
                self.window[f.stream] -= size
                self.got[f.stream] += f.payload
            if f.ended:
                assert self.got[f.stream] == self.queued[f.stream]
                assert self.ending[f.stream] == ("data" if f.kind == Kind.DATA else "trailers")
                assert not self.ended[f.stream]
                self.ended[f.stream] = True
        self.heard = len(self.peer.frames)
        gone = self.gone()
        assert self.peer.connection.pending == sum(stream.pending for stream in self.streams.values())
        for number, stream in self.streams.items():
            left = len(self.queued[number]) - len(self.got[number])
            if number in gone:
                assert stream.pending == 0
                continue
            assert stream.pending == left
            assert not left or min(self.connection, self.window[number]) <= 0, "data waits though it may go"
            assert bool(self.ending[number]) == self.ended[number] or left

    def teardown(self):
        if sys.exc_info()[0] or not hasattr(self, "peer"):
            return  # a rule has failed: that is the news
        self.change_initial_window(1_000_000)
        self.enlarge_connection(100_000_000)
        self.what_was_heard_was_allowed_and_nothing_more_would_be()
        for number in set(self.streams) - self.gone():
            assert self.got[number] == self.queued[number]
            assert self.ended[number] == bool(self.ending[number])


def test_data_is_sent_in_order_and_all_of_it_and_as_soon_as_the_windows_allow():
    run_state_machine_as_test(Sending, settings=how(max_examples=100, stateful_step_count=25, deadline=None))


@BOTH
def test_data_beyond_the_windows_waits_and_is_counted(is_client):
    peer, stream = opened(is_client)
    peer.connection.send_data(stream, [PATTERN[:100_000]])
    peer.heard()
    assert stream.pending == 100_000 - 65_535
    peer.send(window_update(0, 10_000), window_update(1, 10_000))
    assert stream.pending == 100_000 - 75_535
    events = peer.send(window_update(0, 100_000), window_update(1, 100_000))
    assert stream.pending == 0
    assert events == [StreamWritable(stream)]
    assert b"".join(f.payload for f in peer.of(Kind.DATA)) == PATTERN[:100_000]


@BOTH
@pytest.mark.parametrize("size", [16_384, 16_385, 1 << 20, (1 << 24) - 1])
def test_frames_are_as_large_as_the_peer_allows_and_no_larger(is_client, size):
    peer, stream = opened(is_client, greeting=((Set.MAX_FRAME, size), (Set.INITIAL_WINDOW, 1 << 30)))
    peer.send(window_update(0, 1 << 30))
    body = bytes(3 << 20)
    peer.connection.send_data(stream, [body])
    peer.heard()
    sizes = [len(f.payload) for f in peer.of(Kind.DATA)]
    assert sizes == [min(size, len(body) - at) for at in range(0, len(body), size)]


@BOTH
def test_buffers_of_one_message_are_sent_without_a_copy(is_client):
    peer, stream = opened(is_client, greeting=((Set.MAX_FRAME, 1 << 20), (Set.INITIAL_WINDOW, 1 << 20)))
    peer.send(window_update(0, 1 << 20))
    parts = [b"head", bytearray(b"x" * 50_000), memoryview(b"y" * 50_000)]
    peer.connection.send_data(stream, parts, ended=True)
    out = peer.connection.take()
    for part in parts:
        assert any(piece is part or (isinstance(piece, memoryview) and piece.obj is part) for piece in out)
    assert b"".join(out)[9:] == b"head" + b"x" * 50_000 + b"y" * 50_000


@pytest.mark.parametrize("size", [10, 16_383, 16_384, 16_385, 2 * 16_384 - 1, 2 * 16_384, 2 * 16_384 + 1, 70_000])
def test_a_block_larger_than_the_peers_frames_is_continued(size):
    peer = Peer()
    peer.send(headers(1, POST_BLOCK))
    stream = peer.connection.streams[1]
    value = b"v" * size
    while len(encode([(b":status", b"200"), (b"x", value)])) > size > 100:
        value = value[1:]
    raw = encode([(b":status", b"200"), (b"x", value)])
    assert len(raw) == size or size < 100
    peer.connection.send_headers(stream, raw, ended=True)
    peer.heard()
    parts = [f for f in peer.frames if f.kind in (Kind.HEADERS, Kind.CONTINUATION)]
    assert all(0 < len(f.payload) <= 16_384 for f in parts)
    assert all(f.flags in (0, END_HEADERS) for f in parts[1:])
    assert [f.kind for f in parts] == [Kind.HEADERS] + [Kind.CONTINUATION] * (len(parts) - 1)
    assert [bool(f.flags & END_HEADERS) for f in parts] == [False] * (len(parts) - 1) + [True]
    assert [f.ended for f in parts] == [True] + [False] * (len(parts) - 1)
    assert peer.reply(1)[0][0][b"x"] == value


@BOTH
def test_trailers_wait_for_the_data_before_them(is_client):
    peer, stream = opened(is_client, greeting=((Set.INITIAL_WINDOW, 4),))
    peer.connection.send_data(stream, [b"123456"])
    peer.connection.send_trailers(stream, TRAILERS_SENT)
    peer.heard()
    assert not peer.reply(1)[2]
    peer.send(window_update(1, 1))
    assert not peer.reply(1)[2]
    peer.send(window_update(1, 1))
    assert peer.frames[-1] == Frame(Kind.HEADERS, END_STREAM | END_HEADERS, 1, TRAILERS_SENT)
    assert peer.reply(1)[1:] == (b"123456", True)


@BOTH
@pytest.mark.parametrize("used", [0, 1], ids=["zero", "negative"])
def test_an_end_without_data_needs_no_window(is_client, used):
    peer, stream = opened(is_client, greeting=((Set.INITIAL_WINDOW, used),))
    peer.connection.send_data(stream, [bytes(used)])
    peer.send(settings((Set.INITIAL_WINDOW, 0)))
    peer.connection.send_data(stream, [], ended=True)
    peer.heard()
    assert peer.frames[-1] == Frame(Kind.DATA, END_STREAM, 1, b"")
    assert stream.pending == 0


@BOTH
@pytest.mark.parametrize("used", [0, 1], ids=["zero", "negative"])
def test_sending_nothing_changes_nothing_whatever_the_window(is_client, used):
    peer, stream = opened(is_client, greeting=((Set.INITIAL_WINDOW, used),))
    peer.connection.send_data(stream, [bytes(used)])
    peer.send(settings((Set.INITIAL_WINDOW, 0)))
    before = len(peer.frames)
    peer.connection.send_data(stream, [])
    peer.connection.send_data(stream, [b"", memoryview(b"")])
    peer.heard()
    assert len(peer.frames) == before
    assert peer.send(settings((Set.INITIAL_WINDOW, 9))) == [SettingsReceived()]
    peer.connection.send_trailers(stream, TRAILERS_SENT)
    peer.heard()
    assert peer.frames[-1] == Frame(Kind.HEADERS, END_STREAM | END_HEADERS, 1, TRAILERS_SENT)


REPLIES = [[], [b""], [b"x"], [b"1234", b"", b"5" * 60], [b"y" * 16_384], [b"z" * 16_385], [b"w" * 70_000]]


@pytest.mark.parametrize("body", REPLIES, ids=lambda parts: str(sum(map(len, parts))))
@pytest.mark.parametrize("pairs", [(), ((4, 0),), ((4, 10),), ((1, 0),), ((5, 1 << 20), (4, 1 << 20))], ids=str)
@pytest.mark.parametrize("ended", [True, False], ids=["half-closed", "open"])
def test_a_whole_reply_is_what_its_parts_would_be(body, pairs, ended):
    """`respond` is a short way: what is heard, the windows and the end must be those of the long way."""
    heard = []
    for short in (True, False):
        peer = Peer(greeting=pairs)
        peer.send(headers(1, GET_BLOCK, ended), data(1, b"request", True) if not ended else b"")
        stream, connection = peer.streams()[0], peer.connection
        if short:
            connection.respond(stream, Template(OK_SENT, TRAILERS_SENT), list(body), sum(map(len, body)))
        else:
            connection.send_headers(stream, OK_SENT)
            connection.send_data(stream, body)
            connection.send_trailers(stream, TRAILERS_SENT)
        peer.send(window_update(1, 1 << 20), window_update(0, 1 << 20), headers(3, GET_BLOCK, True))
        follower = peer.streams()[1]
        connection.send_headers(follower, OK_SENT)
        connection.send_data(follower, [bytes(2_000_000)])
        peer.heard()
        frames = [f for f in peer.frames if f.kind in (Kind.HEADERS, Kind.DATA)]
        heard.append((frames, stream.state, stream.pending, follower.pending, set(connection.streams)))
    assert heard[0] == heard[1]
    assert heard[0][1] is State.CLOSED
    assert peer.reply(1)[1:] == (b"".join(body), True)


def test_a_whole_reply_to_a_stream_that_is_gone_goes_nowhere():
    peer, stream = opened()
    peer.send(rst_stream(1))
    before = len(peer.frames)
    peer.connection.respond(stream, Template(OK_SENT, TRAILERS_SENT), [b"x"], 1)
    peer.heard()
    assert len(peer.frames) == before


def test_a_whole_reply_before_the_request_has_ended_leaves_the_rest_of_it_to_be_received():
    peer = Peer()
    peer.send(headers(1, POST_BLOCK))
    stream = peer.streams()[0]
    peer.connection.respond(stream, Template(OK_SENT, TRAILERS_SENT), [b"x"], 1)
    assert stream.state is State.HALF_CLOSED_LOCAL
    peer.send(data(1, b"more", True))
    assert told(peer.events)[-1] == ("data", 1, b"more", True)
    assert stream.state is State.CLOSED
    assert peer.reply(1)[1:] == (b"x", True)


def test_streams_that_wait_for_the_connection_take_turns():
    peer = Peer(greeting=((Set.INITIAL_WINDOW, 1 << 20),))
    peer.send(*(headers(number, GET_BLOCK, ended=True) for number in (1, 3, 5)))
    for stream in peer.streams():
        peer.connection.send_headers(stream, OK_SENT)
        peer.connection.send_data(stream, [bytes(200_000)], ended=True)
    peer.heard()
    before = len(peer.frames)
    peer.send(window_update(0, 6 * 16_384))
    sent = [f.stream for f in peer.frames[before:]]
    assert sorted(sent[:3]) == [1, 3, 5]
    assert sorted(sent) == [1, 1, 3, 3, 5, 5]


def test_a_stream_without_a_window_does_not_hold_up_the_others():
    peer = Peer(greeting=((Set.INITIAL_WINDOW, 10),))
    peer.send(headers(1, GET_BLOCK, ended=True), headers(3, GET_BLOCK, ended=True))
    for stream in peer.streams():
        peer.connection.send_headers(stream, OK_SENT)
        peer.connection.send_data(stream, [BODY], ended=True)
    peer.send(window_update(3, 100))
    assert peer.reply(3)[1:] == (BODY, True)
    assert peer.reply(1)[1:] == (BODY[:10], False)


def test_a_reset_drops_what_is_queued():
    peer, stream = opened()
    peer.connection.send_data(stream, [bytes(100_000)])
    peer.send(rst_stream(1))
    assert stream.pending == 0
    before = len(peer.of(Kind.DATA))
    peer.send(window_update(0, 1 << 20))
    assert len(peer.of(Kind.DATA)) == before


def test_what_is_sent_on_a_stream_that_the_peer_has_reset_goes_nowhere():
    peer, stream = opened()
    peer.send(rst_stream(1))
    before = len(peer.frames)
    peer.connection.send_data(stream, [b"x"])
    peer.connection.send_trailers(stream, TRAILERS_SENT)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.connection.consumed(stream, 0)
    peer.heard()
    assert len(peer.frames) == before


# Receiving: our windows


SMALL = Limits(window_bytes=65_536, frame_bytes=16_384)


@BOTH
@pytest.mark.parametrize("size", [1, 1_000, 16_384])
def test_a_long_transfer_never_stalls_while_it_is_consumed(is_client, size):
    peer, _ = opened(is_client, limits=SMALL, app=consume)
    if is_client:
        peer.send(headers(1, OK_BLOCK))
    windows = Windows(peer)
    for _ in range(max(100, 600_000 // size) if size > 1 else 3_000):
        windows.send(1, PATTERN[:size])
    assert windows.room() <= SMALL.window_bytes
    assert windows.room(1) <= SMALL.window_bytes


def test_credit_is_given_back_in_large_pieces():
    peer, _ = opened(limits=SMALL, app=consume)
    windows = Windows(peer)
    for _ in range(1_000):
        windows.send(1, bytes(1_000))
    assert len(peer.of(Kind.WINDOW_UPDATE)) < 2 * 1_000_000 // (SMALL.window_bytes // 4)


def test_who_does_not_consume_is_sent_no_more_than_a_window():
    peer, stream = opened(limits=SMALL)
    windows, sent = Windows(peer), 0
    while size := min(windows.room(1), 16_384):
        windows.send(1, bytes(size))
        sent += size
    assert sent == SMALL.window_bytes
    for _ in range(4):
        peer.connection.consumed(stream, sent // 4)
    peer.heard()
    assert windows.room(1) == SMALL.window_bytes


def test_padding_is_credited_by_the_connection_itself():
    peer, _ = opened(limits=SMALL, app=consume)
    windows = Windows(peer)
    for _ in range(2_000):
        windows.send(1, b"x", pad=255)
    assert windows.room() <= SMALL.window_bytes


def test_data_of_streams_that_we_have_reset_is_credited():
    peer, stream = opened(limits=SMALL)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    windows = Windows(peer)
    windows.initial = 1 << 30  # the connection's window is what this is about
    for _ in range(50):
        windows.send(1, bytes(16_384))
    assert not peer.all(DataReceived)
    assert 0 < windows.room() <= SMALL.window_bytes


@pytest.mark.parametrize("end", ["reset by the peer", "reset by us", "malformed"])
def test_a_stream_that_ends_early_gives_back_what_nobody_will_consume(end):
    peer = Peer(limits=SMALL)
    windows = Windows(peer)
    for number in range(1, 41, 2):
        peer.send(headers(number, block([*POST, ("content-length", "16384")])))
        windows.send(number, bytes(16_000), pad=83)
        stream = peer.connection.streams[number]
        if end == "reset by the peer":
            peer.send(rst_stream(number))
        elif end == "reset by us":
            peer.connection.reset(stream, ErrorCode.CANCEL)
        else:
            windows.send(number, bytes(1_000))
            assert peer.resets(number) == [Code.PROTOCOL_ERROR]
        peer.connection.consumed(stream, 16_000)  # the layer above may do so late
        peer.heard()
        assert windows.room() <= SMALL.window_bytes
    assert peer.failure is None


def test_what_is_consumed_after_the_end_of_a_stream_is_credited_to_the_connection():
    peer = Peer(limits=SMALL)
    windows = Windows(peer)
    for number in range(1, 81, 2):
        peer.send(headers(number, POST_BLOCK))
        stream = peer.connection.streams[number]
        windows.send(number, bytes(16_000), ended=True)
        if number % 4 == 1:
            peer.connection.consumed(stream, 16_000)
        peer.connection.send_headers(stream, OK_SENT, ended=True)
        peer.connection.consumed(stream, 16_000 * (number % 4 == 3))
        peer.heard()
        assert windows.room() <= SMALL.window_bytes


def test_a_whole_reply_gives_back_what_was_not_consumed():
    peer = Peer(limits=SMALL)
    windows = Windows(peer)
    for number in range(1, 81, 2):
        peer.send(headers(number, POST_BLOCK))
        windows.send(number, bytes(16_000), ended=True)
        stream = peer.connection.streams[number]
        peer.connection.respond(stream, Template(OK_SENT, TRAILERS_SENT), [b"x"], 1)
        peer.connection.consumed(stream, 16_000)
        peer.heard()
        peer.send(window_update(0, 1))
        assert windows.room() <= SMALL.window_bytes


@pytest.mark.parametrize("over", [0, 1])
def test_a_stream_window_counts_also_where_the_connection_has_room(over):
    peer = Peer(limits=Limits(window_bytes=65_536, frame_bytes=65_536), app=consume)
    windows = Windows(peer)
    for number in (1, 3):
        peer.send(headers(number, POST_BLOCK))
        windows.send(number, bytes(20_000))
    room = windows.room(1)
    assert room < windows.room()
    peer.send(data(1, bytes(room + over)))
    assert (peer.resets(1), peer.failure) in ([([], None)], [([Code.FLOW_CONTROL_ERROR], None)])[over]
    peer.send(data(3, b"x"))
    assert peer.failure is None


def test_more_than_the_stream_window_is_flow_control_error():
    peer, _ = opened(limits=Limits(window_bytes=65_536, frame_bytes=1 << 17))
    peer.send(data(1, bytes(65_537)))
    assert Code.FLOW_CONTROL_ERROR in (peer.failure, *peer.resets(1))
    assert not peer.all(DataReceived)


def test_more_than_the_connection_window_is_flow_control_error():
    """Credit for the connection is given as data comes in, so only a frame that is larger than the window can do it."""
    peer = Peer(limits=Limits(window_bytes=65_535, frame_bytes=1 << 20))
    peer.send(headers(1, POST_BLOCK), data(1, bytes(65_536)))
    assert peer.failure == Code.FLOW_CONTROL_ERROR
    assert not peer.all(DataReceived)


def test_data_of_another_stream_inside_a_header_block_is_a_protocol_error():
    peer = Peer()
    peer.send(headers(1, POST_BLOCK))
    peer.send(headers(3, POST_BLOCK[:2], done=False), data(1, b"x"))
    assert peer.failure == Code.PROTOCOL_ERROR


def test_a_window_smaller_than_the_one_a_client_may_use_unasked_is_refused():
    """RFC 9113 §6.9.3: what was sent before our SETTINGS were processed must be taken, although it exceeds them."""
    with pytest.raises(BadConfig, match="window_bytes"):
        Limits(window_bytes=65_534)


def test_data_of_one_stream_that_nobody_consumes_does_not_hold_up_another():
    peer = Peer(limits=Limits(window_bytes=65_536, frame_bytes=16_384))
    peer.send(headers(1, POST_BLOCK), *[data(1, bytes(16_384))] * 4, headers(3, POST_BLOCK))
    peer.send(*[data(3, bytes(16_384))] * 4)
    assert peer.failure is None
    assert not peer.resets(1) + peer.resets(3)


def test_the_body_of_a_refused_request_is_ignored_and_credited():
    peer = Peer(limits=Limits(streams=1, window_bytes=65_536, frame_bytes=16_384, useless_frames=20))
    peer.send(headers(1, POST_BLOCK), headers(3, POST_BLOCK))
    windows = Windows(peer)
    windows.initial = 1 << 30
    for _ in range(50):
        windows.send(3, bytes(16_384))
    peer.send(headers(3, MORE, ended=True))
    assert peer.resets(3) == [Code.REFUSED_STREAM]
    assert not peer.all(DataReceived)
    assert peer.answers_pings()


def test_padding_counts_against_the_window():
    peer, _ = opened(limits=SMALL)
    for _ in range(3):
        peer.send(data(1, bytes(16_384)))
    peer.send(data(1, bytes(16_383)), data(1, b"", pad=1))
    assert Code.FLOW_CONTROL_ERROR in (peer.failure, *peer.resets(1))


# Life of a connection


def test_a_client_opens_odd_streams_in_order_as_many_as_the_peer_allows():
    peer = Peer(is_client=True, greeting=((Set.MAX_STREAMS, 2),))
    connection = peer.connection
    first, second = peer.open(), peer.open()
    assert (first.id, second.id) == (1, 3)
    assert set(connection.streams) == {1, 3}
    assert not connection.can_open
    with pytest.raises(Refused):
        peer.open()
    peer.send(headers(1, OK_BLOCK, ended=True))
    assert not connection.can_open  # our half is still open
    connection.send_data(first, [], ended=True)
    assert connection.can_open
    assert peer.open().id == 5
    peer.send(settings((Set.MAX_STREAMS, 3)))
    assert peer.open().id == 7
    peer.send(settings((Set.MAX_STREAMS, 0)))
    assert not connection.can_open
    peer.send(rst_stream(3), rst_stream(5), rst_stream(7), settings((Set.MAX_STREAMS, 1)))
    assert connection.can_open


def test_a_refused_open_changes_nothing():
    peer = Peer(is_client=True, greeting=((Set.MAX_STREAMS, 0),))
    before = len(peer.frames)
    with pytest.raises(Refused):
        peer.open()
    peer.heard()
    assert len(peer.frames) == before
    assert not peer.connection.streams


@BOTH
def test_states_follow_the_rfc(is_client):
    peer, stream = opened(is_client)
    assert stream.state is State.OPEN
    if is_client:
        peer.send(headers(1, OK_BLOCK))
    peer.connection.send_data(stream, [b"x"], ended=True)
    assert stream.state is State.HALF_CLOSED_LOCAL
    peer.send(data(1, b"y", ended=True))
    assert stream.state is State.CLOSED
    assert not peer.connection.streams

    peer, stream = opened(is_client)
    if is_client:
        peer.send(headers(1, OK_BLOCK))
    peer.send(data(1, b"y", ended=True))
    assert stream.state is State.HALF_CLOSED_REMOTE
    peer.connection.send_trailers(stream, TRAILERS_SENT)
    assert stream.state is State.CLOSED
    assert not peer.connection.streams


@BOTH
def test_a_reset_by_the_peer_is_told_once(is_client):
    peer, stream = opened(is_client)
    assert peer.send(rst_stream(1, Code.CANCEL)) == [StreamReset(stream, Code.CANCEL, True)]
    assert peer.send(rst_stream(1, Code.CANCEL)) == []
    assert stream.state is State.CLOSED
    assert not peer.connection.streams


@BOTH
@pytest.mark.parametrize("order", [1, -1], ids=["oldest first", "newest first"])
def test_late_frames_of_many_streams_that_we_have_reset_at_once_are_ignored(is_client, order):
    """A process that gives up all its calls (a deadline, a drain): what was under way is no fault of the peer's."""
    peer = Peer(is_client=is_client, limits=Limits(streams=5_000, useless_frames=1_000))
    numbers = range(1, 6_001, 2)
    for number in numbers:
        peer.connection.open_stream(OK_SENT, True) if is_client else peer.send(headers(number, POST_BLOCK))
    for stream in list(peer.connection.streams.values())[::order]:
        peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.connection.renew()
    for number in numbers:
        peer.send(headers(number, OK_BLOCK) if is_client else b"", data(number, b"late", ended=True))
    assert peer.failure is None
    assert len(peer.of(Kind.RST_STREAM)) == len(numbers)


@BOTH
def test_our_reset_is_sent_once_and_told_to_nobody(is_client):
    peer, stream = opened(is_client)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.heard()
    assert peer.resets(1) == [Code.CANCEL]
    assert peer.send(data(1, b"late"), rst_stream(1)) == []
    assert peer.answers_pings()


def test_pings_of_ours_come_back():
    peer = Peer(is_client=True)
    peer.connection.ping(b"\0\1\2\3\4\5\6\7")
    peer.heard()
    assert peer.frames[-1] == Frame(Kind.PING, 0, 0, b"\0\1\2\3\4\5\6\7")
    assert peer.send(ping(b"\0\1\2\3\4\5\6\7", ack=True)) == [PingAcked(b"\0\1\2\3\4\5\6\7")]


def test_every_settings_frame_is_acknowledged_and_told_and_an_acknowledgement_is_not():
    peer = Peer(greeting=())
    assert peer.events == [SettingsReceived()]
    assert peer.send(settings((Set.MAX_STREAMS, 5)), SETTINGS_ACK, settings()) == [SettingsReceived()] * 2
    assert [f.flags for f in peer.of(Kind.SETTINGS)] == [0, ACK, ACK, ACK]


def test_repeated_settings_are_checked_one_by_one():
    peer = Peer()
    peer.send(settings((Set.MAX_FRAME, 1), (Set.MAX_FRAME, 16_384)))
    assert peer.failure == Code.PROTOCOL_ERROR


def test_a_server_that_goes_away_serves_what_it_has_and_nothing_newer():
    peer = Peer(app=answer)
    peer.send(headers(1, POST_BLOCK), headers(3, POST_BLOCK))
    peer.connection.goaway()
    peer.heard()
    assert peer.frames[-1] == Frame(Kind.GOAWAY, 0, 0, (3).to_bytes(4) + bytes(4))
    peer.send(headers(5, block([*GET, ("x-a", "b")]), ended=True))
    assert [stream.id for stream in peer.streams()] == [1, 3]
    peer.send(data(1, b"", ended=True), data(3, b"x"), headers(3, MORE, ended=True))
    assert peer.reply(1)[1:] == peer.reply(3)[1:] == (BODY, True)
    assert not peer.connection.streams
    assert peer.failure is None


def test_frames_of_a_stream_that_came_after_goaway_are_ignored_and_credited():
    peer = Peer(limits=SMALL)
    peer.connection.goaway()
    peer.send(headers(1, POST_BLOCK))
    windows = Windows(peer)
    windows.initial = 1 << 30
    for _ in range(10):
        windows.send(1, bytes(16_384))
    peer.send(window_update(1, 5), headers(1, MORE, ended=True))
    assert not peer.all(HeadersReceived)
    assert peer.failure is None
    assert peer.answers_pings()


def test_a_graceful_goaway_lets_in_what_was_on_its_way():
    peer = Peer(app=answer)
    peer.connection.goaway(last_stream_id=2**31 - 1)
    peer.send(headers(1, GET_BLOCK, ended=True))
    assert peer.reply(1)[1:] == (BODY, True)
    peer.connection.goaway(text=b"bye")
    peer.send(headers(3, GET_BLOCK, ended=True))
    first, second = peer.of(Kind.GOAWAY)
    assert int.from_bytes(first.payload[:4]) == 2**31 - 1
    assert second.payload == (1).to_bytes(4) + bytes(4) + b"bye"
    assert [stream.id for stream in peer.streams()] == [1]


def test_streams_up_to_the_announced_one_are_served():
    peer = Peer(app=answer)
    peer.connection.goaway(last_stream_id=3)
    peer.send(*(headers(number, GET_BLOCK, ended=True) for number in (1, 3, 5)))
    assert [stream.id for stream in peer.streams()] == [1, 3]
    assert peer.reply(3)[1:] == (BODY, True)


def test_the_last_stream_of_goaway_never_grows():
    peer = Peer()
    peer.send(headers(1, POST_BLOCK))
    peer.connection.goaway()
    peer.send(headers(3, POST_BLOCK))
    peer.connection.goaway()
    peer.send(data(0))
    assert [int.from_bytes(f.payload[:4]) for f in peer.of(Kind.GOAWAY)] == [1, 1, 1]


def test_a_client_that_is_told_goaway_opens_no_more_and_knows_which_calls_were_not_seen():
    peer = Peer(is_client=True, app=consume)
    streams = [peer.open(GET, ended=True) for _ in range(3)]
    peer.send(goaway(3, Code.NO_ERROR, b"restart"))
    assert peer.all(GoAwayReceived) == [GoAwayReceived(3, Code.NO_ERROR, b"restart")]
    assert not peer.connection.can_open
    with pytest.raises(Refused):
        peer.open()
    assert peer.all(StreamReset) == [StreamReset(streams[2], Code.REFUSED_STREAM, True)]
    assert set(peer.connection.streams) == {1, 3}
    peer.send(headers(1, OK_BLOCK, ended=True), headers(3, OK_BLOCK), data(3, b"x", ended=True))
    assert [kind for kind, *_ in told(peer.events) if kind in ("head", "data")] == ["head", "head", "data"]
    assert peer.failure is None


def test_a_client_whose_server_goes_away_in_two_steps_loses_nothing_at_the_first():
    peer = Peer(is_client=True)
    peer.open(GET, ended=True)
    peer.send(goaway(2**31 - 1))
    assert set(peer.connection.streams) == {1}
    assert not peer.connection.can_open
    peer.send(goaway(1), headers(1, OK_BLOCK, ended=True))
    assert len(peer.all(HeadersReceived)) == 1


def test_a_client_that_goes_away_opens_no_more():
    peer = Peer(is_client=True)
    peer.open(GET, ended=True)
    peer.connection.goaway()
    assert not peer.connection.can_open
    peer.send(headers(1, OK_BLOCK, ended=True))
    assert len(peer.all(HeadersReceived)) == 1


def test_a_failed_connection_says_nothing_more_whatever_is_asked_of_it():
    peer, stream = opened()
    peer.send(data(0))
    connection, before = peer.connection, len(peer.frames)
    connection.send_headers(stream, OK_SENT)
    connection.send_data(stream, [b"x"], ended=True)
    connection.send_trailers(stream, TRAILERS_SENT)
    connection.consumed(stream, 0)
    connection.reset(stream, ErrorCode.CANCEL)
    connection.ping(b"12345678")
    connection.goaway()
    connection.renew()
    assert connection.receive(ping()) == []
    peer.heard()
    assert len(peer.frames) == before
    assert not connection.can_open


def test_the_events_of_a_failure_name_every_stream_that_is_lost():
    peer = Peer()
    peer.send(headers(1, POST_BLOCK), headers(3, GET_BLOCK, ended=True))
    events = peer.send(data(0))
    assert isinstance(events[-1], ConnectionFailed)
    assert {event.stream.id for event in events[:-1]} in ({1, 3}, set())
    assert not peer.connection.streams


# Compression tables that the peer shrinks


@pytest.mark.parametrize(
    "sizes",
    [(0,), (100,), (4_096,), (65_536,), (0, 4_096), (4_096, 0), (50, 8_192, 60), (100, 100)],
    ids=str,
)
@pytest.mark.parametrize("in_one_frame", [False, True], ids=["frames", "one frame"])
def test_a_peer_that_changes_its_table_is_told_that_we_know(sizes, in_one_frame):
    """RFC 7541 §4.2: the first block after the acknowledgement must signal the smallest size, and then the last."""
    peer = Peer()
    peer.send(headers(1, GET_BLOCK, ended=True), headers(3, GET_BLOCK, ended=True))
    pairs = [(Set.HEADER_TABLE_SIZE, size) for size in sizes]
    peer.send(*([settings(*pairs)] if in_one_frame else [settings(pair) for pair in pairs]))
    for stream in peer.streams():
        peer.connection.send_headers(stream, OK_SENT)
        peer.connection.send_trailers(stream, TRAILERS_SENT)
    peer.heard()
    blocks = [f.payload for f in peer.of(Kind.HEADERS)]
    signalled = updates(blocks[0])
    if min(sizes) < 4_096:
        assert signalled
        assert min(signalled) <= min(sizes)
    assert not signalled or signalled[-1] <= sizes[-1]
    decoder = HpackDecoder()
    decoder.max_allowed_table_size = sizes[-1]
    for raw in blocks:
        assert list(decoder.decode(raw, raw=True))
    assert not any(updates(raw) for raw in blocks[1:])


def updates(raw):
    """The table sizes that a block begins with."""
    sizes, at = [], 0
    while raw[at] & 0xE0 == 0x20:
        size, at = raw[at] & 31, at + 1
        if size == 31:
            shift = 0
            while True:
                size, at, shift = size + ((raw[at] & 127) << shift), at + 1, shift + 7
                if raw[at - 1] < 128:
                    break
        sizes.append(size)
    return sizes


# The same bytes in any pieces


def conversation(seed):
    """Two Connections that talk about everything: the bytes of either side, and how the client opened its streams."""
    chance = random.Random(seed)
    limits = Limits(window_bytes=65_536, frame_bytes=16_384, useless_frames=100_000)
    client, server = Connection(is_client=True, limits=limits), Connection(is_client=False, limits=limits)
    ends, bytes_of, opens, events = (client, server), {client: b"", server: b""}, [], {client: [], server: []}

    def exchange():
        for sender, receiver in (ends, ends[::-1]):
            raw = b"".join(map(bytes, sender.take()))
            bytes_of[sender] += raw
            news = apart(receiver.receive(raw))
            events[receiver] += news
            for event in news:
                if chance.random() < 0.9:
                    consume(receiver, event)

    for _ in range(chance.randrange(20, 60)):
        end = chance.choice(ends)
        stream = chance.choice(list(end.streams.values())) if end.streams else None
        match chance.randrange(8):
            case 0 | 1:
                opens.append(
                    (encode([(b"x" * chance.randrange(1, 9), b"y" * chance.randrange(40))]), chance.random() < 0.3)
                )
                fields = encode([(n.encode(), v.encode()) for n, v in POST]) + opens[-1][0]
                opens[-1] = (fields, opens[-1][1])
                client.open_stream(*opens[-1])
            case 2 | 3 | 4 if stream:
                heads_sent = stream.call or end is client
                if not heads_sent:
                    end.send_headers(stream, OK_SENT)
                    stream.call = True
                end.send_data(stream, [PATTERN[: chance.choice([0, 1, 100, 5_000, 40_000])]], chance.random() < 0.3)
            case 5 if stream and (stream.call or end is client):
                end.send_trailers(stream, TRAILERS_SENT)
            case 6 if stream and chance.random() < 0.3:
                end.reset(stream, ErrorCode.CANCEL)
            case 7:
                end.ping(chance.randbytes(8))
        if chance.random() < 0.7:
            exchange()
    for _ in range(4):
        exchange()
    assert not client.closed
    assert not server.closed
    return bytes_of[client], bytes_of[server], opens


def heard_by(is_client, raw, opens, cuts):
    """What a fresh Connection makes of the bytes, cut at the places: events and the bytes it sends."""
    end = Connection(is_client=is_client, limits=Limits(useless_frames=100_000))
    if is_client:
        for fields, ended in opens:
            end.open_stream(fields, ended)
    events = [event for start, stop in pairwise((0, *cuts, len(raw))) for event in end.receive(raw[start:stop])]
    return told(events), b"".join(map(bytes, end.take()))


@pytest.mark.parametrize("seed", range(8))
@BOTH
def test_any_split_of_the_bytes_tells_the_same(is_client, seed):
    to_server, to_client, opens = conversation(seed)
    raw = to_client if is_client else to_server
    whole = heard_by(is_client, raw, opens, ())
    assert len(whole[0]) > 3
    chance = random.Random(seed)
    small = raw[:20_000]
    if small == raw:
        assert heard_by(is_client, raw, opens, range(1, len(raw))) == whole
    else:
        short = heard_by(is_client, small, opens, ())
        assert heard_by(is_client, small, opens, range(1, len(small))) == short
    for _ in range(10):
        cuts = sorted(chance.sample(range(len(raw)), k=min(len(raw) - 1, chance.choice([1, 2, 5, 50, 500]))))
        assert heard_by(is_client, raw, opens, cuts) == whole


STEP = st.tuples(
    st.sampled_from([2, 2, 2, 2, 2, 0, 4, 1]),  # how far the stream's number is from the one before
    st.sampled_from(["seen", "seen", "seen", "long", "bad", "early", "new"]),
    st.sampled_from([9, 9, 9, 1, 0, 300, 17_000, 40_000, 70_000, 150_000]),  # bytes of the body
    st.sampled_from(
        [*["whole"] * 6, "open", "padded", "elsewhere", "bare", "twice", "reset", "again", "bad end", "no end"]
    ),
)


def sent(fields):
    """A block as our own end makes it."""
    return encode([(name.encode(), value.encode()) for name, value in fields])


@how(max_examples=400)
@given(st.lists(STEP, max_size=8), st.booleans(), st.sampled_from([65_535, 200_000]), st.booleans())
def test_what_comes_in_one_piece_means_what_its_frames_mean(steps, is_client, window, drains):
    """The short ways of whole requests and responses against frame by frame."""
    heads = {"seen": [], "long": [("content-length", "9")], "bad": [("bad name", "")], "new": [("x-a", "b")]}
    first = [(":status", "103")] if is_client else GET
    blocks = {kind: sent([*(OK if is_client else POST), *extra]) for kind, extra in heads.items()}
    blocks["early"] = sent(first)
    pieces, number = [b"" if is_client else PREFACE, settings(), SETTINGS_ACK], -1
    for far, kind, size, form in [(2, "seen", 9, "whole"), *steps]:
        number += far
        ended = not is_client and form != "open"
        body = data(number + 2 * (form == "elsewhere"), b"x" * size, ended, pad=3 if form == "padded" else None)
        frames = [headers(number, blocks[kind]), *([body] * (2 if form == "twice" else form != "bare"))]
        if is_client and form != "open":
            frames.append(headers(number, blocks["bad"] if form == "bad end" else TRAILERS_SENT, form != "no end"))
        if form == "again":
            frames.insert(0, frames[0])
        if form == "reset":
            frames.insert(1, rst_stream(number))
        pieces.append(b"".join(frames))
    limits = Limits(window_bytes=window, streams=3)

    short = []

    def heard(cuts):
        end = Connection(is_client=is_client, limits=limits)
        if is_client:
            for turn in range(5):
                end.open_stream(POST_BLOCK, turn != 2)
        elif drains:
            end.goaway(last_stream_id=5)
        events = [event for piece in cuts for event in end.receive(piece)]
        short.extend(event for event in events if isinstance(event, (WholeRequest, WholeResponse)))
        out = b"".join(map(bytes, end.take()))
        return told(events), out, sorted(end.streams), end.moved, end._room, end._credit, end._patience

    whole = heard(pieces)
    if steps and steps[0] == (2, "seen", 9, "whole") and not drains:
        assert short
    assert heard([b"".join(pieces)]) == whole
    raw = b"".join(pieces)
    step = 1 if len(raw) < 2_000 else 101
    assert heard([raw[at : at + step] for at in range(0, len(raw), step)])[:4] == whole[:4]


@given(st.lists(st.integers(0, 400), max_size=12).map(sorted))
def test_padded_continued_and_interleaved_frames_may_be_cut_anywhere(cuts):
    raw = b"".join(
        (
            PREFACE, settings((Set.MAX_STREAMS, 7)), SETTINGS_ACK,
            headers(1, POST_BLOCK[:6], done=False, pad=3, priority=bytes(5)), continuation(1, POST_BLOCK[6:]),
            data(1, b"hello", pad=9), headers(3, block([*POST, ("content-length", "8")])), data(3, b"1234", pad=0),
            data(1, b"", pad=40), data(3, b"5678"), headers(3, MORE, ended=True), ping(), data(1, b"bye", True, pad=2),
            window_update(0, 9), headers(5, block([*GET, ("bad name", "")]), True), rst_stream(1, 99), goaway(0, 2),
        )
    )  # fmt: skip
    assert heard_by(False, raw, (), [cut for cut in cuts if cut < len(raw)]) == heard_by(False, raw, (), ())


# h2 as second opinion


class Ours:
    """Our end of a conversation with h2: what was received, by stream."""

    def __init__(self, is_client):
        self.is_client = is_client
        self.connection = Connection(is_client=is_client, limits=Limits(window_bytes=65_536, useless_frames=100_000))
        self.received, self.sent, self.resets, self.pongs, self.streams = {}, {}, set(), 0, {}

    def take(self):
        return b"".join(map(bytes, self.connection.take()))

    def receive(self, raw):
        for event in apart(self.connection.receive(raw)):
            assert not isinstance(event, ConnectionFailed), event
            if isinstance(event, HeadersReceived):
                self.streams[event.stream.id] = event.stream
                note(self.received, event.stream.id, "head", event.head.fields)
                note(self.received, event.stream.id, "end", event.ended)
            elif isinstance(event, DataReceived):
                consume(self.connection, event)
                note(self.received, event.stream.id, "data", bytes(event.data))
                note(self.received, event.stream.id, "end", event.ended)
            elif isinstance(event, TrailersReceived):
                note(self.received, event.stream.id, "trailers", tuple(event.fields))
                note(self.received, event.stream.id, "end", True)
            elif isinstance(event, StreamReset):
                assert event.by_peer
                self.resets.add(event.stream.id)
            elif isinstance(event, PingAcked):
                self.pongs += 1

    def open(self, fields, ended):
        stream = self.connection.open_stream(encode(fields), ended)
        self.streams[stream.id] = stream
        return stream.id

    def head(self, number, fields, ended):
        self.connection.send_headers(self.streams[number], encode(fields), ended)

    def data(self, number, body, ended):
        self.connection.send_data(self.streams[number], [body[:7], memoryview(body)[7:]], ended)

    def trailers(self, number, fields):
        self.connection.send_trailers(self.streams[number], encode(fields))

    def reset(self, number):
        self.connection.reset(self.streams[number], ErrorCode.CANCEL)

    def ping(self):
        self.connection.ping(b"ourspong")

    def change(self, chance):
        pass


class Theirs:
    """h2's end of it, with a queue for what its windows do not let through."""

    def __init__(self, is_client):
        self.is_client = is_client
        self.connection = H2Connection(
            H2Configuration(client_side=is_client, header_encoding=None, normalize_inbound_headers=False)
        )
        self.connection.initiate_connection()
        self.received, self.sent, self.resets, self.pongs, self.queue = {}, {}, set(), 0, {}
        self.acknowledged = 0

    def take(self):
        return self.connection.data_to_send()

    def receive(self, raw):
        for event in self.connection.receive_data(raw):
            if isinstance(event, RequestReceived | ResponseReceived):
                note(self.received, event.stream_id, "head", tuple(map(tuple, event.headers)))
            elif isinstance(event, H2Data):
                note(self.received, event.stream_id, "data", event.data)
                if event.flow_controlled_length:
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, H2Trailers):
                note(self.received, event.stream_id, "trailers", tuple(map(tuple, event.headers)))
            elif isinstance(event, StreamEnded):
                note(self.received, event.stream_id, "end", True)
            elif isinstance(event, H2Reset):
                self.resets.add(event.stream_id)
                self.queue.pop(event.stream_id, None)
            elif isinstance(event, PingAckReceived):
                self.pongs += 1
            elif isinstance(event, SettingsAcknowledged):
                self.acknowledged += 1
            if isinstance(event, WindowUpdated | RemoteSettingsChanged):
                self.pump()

    def pump(self):
        for number in list(self.queue):
            while jobs := self.queue.get(number):
                kind, what, ended = jobs[0]
                if kind == "trailers":
                    self.connection.send_headers(number, what, end_stream=True)
                    jobs.pop(0)
                    continue
                room = min(self.connection.local_flow_control_window(number), self.connection.max_outbound_frame_size)
                pad = None if len(what) % 3 or room < len(what) + 12 else 11
                if room <= 0 and what:
                    break
                part, rest = what[:room] if room > 0 else b"", what[max(room, 0) :]
                self.connection.send_data(number, part, end_stream=ended and not rest, pad_length=pad)
                jobs.pop(0)
                if rest:
                    jobs.insert(0, (kind, rest, ended))

    def open(self, fields, ended):
        number = self.connection.get_next_available_stream_id()
        self.connection.send_headers(number, fields, end_stream=ended)
        return number

    def head(self, number, fields, ended):
        self.connection.send_headers(number, fields, end_stream=ended)

    def data(self, number, body, ended):
        self.queue.setdefault(number, []).append(("data", body, ended))
        self.pump()

    def trailers(self, number, fields):
        self.queue.setdefault(number, []).append(("trailers", fields, True))
        self.pump()

    def reset(self, number):
        self.queue.pop(number, None)
        self.connection.reset_stream(number, Code.CANCEL)

    def ping(self):
        self.connection.ping(b"h2h2pong")

    def change(self, chance):
        choices = {
            SettingCodes.INITIAL_WINDOW_SIZE: [0, 1_000, 20_000, 65_535, 100_000],
            SettingCodes.MAX_FRAME_SIZE: [16_384, 20_000, 1 << 20],
            SettingCodes.HEADER_TABLE_SIZE: [0, 100, 4_096, 10_000],
        }
        name = chance.choice(list(choices))
        self.connection.update_settings({name: chance.choice(choices[name])})


def note(log, number, kind, what):
    """Data in a row is one entry; an end is noted if it is one."""
    entries = log.setdefault(number, [])
    if kind == "data":
        if entries and entries[-1][0] == "data":
            what = entries.pop()[1] + what
        if not what:
            return
    if kind != "end" or what:
        entries.append((kind, what))


FIELDS = [
    (b"x-a", b"1"), (b"x-b", b"two"), (b"cookie", b"c=d"), (b"x-c", b"v" * 3_000), (b"accept", b"*/*"), (b"x-e", b""),
]  # fmt: skip


def talk(chance, client, server, steps):
    """A random conversation; every stream's doings are noted by who did them."""
    ours_is_open = {}  # (end, stream) → what it may still do: "head", "body"
    doomed, pings = set(), {client: 0, server: 0}

    def exchange(most=1_000):
        for _ in range(most):
            moved = False
            for sender, receiver in ((client, server), (server, client)):
                if raw := sender.take():
                    moved = True
                    step = chance.choice([len(raw), 1_000, 37])
                    for at in range(0, len(raw), step):
                        receiver.receive(raw[at : at + step])
            if not moved:
                return
        raise AssertionError("no end to it")

    for _ in range(steps):
        end = chance.choice((client, server))
        mine = [number for (who, number) in ours_is_open if who is end and number not in doomed]
        number = chance.choice(mine) if mine else None
        fields, ended = chance.sample(FIELDS, chance.randrange(len(FIELDS))), chance.random() < 0.25
        what = chance.randrange(9)
        if what <= 1 and len(ours_is_open) < 60:
            fields = [(n.encode(), v.encode()) for n, v in POST] + fields
            number = client.open(fields, ended)
            note(client.sent, number, "head", tuple(fields))
            note(client.sent, number, "end", ended)
            if not ended:
                ours_is_open[client, number] = "body"
            ours_is_open[server, number] = "head"
            exchange()
        elif what == 2:
            end.ping()
            pings[end] += 1
        elif what == 3:
            end.change(chance)
        elif number is None:
            continue
        elif ours_is_open[end, number] == "head":
            fields = [(b":status", b"200"), *fields]
            end.head(number, fields, ended)
            note(end.sent, number, "head", tuple(fields))
            note(end.sent, number, "end", ended)
            ours_is_open[end, number] = "body"
        elif what in (4, 5, 6):
            body = PATTERN[: chance.choice([0, 1, 300, 16_384, 60_000])]
            end.data(number, body, ended)
            note(end.sent, number, "data", body)
            note(end.sent, number, "end", ended)
        elif what == 7:
            ended = True
            end.trailers(number, fields or FIELDS[:1])
            note(end.sent, number, "trailers", tuple(fields or FIELDS[:1]))
            note(end.sent, number, "end", True)
        elif what == 8 and chance.random() < 0.3:
            exchange()
            if number not in doomed | client.resets | server.resets:
                end.reset(number)
                doomed.add(number)
            ended = True
        else:
            ended = False
        if ended and number is not None:
            ours_is_open.pop((end, number), None)
        if chance.random() < 0.5:
            exchange()
    for end in (client, server):
        if isinstance(end, Theirs):  # whatever still waits may go now
            end.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
            end.connection.increment_flow_control_window(1 << 24)
    exchange()
    for sender, receiver in ((client, server), (server, client)):
        assert sender.pongs == pings[sender]
        for number, sent in sender.sent.items():
            got = receiver.received.get(number, [])
            if number not in doomed:
                assert got == sent
            else:
                assert "".join(kind[0] for kind, _ in sent).startswith("".join(kind[0] for kind, _ in got))
    assert doomed == client.resets | server.resets


@pytest.mark.parametrize("seed", range(30))
@BOTH
def test_h2_and_we_understand_each_other(is_client, seed):
    client, server = (Ours(True), Theirs(False)) if is_client else (Theirs(True), Ours(False))
    talk(random.Random(seed), client, server, steps=60)


@pytest.mark.parametrize("seed", range(10))
def test_we_understand_ourselves(seed):
    talk(random.Random(seed), Ours(True), Ours(False), steps=80)


def test_everything_heard_is_whole_frames():
    """The helper's own promise, on which the rest relies."""
    assert read_frames(ping() + settings((1, 2))) == [Frame(6, 0, 0, b"12345678"), Frame(4, 0, 0, b"\0\1\0\0\0\2")]
    with pytest.raises(AssertionError):
        read_frames(ping()[:-1])
