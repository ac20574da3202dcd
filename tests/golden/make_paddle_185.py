"""Writes paddle-185-*: run by hand with paddlepaddle 1.8.5 and protobuf < 3.21, `python make_paddle_185.py DIR`.

paddle-185-lod      lookup_table (v1) over LoD slots, sequence_pool; __model__ and a file per parameter
paddle-185-tagger   a sequence tagger: a table of words, a small one of marks, a GRU, a CRF; __model__ and __params__
paddle-185-train    a training program as it stands: label, gradients, auc, SGD; no feed or fetch ops
paddle-185-loop     a lookup before a loop and one in it; a file per parameter. 2.6.2 runs it, 3.3.1 does not
"""

import os
import sys

import numpy as np
import paddle.fluid as fluid

ROWS, DIM, DENSE = 1001, 4, 5


def uniform(name):
    return fluid.ParamAttr(name, initializer=fluid.initializer.Uniform(-1, 1))


def lod_tensor(lengths, high, rng):
    ids = rng.randint(0, high, (sum(lengths), 1)).astype("int64")
    return fluid.create_lod_tensor(ids, [lengths], fluid.CPUPlace())


def started(startup):
    exe = fluid.Executor(fluid.CPUPlace())
    exe.run(startup)
    return exe


def ctr_net():
    dense = fluid.layers.data("dense_input", [DENSE], dtype="float32")
    slots = [fluid.layers.data(f"C{i + 1}", [1], dtype="int64", lod_level=1) for i in range(3)]
    pooled = []
    for slot, pooling in zip(slots, ("sum", "average", "sum")):  # noqa: B905 - Python 3.7
        rows = fluid.layers.embedding(
            slot, [ROWS, DIM], is_sparse=True, padding_idx=0, param_attr=uniform("SparseFeatFactors")
        )
        pooled.append(fluid.layers.sequence_pool(rows, pooling))
    x = fluid.layers.fc(fluid.layers.concat([*pooled, dense], axis=1), 8, act="relu")
    return dense, slots, fluid.layers.fc(x, 2, act="softmax")


def batch(slots, rng):
    feed = {slot.name: lod_tensor([1 + i % 3 for i in range(16)], ROWS, rng) for slot in slots}
    feed["dense_input"] = rng.rand(16, DENSE).astype("float32")
    feed["label"] = rng.randint(0, 2, (16, 1)).astype("int64")
    return feed


def lod(place):
    main, startup = fluid.Program(), fluid.Program()
    main.random_seed = startup.random_seed = 1
    with fluid.program_guard(main, startup), fluid.unique_name.guard():
        dense, slots, predict = ctr_net()
    names = [dense.name] + [slot.name for slot in slots]
    fluid.io.save_inference_model(place, names, [predict], started(startup), main)


def train(place):
    main, startup = fluid.Program(), fluid.Program()
    main.random_seed = startup.random_seed = 1
    with fluid.program_guard(main, startup), fluid.unique_name.guard():
        _, slots, predict = ctr_net()
        dropped = fluid.layers.dropout(predict, 0.1, dropout_implementation="upscale_in_train")
        predict = fluid.layers.assign(dropped)
        label = fluid.layers.data("label", [1], dtype="int64")
        loss = fluid.layers.mean(fluid.layers.cross_entropy(predict, label))
        fluid.layers.auc(predict, label, num_thresholds=15)
        fluid.layers.accuracy(predict, label)
        fluid.optimizer.SGD(0.1).minimize(loss)
    exe = started(startup)
    exe.run(main, feed=batch(slots, np.random.RandomState(1)))
    fluid.io.save_persistables(exe, place, main)
    with open(os.path.join(place, "__model__"), "wb") as file:
        file.write(main.desc.serialize_to_string())
    print("train: predict is", predict.name)


def tagger(place):
    main, startup = fluid.Program(), fluid.Program()
    main.random_seed = startup.random_seed = 1
    with fluid.program_guard(main, startup), fluid.unique_name.guard():
        words = fluid.layers.data("words", [1], dtype="int64", lod_level=1)
        marks = fluid.layers.data("marks", [1], dtype="int64", lod_level=1)
        both = [
            fluid.layers.embedding(words, [ROWS, DIM], param_attr=uniform("word_emb")),
            fluid.layers.embedding(marks, [2, 2], param_attr=uniform("mark_emb")),
        ]
        x = fluid.layers.fc(fluid.layers.concat(both, axis=1), 12)
        x = fluid.layers.dynamic_gru(x, 4)
        emission = fluid.layers.fc(x, 5)
        target = fluid.layers.data("target", [1], dtype="int64", lod_level=1)
        loss = fluid.layers.mean(fluid.layers.linear_chain_crf(emission, target, param_attr=uniform("crfw")))
        tags = fluid.layers.crf_decoding(emission, param_attr=fluid.ParamAttr("crfw"))
        fluid.optimizer.SGD(0.1).minimize(loss)
    exe = started(startup)
    fluid.io.save_inference_model(place, ["words", "marks"], [tags, emission], exe, main, params_filename="__params__")


def loop(place):
    main, startup = fluid.Program(), fluid.Program()
    main.random_seed = startup.random_seed = 1
    with fluid.program_guard(main, startup), fluid.unique_name.guard():
        words = fluid.layers.data("words", [1], dtype="int64", lod_level=1)
        rows = fluid.layers.embedding(words, [ROWS, DIM])
        rnn = fluid.layers.DynamicRNN()
        with rnn.block():
            word, row = rnn.step_input(words), rnn.step_input(rows)
            again = fluid.layers.embedding(word, [ROWS, DIM])
            state = rnn.memory(shape=[DIM], value=0.0)
            new = fluid.layers.fc([row, again, state], DIM, act="tanh")
            rnn.update_memory(state, new)
            rnn.output(new)
        last = fluid.layers.sequence_last_step(rnn())
    fluid.io.save_inference_model(place, ["words"], [last], started(startup), main)


target = sys.argv[1]
lod(os.path.join(target, "paddle-185-lod"))
train(os.path.join(target, "paddle-185-train"))
tagger(os.path.join(target, "paddle-185-tagger"))
loop(os.path.join(target, "paddle-185-loop"))
