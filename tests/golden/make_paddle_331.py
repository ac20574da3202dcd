"""Writes paddle-331-*: run by hand with paddlepaddle 3.3.1, `FLAGS_enable_pir_api=0 python make_paddle_331.py DIR`.

paddle-331-ctr    CTR-DNN: three dense slots share one table, padding id 0; .pdmodel and .pdiparams
paddle-331-jit    the same idea as a dygraph layer: ids of three slots concatenated before one lookup, and a small table
paddle-331-conv   a convolution net: no lookup at all
paddle-331-remote.pdmodel   a program alone, whose table is on a parameter server
"""

import sys
from pathlib import Path

import numpy as np
import paddle

ROWS, DIM, DENSE = 1001, 4, 5


def ctr(place):
    main, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(main, startup):
        dense = paddle.static.data("dense_input", [None, DENSE], "float32")
        slots = [paddle.static.data(f"C{i + 1}", [None, 1], "int64") for i in range(3)]
        label = paddle.static.data("label", [None, 1], "int64")
        table = paddle.ParamAttr("SparseFeatFactors", initializer=paddle.nn.initializer.Uniform(-1, 1))
        rows = [
            paddle.static.nn.embedding(s, [ROWS, DIM], is_sparse=True, padding_idx=0, param_attr=table) for s in slots
        ]
        x = paddle.concat([paddle.reshape(r, [-1, DIM]) for r in rows] + [dense], axis=1)
        x = paddle.static.nn.fc(x, 8, activation="relu")
        predict = paddle.static.nn.fc(x, 2, activation="softmax")
        loss = paddle.mean(paddle.nn.functional.cross_entropy(predict, label, use_softmax=False))
        infer = main.clone(for_test=True)
        paddle.optimizer.SGD(0.1).minimize(loss)
    exe = paddle.static.Executor(paddle.CPUPlace())
    exe.run(startup)
    rng = np.random.default_rng(1)
    feed = {s.name: rng.integers(0, ROWS, (64, 1)) for s in slots}
    feed |= {"dense_input": rng.random((64, DENSE), np.float32), "label": rng.integers(0, 2, (64, 1))}
    exe.run(main, feed)
    place.mkdir()
    paddle.static.save_inference_model(str(place / "ctr"), [dense, *slots], [predict], exe, program=infer)


class Ranker(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.items = paddle.nn.Embedding(ROWS, DIM)
        self.weekdays = paddle.nn.Embedding(7, 2)
        self.top = paddle.nn.Linear(3 * DIM + 2, 1)

    def forward(self, a, b, c, day):
        items = paddle.flatten(self.items(paddle.concat([a, b, c], axis=1)), 1)
        return paddle.nn.functional.relu(self.top(paddle.concat([items, self.weekdays(day)], axis=1)))


def jit(place):
    paddle.disable_static()
    place.mkdir()
    spec = [paddle.static.InputSpec([None, 1], "int64", name) for name in "abc"]
    spec.append(paddle.static.InputSpec([None], "int64", "day"))
    paddle.jit.save(Ranker(), str(place / "ranker"), input_spec=spec)
    (place / "ranker.pdiparams.info").unlink(missing_ok=True)  # a pickle
    paddle.enable_static()


def conv(place):
    main, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(main, startup):
        image = paddle.static.data("image", [None, 1, 8, 8], "float32")
        x = paddle.static.nn.conv2d(image, 2, 3, act="relu")
        predict = paddle.static.nn.fc(x, 10, activation="softmax")
    exe = paddle.static.Executor(paddle.CPUPlace())
    exe.run(startup)
    place.mkdir()
    paddle.static.save_inference_model(str(place / "conv"), [image], [predict], exe, program=main)


def remote(file):
    main, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(main, startup):
        ids = paddle.static.data("ids", [None, 1], "int64")
        dense = paddle.static.data("dense_input", [None, 3], "float32")
        rows = paddle.static.nn.sparse_embedding(ids, [ROWS, 8])
        score = paddle.static.nn.fc(paddle.concat([paddle.reshape(rows, [-1, 8]), dense], axis=1), 2)
        file.write_bytes(paddle.static.serialize_program([ids, dense], [score]))


paddle.enable_static()
paddle.seed(1)
target = Path(sys.argv[1])
ctr(target / "paddle-331-ctr")
jit(target / "paddle-331-jit")
conv(target / "paddle-331-conv")
remote(target / "paddle-331-remote.pdmodel")
