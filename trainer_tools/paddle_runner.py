"""Runs a Paddle program once. A script, for a Python that has Paddle 2.0 or newer; it imports nothing of ours.

    python paddle_runner.py DIR

DIR/job.json: {"program": file or directory, "parameters": file or null, "inputs": [{"name", "lod"}],
"outputs": [name]}. Input i is in DIR/in-i.npy; output i goes to DIR/out-i.npy, the LoD offsets of all to DIR/lods.json.
"""

import importlib
import json
import os
import sys
from typing import Any


def run(place: str) -> None:
    """One run as the program is written: no rewriting of its graph, one thread, no oneDNN."""
    import numpy as np

    os.environ.update(FLAGS_enable_pir_api="0")  # Paddle 3 reads a ProgramDesc only so
    inference: Any = importlib.import_module("paddle.inference")
    with open(os.path.join(place, "job.json")) as file:
        job = json.load(file)
    config = inference.Config(*[path for path in (job["program"], job["parameters"]) if path])
    config.disable_gpu()
    config.disable_glog_info()
    config.switch_ir_optim(False)
    config.set_cpu_math_library_num_threads(1)
    if hasattr(config, "disable_mkldnn"):
        config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    for number, given in enumerate(job["inputs"]):
        handle = predictor.get_input_handle(given["name"])
        handle.copy_from_cpu(np.load(os.path.join(place, f"in-{number}.npy")))
        if given["lod"]:
            handle.set_lod(given["lod"])
    predictor.run()
    lods = []
    for number, name in enumerate(job["outputs"]):
        handle = predictor.get_output_handle(name)
        np.save(os.path.join(place, f"out-{number}.npy"), handle.copy_to_cpu())
        lods.append(handle.lod())
    with open(os.path.join(place, "lods.json"), "w") as file:
        json.dump(lods, file)


if __name__ == "__main__":
    run(sys.argv[1])
