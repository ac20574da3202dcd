"""Texts → ids → arrays, against plain Python."""

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_op import bags, plain, ragged, run

from cube.errors import BadConfig
from predictor.ops.op import Port, Ragged
from predictor.ops.text import Pad, Tokenise, lines_of, padded
from predictor.tensors import texts

WORDS = ["<unk>", "the", "film", "was", "good", "Bad", "naïve", "x", "don't", "don", "t", ""]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocabulary.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


def slow_twin(text, *, lower=True, split="space", unknown=0):
    """Ids of a text's tokens."""
    if split == "words":
        text = text.translate(bytes.maketrans(string.punctuation.encode(), b" " * len(string.punctuation)))
    tokens = (text.lower() if lower else text).split()  # of bytes: ASCII only
    known = {word.encode(): at for at, word in enumerate(WORDS)}
    ids = [known.get(token, unknown) for token in tokens]
    return [i for i in ids if i is not None]


pieces = st.sampled_from([*WORDS, "GOOD", "Film", "other", "naÏve", "\x00", "\xff", "the"])
given_texts = st.lists(
    st.one_of(
        st.lists(st.tuples(pieces, st.sampled_from([" ", "\t", "\n ", "-", "'", "\r\n", ", "])), max_size=8).map(
            lambda words: "".join(word + gap for word, gap in words).encode()
        ),
        st.binary(max_size=12),
    ),
    max_size=5,
)


@given(given_texts, st.booleans(), st.sampled_from(["space", "words"]), st.booleans())
def test_tokens_are_those_that_splitting_gives(vocabulary, given_texts, lower, split, leaves_out):
    op = Tokenise(vocabulary, lower=lower, split=split, unknown="" if leaves_out else "<unk>")
    made = run(op, {"text": texts(given_texts)}, len(given_texts))
    unknown = None if leaves_out else 0
    assert plain(made["ids"]) == [slow_twin(t, lower=lower, split=split, unknown=unknown) for t in given_texts]


def test_every_word_of_a_large_vocabulary_is_found(tmp_path):
    words = [f"w{i * i}" for i in range(50_000)]
    (tmp_path / "v.txt").write_text("\r\n".join(words))
    op = Tokenise(tmp_path / "v.txt", unknown="w0", input="said", output="tokens")
    made = run(op, {"said": texts([" ".join(words).encode(), b"W9 z w1"])}, 2)
    assert plain(made["tokens"]) == [list(range(50_000)), [3, 0, 1]]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a\nb\na\n", {}, "v.txt:3: found 'a' again, expected every token once"),
        ("", {}, "v.txt: found no lines"),
        ("a\n", {}, "unknown: found '<unk>', expected a line of .*v.txt"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(tmp_path, content, arguments, message):
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(BadConfig, match=message):
        Tokenise(tmp_path / "v.txt", **arguments)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="found No such file"):
        Tokenise(tmp_path / "v.txt")


def test_lines_end_as_files_of_any_system_do(tmp_path):
    (tmp_path / "lines").write_bytes(b"a\r\nb c\n\n\r\nlast")
    assert plain(lines_of(tmp_path / "lines")) == [b"a", b"b c", b"", b"", b"last"]


def test_only_texts_are_tokenised(vocabulary):
    with pytest.raises(BadConfig, match=r"input 'text': found BYTES \[-1, 2\]"):
        Tokenise(vocabulary).bind({"text": Port("BYTES", (-1, 2))})


# ---- pad ----


def slow_pad(bag, length, pad, keep):
    kept = bag[:length] if keep == "first" else bag[max(len(bag) - length, 0) :]
    return kept + [pad] * (length - len(kept))


@given(
    st.integers(0, 4).flatmap(lambda n: bags(st.integers(1, 9), n, most=7)),
    st.integers(1, 6),
    st.integers(-1, 1),
    st.sampled_from(["first", "last"]),
)
def test_sequences_become_rows(given_bags, length, pad, keep):
    made = run(Pad(length, pad=pad, keep=keep), {"ids": ragged(given_bags)}, len(given_bags))
    assert plain(made["padded"]) == [slow_pad(bag, length, pad, keep) for bag in given_bags]
    assert plain(made["padded_mask"]) == [[at < len(bag) for at in range(length)] for bag in given_bags]


def test_sequences_of_vectors_become_rows():
    vectors = Ragged(np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 0, 3]))
    made, mask = padded(vectors, 2, pad=-1, is_end_kept=True)
    assert made.tolist() == [[[-1, -1], [-1, -1]], [[2, 3], [4, 5]]]
    assert mask.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("arguments", "port", "message"),
    [
        ({"length": 0}, Port("INT64", ragged=True), "length: found 0"),
        ({"length": 3}, Port("INT64"), r"input 'ids': found INT64 \[-1\], expected ragged numbers"),
        ({"length": 3}, Port("BYTES", ragged=True), "input 'ids': found ragged BYTES"),
        (
            {"length": 3, "pad": 0.5},
            Port("INT64", ragged=True),
            "pad: found 0.5, expected a number that INT64 can hold",
        ),
        (
            {"length": 3, "pad": -1},
            Port("UINT64", ragged=True),
            "pad: found -1, expected a number that UINT64 can hold",
        ),
    ],
)
def test_padding_that_cannot_be_is_refused(arguments, port, message):
    with pytest.raises(BadConfig, match=message):
        Pad(**arguments).bind({"ids": port})
