"""ctr-client: parsing and printing only."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvloop
from tqdm import tqdm

from cube.cli import conf_file, guarded, positive
from cube.config import settle
from cube.errors import BadConfig
from predictor.client.ctr import Scored, batches_of, score
from predictor.client.inference import AsyncClient
from predictor.pb.predictor_config_pb2 import ClientConfig

DEFAULT_CONF = Path("conf/client.prototxt")


def main(argv: Sequence[str] | None = None) -> int:
    """ctr-client."""
    parser = argparse.ArgumentParser(
        prog="ctr-client",
        description="Score Criteo lines with a predictor-server and print samples/s, latency, keys looked up and "
        "absent, and AUC. A line: label, 13 integers, 26 hexadecimal categories, tab separated, blanks allowed; or "
        "CSV with a header (label, I1..I13, C1..C26, Id ignored); .gz too.",
        epilog="Settings come from flags, then CLIENT_<FIELD> in the environment, then the file; its fields are "
        "described in proto/predictor_config.proto.",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="lines to score, - for standard input (default: `data` of the configuration)",
    )
    parser.add_argument(
        "--target", metavar="HOST:PORT", help="address of the predictor-server (default: 127.0.0.1:8500)"
    )
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: ctr)")
    parser.add_argument("--batch", type=positive, metavar="N", help="samples in one request (default: 50)")
    parser.add_argument("--concurrency", type=positive, metavar="N", help="requests in flight (default: 4)")
    parser.add_argument("--timeout-ms", type=positive, metavar="MS", help="deadline of one request (default: 10000)")
    parser.add_argument(
        "--scores", metavar="FILE", help="write the scores, one a line, as text or (.npy) as float32[n]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--conf", metavar="FILE", help=f"configuration (default: {DEFAULT_CONF} if it exists)")
    args = parser.parse_args(argv)

    def work() -> int:
        config = settle(ClientConfig(), conf_file(args.conf, DEFAULT_CONF), "CLIENT", os.environ, vars(args))
        given = args.file or config.data
        if not given:
            raise BadConfig("FILE", "none", "lines to score: a file, or - for standard input")
        path = Path("/dev/stdin" if given == "-" else given)
        target, model = config.target or "127.0.0.1:8500", config.model or "ctr"
        scored = _scored(path, target, model, config)
        if args.scores and args.scores.endswith(".npy"):
            np.save(args.scores, scored.scores)
        elif args.scores:
            np.savetxt(args.scores, scored.scores, "%.9g")
        print(json.dumps(scored.summary()) if args.json else _table(scored, path, target, model, config))
        return 0

    return guarded("ctr-client", work)


def _scored(path: Path, target: str, model: str, config: ClientConfig) -> Scored:
    async def run() -> Scored:
        async with AsyncClient(target) as client:
            with tqdm(unit="sample", unit_scale=True, desc="score", disable=None) as bar:
                batches = batches_of(path, config.batch or 50)
                timeout_s = (config.timeout_ms or 10_000) / 1e3
                return await score(client, model, batches, config.concurrency or 4, timeout_s, bar.update)

    try:
        return uvloop.run(run())
    except BaseExceptionGroup as group:  # of the workers' task group: the first one says enough
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _table(scored: Scored, path: Path, target: str, model: str, config: ClientConfig) -> str:
    s = scored.summary()
    tables = ", ".join(f"{name} {version}" for name, version in scored.table_versions.items())
    absent = f"{scored.keys_absent / scored.keys:.2%}" if scored.keys else "none"
    return "\n".join(
        [
            f"ctr-client: {len(scored.scores):,} samples of {path}"
            f" by {model} {scored.model_version} ({tables}) at {target}",
            f"  speed    {s['samples_per_s']:,.0f} samples/s, p50 {s['p50_ms']:.2f} ms, p99 {s['p99_ms']:.2f} ms"
            f" ({scored.requests:,} requests of {config.batch or 50}, {config.concurrency or 4} in flight)",
            f"  keys     {scored.keys:,} looked up, {scored.keys_absent:,} absent ({absent})",
            f"  AUC      {s['auc']:.4f}",
        ]
    )
