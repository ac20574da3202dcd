"""TensorFlow Recommenders Addons: its in-memory hash table, by key.

python3 -m venv V && V/bin/pip install tensorflow-recommenders-addons 'keras<3.4' 'tf-keras~=2.16.0'
TFRA_PYTHON=V/bin/python make bench WHAT=lookup
"""

import json
import os
import sys
import time
from pathlib import Path

ANSWERS = os.fdopen(os.dup(1), "w")  # what libraries print, even while they are imported, goes to standard error
os.dup2(2, 1)
os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
import numpy as np
import tensorflow as tf
import tensorflow_recommenders_addons as tfra


def main():
    place, batch = Path(sys.argv[1]), int(sys.argv[2])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    rows, keys = np.load(place / "rows.npy"), np.load(place / "keys.npy").view(np.int64)
    asked = np.load(place / "asked.npy")
    begin = time.perf_counter()
    table = tfra.dynamic_embedding.CuckooHashTable(
        tf.int64, tf.float32, tf.zeros(rows.shape[1]), init_size=len(keys) * 2
    )
    for start in range(0, len(keys), 1 << 18):
        table.insert(tf.constant(keys[start : start + (1 << 18)]), tf.constant(rows[start : start + (1 << 18)]))
    ready = {"f32": time.perf_counter() - begin}
    parts = [tf.constant(keys[asked[start : start + batch]]) for start in range(0, len(asked), batch)]
    got = np.concatenate([table.lookup(part).numpy() for part in parts])
    assert np.array_equal(got, rows[asked])
    print(json.dumps({"ready": ready}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        assert json.loads(line)["run"] == "f32"
        begin = time.perf_counter()
        for part in parts:
            table.lookup(part)
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
