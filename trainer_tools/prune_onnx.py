"""prune-program for ONNX programs."""

import importlib.util
from functools import partial
from pathlib import Path

from trainer_tools import onnx_proof, proof, prune_files
from trainer_tools.programs import onnx_program
from trainer_tools.programs.program import Candidate, decide
from trainer_tools.prune_files import Prover, cut_of
from trainer_tools.pruning import Options, Report


def survey(place: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    return decide(onnx_program.load(place).serving(options.fetch), options.rules)


def prune(place: Path, out: Path, options: Options) -> Report:
    """Prune the program in a directory, or in a file, into `out`; see prune_program.prune."""
    cut = cut_of(place, onnx_program.load(place), options)
    proof.check_random_ops(str(cut.trained.path), cut.program.random_ops())
    has_runtime = importlib.util.find_spec("onnxruntime") is not None
    missing = "" if has_runtime else "no onnxruntime here: pip install 'cube-serving[onnx]'"
    runs = partial(onnx_proof.runs, cut.pruned) if has_runtime else None
    missing = missing if options.verify_samples else "--verify 0"
    prover = Prover(missing, partial(onnx_proof.expected, cut), runs, partial(onnx_proof.outside, cut))
    return prune_files.prune(cut, out, options, prover)
