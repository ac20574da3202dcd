"""A sequence tagger, trained and saved by Paddle 3.3.1, and what it answers. A script, for a Python that has it.

    FLAGS_enable_pir_api=0 python paddle_tagger.py DIR

Words and marks are sequences of different lengths (LoD), each with a table; a convolution over each sequence; a tag
for each word, and what the sequence is about. Writes DIR/tagger, and DIR/answers.npz: words, marks, lengths, scores,
topic.
"""

import sys
from pathlib import Path

import numpy as np
import paddle

WORDS, MARKS, TAGS = 1500, 1100, 5
LENGTHS = [3, 0, 1, 6, 0, 2]  # of the sequences that are answered


def listed(ids, lengths):
    """Sequences as Paddle takes them."""
    return paddle.base.create_lod_tensor(ids.reshape(-1, 1), [list(lengths)], paddle.CPUPlace())


def main(place):
    rng = np.random.default_rng(1)
    main, startup = paddle.static.Program(), paddle.static.Program()
    main.random_seed = startup.random_seed = 1
    with paddle.static.program_guard(main, startup):
        words, marks, target = (
            paddle.static.data(name, [None, 1], "int64", lod_level=1) for name in ("words", "marks", "target")
        )
        word_rows = paddle.static.nn.embedding(words, [WORDS, 8], padding_idx=0, param_attr="word_emb")
        mark_rows = paddle.static.nn.embedding(marks, [MARKS, 4], param_attr="mark_emb")
        both = paddle.concat([paddle.reshape(word_rows, [-1, 8]), paddle.reshape(mark_rows, [-1, 4])], axis=1)
        hidden = paddle.static.nn.sequence_conv(both, 16, filter_size=3, act="relu")
        scores = paddle.static.nn.fc(hidden, TAGS, activation="softmax")
        topic = paddle.static.nn.sequence_pool(hidden, "max")
        loss = paddle.mean(paddle.nn.functional.cross_entropy(scores, target, use_softmax=False))
        served = main.clone(for_test=True)
        paddle.optimizer.Adam(0.05).minimize(loss)
    exe = paddle.static.Executor(paddle.CPUPlace())
    exe.run(startup)
    losses = []
    for _ in range(20):
        lengths = rng.integers(1, 6, 32)
        ids = rng.integers(0, WORDS, lengths.sum())
        given = {"words": ids, "marks": ids % MARKS, "target": ids % TAGS}
        feed = {name: listed(array, lengths) for name, array in given.items()}
        losses.append(float(exe.run(main, feed, [loss])[0]))
    assert losses[-1] < losses[0]
    (place / "tagger").mkdir()
    saved = str(place / "tagger" / "tagger")
    paddle.static.save_inference_model(saved, [words, marks], [scores, topic], exe, program=served)
    given = {"words": rng.integers(0, WORDS, sum(LENGTHS)), "marks": rng.integers(0, MARKS, sum(LENGTHS))}
    given["words"][2] = 0  # padding
    feed = {name: listed(ids, LENGTHS) for name, ids in given.items()}
    original, _, fetched = paddle.static.load_inference_model(saved, exe)
    found = exe.run(original, feed, fetched, return_numpy=False)
    answers = dict(zip(("scores", "topic"), map(np.array, found), strict=True))
    np.savez(place / "answers.npz", lengths=LENGTHS, **given, **answers)


paddle.enable_static()
main(Path(sys.argv[1]))
