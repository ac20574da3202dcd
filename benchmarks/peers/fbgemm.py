"""torchrec's inference kernels (fbgemm), float32 and 8-bit rows, on row numbers: nothing is hashed.

python3 -m venv V && V/bin/pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy
FBGEMM_PYTHON=V/bin/python make bench WHAT=lookup
"""

import json
import os
import sys
import time
from pathlib import Path

ANSWERS = os.fdopen(os.dup(1), "w")  # what libraries print, even while they are imported, goes to standard error
os.dup2(2, 1)
import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen


def table(rows, kind):
    n, dim = rows.shape
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", n, dim, kind, EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32
    )
    made.fill_random_weights()
    weights, parameters = made.split_embedding_weights()[0]
    if kind is SparseType.FP32:
        weights.copy_(rows.view(torch.uint8))
    else:
        low = rows.min(dim=1, keepdim=True).values
        halves = torch.cat([(rows.max(dim=1, keepdim=True).values - low) / 255, low], dim=1).half()
        scale, bias = halves.float().split(1, dim=1)
        weights.copy_(((rows - bias) / scale).round().clamp(0, 255).byte())
        parameters.copy_(halves.view(torch.uint8))
    return made


def main():
    place, batch = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    rows, asked = torch.from_numpy(np.load(place / "rows.npy")), torch.from_numpy(np.load(place / "asked.npy"))
    bags = torch.arange(batch + 1)
    parts = [(part, bags[: part.numel() + 1]) for part in asked.split(batch)]
    ready, runs = {}, {}
    with torch.inference_mode():
        for name, kind in (("f32", SparseType.FP32), ("i8", SparseType.INT8)):
            begin = time.perf_counter()
            made = table(rows, kind)
            ready[name] = time.perf_counter() - begin
            got = torch.cat([made(part, offsets) for part, offsets in parts])
            difference = (got - rows[asked]).abs().max().item()
            assert difference <= (0 if name == "f32" else 0.05), (name, difference)
            runs[name] = made
        print(json.dumps({"ready": ready}), file=ANSWERS, flush=True)
        for line in sys.stdin:
            made = runs[json.loads(line)["run"]]
            begin = time.perf_counter()
            for part, offsets in parts:
                made(part, offsets)
            print(json.dumps({"seconds": time.perf_counter() - begin}), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
