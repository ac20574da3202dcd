"""model.py of tritonserver's python backend: the benchmark's small MLP in numpy, KServe v2 over HTTP JSON.

python3 -m venv V && V/bin/pip install nvidia-pytriton     # Debian's python3, whose libpython its stub is built for
TRITON_VENV=V make bench WHAT=http_peers
"""

import os
import sys
from pathlib import Path

sys.path.append(os.environ["TRITON_SITE_PACKAGES"])  # its interpreter is isolated
import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    """relu layers, the last one linear."""

    def initialize(self, args):
        with np.load(Path(args["model_repository"]) / "mlp.npz") as weights:
            self.layers = [(weights[f"w{i}"], weights[f"b{i}"]) for i in range(len(weights.files) // 2)]

    def execute(self, requests):
        inputs = [triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        x = np.concatenate(inputs)
        for number, (weight, bias) in enumerate(self.layers):
            x = x @ weight + bias
            if number < len(self.layers) - 1:
                x = np.maximum(x, 0)
        ends = np.cumsum([len(part) for part in inputs])
        replies = np.split(x.astype(np.float32), ends[:-1])
        return [triton.InferenceResponse([triton.Tensor("y", reply)]) for reply in replies]
