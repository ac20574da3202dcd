"""mosec serving the benchmark's small MLP over HTTP JSON: {"x": [[...], ...]} → {"y": [[...], ...]}.

python3 -m venv V && V/bin/pip install mosec torch==2.13.0 numpy
MOSEC_PYTHON=V/bin/python make bench WHAT=http_peers
"""

import os

import numpy as np
import torch
from mosec import Server, Worker

torch.set_num_threads(1)


class Mlp(Worker):
    """The net; with MOSEC_BATCH above 1 mosec merges requests."""

    def __init__(self):
        super().__init__()
        self.net = torch.export.load(os.environ["MLP"]).module()

    def forward(self, data):
        many = isinstance(data, list)
        requests = data if many else [data]
        x = torch.from_numpy(np.concatenate([np.array(request["x"], np.float32) for request in requests]))
        with torch.inference_mode():
            y = self.net(x)["y"].numpy()
        ends = np.cumsum([len(request["x"]) for request in requests])
        replies = [{"y": part.tolist()} for part in np.split(y, ends[:-1])]
        return replies if many else replies[0]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Mlp, num=1, max_batch_size=int(os.environ["MOSEC_BATCH"]), max_wait_time=2)
    server.run()
