"""Header blocks: decoding equals hpack's whatever came before, encoding is understood by hpack, caches are bounded."""

import tracemalloc

import pytest
from frames import (
    GET,
    INDEXING,
    NEVER_INDEXED,
    OK,
    POST,
    WITHOUT_INDEXING,
    Peer,
    block,
    headers,
    indexed,
    literal,
    weight,
)
from frames import table_size as size_update
from hpack import Decoder as HpackDecoder
from hpack import Encoder as HpackEncoder
from hpack import HPACKError, OversizedHeaderListError
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.rpc.headers import CompressionError, Decoder, TooLarge, encode
from cube.rpc.http2 import HeadersReceived, StreamReset
from cube.rpc.limits import Limits

LIMIT = 1 << 16  # hpack's own default

names = st.sampled_from([b":method", b":path", b"accept", b"te", b"cookie", b"x-a", b"x-bb", b"grpc-timeout", b"date"])
values = st.sampled_from([b"", b"a", b"GET", b"POST", b"/", b"trailers", b"1S", b"2S", b"x" * 700, b"\xff\x00\xfe"])
fields = st.lists(st.tuples(names, values, st.booleans()), max_size=6)


def decoded(decoder, raw):
    """What hpack makes of a block, or the kind of error that we promise for its error."""
    try:
        return tuple((bytes(n), bytes(v)) for n, v in decoder.decode(raw, raw=True))
    except OversizedHeaderListError:
        return TooLarge
    except HPACKError:
        return CompressionError


def ours(decoder, raw):
    try:
        return tuple(decoder.decode(raw).fields)
    except (TooLarge, CompressionError) as error:
        return type(error)


def agree(blocks, limit=LIMIT, is_request=True):
    """Feed the same blocks to both, up to the first that is refused."""
    mine, theirs = Decoder(is_request, limit), HpackDecoder(limit)
    for raw in blocks:
        expected = decoded(theirs, raw)
        assert ours(mine, raw) == expected
        if not isinstance(expected, tuple):
            return


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("block"), fields, st.booleans(), st.integers(1, 3)),
            st.tuples(st.just("size"), st.sampled_from([0, 33, 50, 100, 1000, 4096])),
        ),
        max_size=25,
    )
)
def test_blocks_of_a_real_encoder_decode_as_hpack_decodes_them(steps):
    encoder, blocks = HpackEncoder(), []
    for kind, *step in steps:
        if kind == "size":
            encoder.header_table_size = step[0]
        else:
            blocks += [encoder.encode(step[0], huffman=step[1]) for _ in range(step[2])]
    agree(blocks)


names_by_hand = st.one_of(names, st.integers(1, 64))
representations = st.one_of(
    st.integers(0, 66).map(indexed),
    st.sampled_from([2, 3, 62, 62, 62, 63, 64]).map(indexed),
    st.builds(
        literal, names_by_hand, values, st.sampled_from([WITHOUT_INDEXING, NEVER_INDEXED, INDEXING]), st.booleans()
    ),
)
by_hand = st.builds(
    lambda sizes, parts: b"".join(map(size_update, sizes)) + b"".join(parts),
    st.lists(st.sampled_from([0, 40, 100, 1000, 4096, 4097]), max_size=1),
    st.lists(representations, max_size=4),
)


@given(st.lists(by_hand, min_size=1, max_size=6), st.lists(st.integers(0, 5), max_size=30))
@settings(max_examples=120)
def test_a_block_means_what_the_table_says_however_often_its_bytes_have_been_seen(blocks, order):
    """The same bytes again and again, between others that move the table: the cache must never answer from the past."""
    agree([blocks[at % len(blocks)] for at in order])


@given(st.lists(by_hand, min_size=1, max_size=4), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=120)
def test_a_broken_block_is_refused_where_hpack_refuses_it(blocks, at, octet):
    raw = bytearray(blocks[-1] + b"\x00\x01a\x01b")
    raw[at % len(raw)] = octet
    agree([*blocks[:-1], bytes(raw), bytes(raw)])


@given(st.lists(by_hand, min_size=1, max_size=8), st.integers(0, 300))
def test_a_list_over_the_limit_is_refused_where_hpack_refuses_it(blocks, limit):
    agree(blocks * 2, limit)


@given(st.binary(max_size=40), st.integers(1, 4))
@settings(max_examples=200)
def test_any_bytes_are_decoded_or_refused_as_hpack_does(raw, times):
    agree([raw] * times)


@pytest.mark.parametrize(
    ("blocks", "promise"),
    [
        ([literal(b"a", b"1", INDEXING), indexed(62), indexed(62)], "hit"),
        ([literal(b"a", b"1", INDEXING), indexed(62), literal(b"a", b"2", INDEXING), indexed(62)], "insertion between"),
        ([literal(b"a", b"1", INDEXING), indexed(62), size_update(0), indexed(62)], "emptied table"),
        ([literal(b"a", b"1", INDEXING), indexed(62), size_update(0) + size_update(4096), indexed(62)], "emptied"),
        ([literal(b"a", b"1", INDEXING)] * 3 + [indexed(64)], "a block that inserts inserts each time"),
        ([literal(b"a", b"1", INDEXING)] * 3 + [indexed(65)], "and no more than that"),
        ([literal(62, b"1")] * 2, "a name from a table that is empty"),
        ([literal(b"n", b"1", INDEXING), literal(62, b""), literal(b"m", b"1", INDEXING), literal(62, b"")], "names"),
        ([size_update(40), *[literal(b"a", b"1", INDEXING), indexed(62)] * 2, indexed(63)], "evicted"),
        ([size_update(30), literal(b"a", b"1", INDEXING), indexed(62)], "too small for any entry"),
        ([size_update(4096)] * 3 + [b""], "updates only, and nothing at all"),
        ([b"", b""], "nothing"),
        ([indexed(2), indexed(2), literal(b"a", b"1", INDEXING), indexed(2)], "static blocks outlive insertions"),
        ([literal(4, b"/x")] * 2 + [literal(b"a", b"", INDEXING), literal(4, b"/x")], "literals outlive insertions"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_the_cache_agrees_with_hpack_after(blocks, promise):
    agree(blocks)


def test_a_list_of_exactly_the_limit_is_taken_and_one_octet_more_is_not():
    value = b"v" * 100
    limit = 5 * (len(b"name") + len(value) + 32)
    raw = literal(b"name", value) * 5
    assert len(Decoder(True, limit).decode(raw).fields) == 5
    with pytest.raises(TooLarge):
        Decoder(True, limit - 1).decode(raw)


@given(
    st.lists(
        st.tuples(
            st.one_of(names, st.binary(min_size=1, max_size=20), st.just(b"n" * 200)),
            st.one_of(values, st.binary(max_size=300)),
        )
    )
)
def test_what_is_encoded_is_what_hpack_decodes_with_no_table_at_all(some):
    decoder = HpackDecoder(1 << 20)
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    assert [(bytes(n), bytes(v)) for n, v in decoder.decode(encode(some), raw=True)] == some


@pytest.mark.parametrize("fields", [GET, POST, OK], ids=["GET", "POST", "200"])
def test_encoding_leaves_the_table_of_the_peer_alone_and_the_static_one_used(fields):
    decoder, raw = HpackDecoder(), encode([(n.encode(), v.encode()) for n, v in fields])
    decoder.decode(raw)
    assert not decoder.header_table.dynamic_entries
    assert len(raw) < sum(len(n) + len(v) for n, v in fields)


def test_a_head_knows_its_pseudo_fields():
    head = Decoder(True, LIMIT).decode(block(POST))
    assert (head.method, head.path, head.scheme, head.authority, head.status) == (
        b"POST", b"/", b"http", b"localhost", None,
    )  # fmt: skip
    head = Decoder(False, LIMIT).decode(block(OK))
    assert (head.method, head.path, head.scheme, head.authority, head.status) == (None, None, None, None, b"200")


# What is cached must not change the verdict on a request

stable = st.sampled_from([("x-a", "1"), ("te", "trailers"), ("connection", "close"), ("X", "y"), ("user-agent", "z")])
volatile = st.sampled_from(
    [
        ("grpc-timeout", "1S"), ("grpc-timeout", "2S"), ("grpc-timeout", " 1S"), ("grpc-timeout", "1\nS"),
        ("date", "today"), ("date", ""), ("date", "x\0"), ("content-length", "0"), ("content-length", "7"),
        ("content-length", "x"), ("traceparent", "00-1"), ("traceparent", "00-2"), ("x-request-id", "\u00e9"),
        ("Date", "today"), (":path", "/2"), (":authority", "elsewhere"), ("host", "localhost"), ("host", "else"),
    ]
)  # fmt: skip
requests = st.lists(st.lists(st.one_of(stable, volatile), max_size=4), min_size=1, max_size=12)


def verdict(peer, number):
    """What came of the request on a stream: its head, or the code of its reset."""
    heads = [event.head.fields for event in peer.all(HeadersReceived) if event.stream.id == number]
    assert not [event for event in peer.all(StreamReset) if event.stream.id == number]
    return heads, peer.resets(number), peer.failure


@given(requests, st.booleans())
def test_the_verdict_on_a_request_does_not_depend_on_those_before_it(lists, one_encoder):
    encoder, together = HpackEncoder(), Peer()
    for number, more in enumerate(lists):
        fields = [*GET, *more]
        raw = encoder.encode(fields) if one_encoder else block(fields, huffman=False)
        together.send(headers(2 * number + 1, raw, ended=True))
        alone = Peer()
        alone.send(headers(1, block(fields), ended=True))
        assert verdict(together, 2 * number + 1) == verdict(alone, 1)


# Bounds


START = block(GET[:3])


@pytest.mark.parametrize(
    "raw",
    [
        lambda n: START + literal(b"x-n", b"%d" % n),
        lambda n: START + literal(b"x-n%d" % n, b""),
        lambda n: START + literal(b"x-n", b"%d" % n, INDEXING),
        lambda n: START + literal(b"grpc-timeout", b"%dm" % n),
        lambda n: START + literal(b"grpc-timeout", b"%dm" % n, INDEXING),
        lambda n: START + literal(b"x-n", b"%08d" % n * 200),
        lambda n: START + literal(b"x-n", b"%08d" % n * 2000),
        lambda n: START + literal(b"x-n", b"%08d" % n * 2000, INDEXING),
        lambda n: START + literal(b"date", b"%08d" % n * 2000),
        lambda n: START + literal(b"m", b"%d" % n) * 500,
        lambda n: indexed(62) if n % 2 else START + literal(b"x-n", b"%d" % n, INDEXING),
    ],
    ids=[
        "values", "names", "values in the table", "time-outs", "time-outs in the table", "long values",
        "very long values", "very long values for the table", "very long volatile values", "many fields", "references",
    ],
)  # fmt: skip
def test_what_a_decoder_keeps_is_bounded_whatever_it_has_seen(raw):
    decoder = Decoder(True, Limits.header_bytes)
    most = 0
    for n in range(256):
        decoder.decode(raw(n))
        if n % 125 == 124:
            most = max(most, weight(decoder))
    assert most < 8 << 20


def test_a_bomb_of_references_is_refused_before_it_is_inflated():
    decoder = Decoder(True, 32 << 10)
    decoder.decode(literal(b"x", b"v" * 3900, INDEXING))
    bomb = indexed(62) * 500_000  # 2 GB
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decoder.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_huffman_bomb_is_refused_and_stays_small():
    """Huffman code at its best packs 8 bits into 5: no amplification to speak of, but the limit must hold there too."""
    with pytest.raises(TooLarge):
        Decoder(True, 32 << 10).decode(literal(b"x", b"0" * 40_000, huffman=True))
