"""prune-program for Paddle programs. Without Paddle, but for the proof."""

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

from trainer_tools import paddle_proof, proof, prune_files
from trainer_tools.programs import paddle
from trainer_tools.programs.paddle import PaddleProgram
from trainer_tools.programs.program import Candidate, decide
from trainer_tools.prune_files import Cut, Prover, cut_of
from trainer_tools.pruning import Options, Report


def survey(directory: Path, options: Options) -> list[Candidate]:
    """Which lookups would go, and why."""
    return decide(paddle.load(directory).serving(options.fetch), options.rules)


def prune(directory: Path, out: Path, options: Options) -> Report:
    """Prune the program in `directory` into `out`; see prune_program.prune."""
    cut = cut_of(directory, paddle.load(directory), options)
    # What names no outputs cannot be run as it stands
    original = cut.program if options.fetch else cut.trained
    proof.check_random_ops(str(cut.trained.path), original.random_ops())
    return prune_files.prune(cut, out, options, _prover(options, cut, original))


def _prover(options: Options, cut: Cut[PaddleProgram], original: PaddleProgram) -> Prover:
    """The Python that has Paddle, if there is one."""
    python = options.paddle_python or os.environ.get("PADDLE_PYTHON")
    if not python and importlib.util.find_spec("paddle"):
        python = sys.executable
    expected = partial(paddle_proof.expected, python or "", original, cut)
    runs = partial(paddle_proof.runs, python, cut.pruned) if python else None
    return Prover(_missing(options, cut, python), expected, runs)


def _missing(options: Options, cut: Cut[PaddleProgram], python: str | None) -> str:
    """Why nothing is compared; empty if something is."""
    if not options.verify_samples:
        return "--verify 0"
    remote = sorted({lookup.table for lookup in cut.lookups} - set(cut.tables))
    if remote:
        return f"rows of {', '.join(remote)} are on a parameter server"
    return "" if python else "no Paddle here: --paddle PYTHON, one that has it"
