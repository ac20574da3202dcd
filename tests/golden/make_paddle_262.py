"""Writes paddle-262-deepfm: run by hand with paddlepaddle 2.6.2, `python make_paddle_262.py DIR`.

DeepFM: two tables, of one and of four columns, each read by three slots; .pdmodel and .pdiparams.
"""

import sys
from pathlib import Path

import numpy as np
import paddle

ROWS, DIM, DENSE = 1001, 4, 5

paddle.enable_static()
paddle.seed(1)
np.random.seed(1)
dense = paddle.static.data("dense_input", [None, DENSE], "float32")
slots = [paddle.static.data(f"C{i + 1}", [None, 1], "int64") for i in range(3)]
first = paddle.ParamAttr("first_order", initializer=paddle.nn.initializer.Uniform(-1, 1))
second = paddle.ParamAttr("second_order", initializer=paddle.nn.initializer.Uniform(-1, 1))
linear = [paddle.reshape(paddle.static.nn.embedding(s, [ROWS, 1], param_attr=first), [-1, 1]) for s in slots]
rows = [paddle.static.nn.embedding(s, [ROWS, DIM], param_attr=second) for s in slots]
stacked = paddle.concat(rows, axis=1)
total = paddle.sum(stacked, axis=1)
fm = 0.5 * paddle.sum(total * total - paddle.sum(stacked * stacked, axis=1), axis=1, keepdim=True)
deep = paddle.static.nn.fc(paddle.concat([paddle.flatten(stacked, 1), dense], axis=1), 8, activation="relu")
score = paddle.nn.functional.sigmoid(paddle.add_n(linear) + fm + paddle.static.nn.fc(deep, 1))
exe = paddle.static.Executor(paddle.CPUPlace())
exe.run(paddle.static.default_startup_program())
place = Path(sys.argv[1]) / "paddle-262-deepfm"
place.mkdir()
paddle.static.save_inference_model(str(place / "deepfm"), [dense, *slots], [score], exe)
