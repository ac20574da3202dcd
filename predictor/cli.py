"""predictor-server: parsing and printing only."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cube.cli import conf_file, guarded, positive
from cube.config import settle
from cube.logs import FORMS, log_to_stderr
from cube.rpc.process import DOORS
from predictor.pb.predictor_config_pb2 import PredictorConfig

DEFAULT_CONF = Path("conf/predictor.prototxt")


def server(argv: Sequence[str] | None = None) -> int:
    """predictor-server."""
    parser = argparse.ArgumentParser(
        prog="predictor-server",
        description="Serve models over gRPC (Open Inference Protocol v2, as KServe and Triton speak it): what "
        "prune-program wrote, or any torch.export program. Once it answers it prints one line: where it listens, what "
        "it serves, which versions. Ctrl-C stops it.",
        epilog="Settings come from flags, then PREDICTOR_<FIELD> in the environment, then the file; its fields are "
        "described in proto/predictor_config.proto.",
    )
    parser.add_argument("--model", action="append", metavar="DIR", help="directory to serve; may be repeated")
    parser.add_argument(
        "--conf", metavar="FILE", help=f"configuration (default: {DEFAULT_CONF} if it exists and no --model is given)"
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="address to listen on; port 0 takes a free one (default: 127.0.0.1:8500)"
    )
    parser.add_argument(
        "--cube",
        metavar="CUBE",
        help="cube.prototxt, cube.conf of the ancestor, or the shards, separated by commas, replicas of a shard by | "
        "(default: the model's local cube)",
    )
    parser.add_argument(
        "--cube-token-file", metavar="FILE", help="what the cube's servers demand to see (default: nothing)"
    )
    parser.add_argument(
        "--cube-tls-ca", metavar="FILE", help="whom to trust of them, PEM, or system; turns TLS on (default: no TLS)"
    )
    parser.add_argument(
        "--cube-tls-cert", metavar="FILE", help="certificate to show to those that ask, PEM (default: none)"
    )
    parser.add_argument("--cube-tls-key", metavar="FILE", help="its key, PEM (default: none)")
    parser.add_argument(
        "--cube-cache-mb", type=positive, metavar="MB",
        help="memory for rows of a remote cube that are asked for often (default: no cache)",
    )  # fmt: skip
    parser.add_argument(
        "--max-samples", type=positive, metavar="N", help="largest number of samples in one request (default: 65536)"
    )
    parser.add_argument(
        "--cube-wait-s", type=positive, metavar="S", help="longest wait for the cube at start (default: 30)"
    )
    parser.add_argument(
        "--cube-timeout-ms",
        type=positive,
        metavar="MS",
        help="longest wait for the rows of one request (default: 2000)",
    )
    parser.add_argument(
        "--compute-threads", type=positive, metavar="N", help="requests computed at once (default: the number of cores)"
    )
    parser.add_argument(
        "--grpc",
        choices=DOORS,
        help="what carries gRPC: lean, one port for gRPC and HTTP (default), or grpcio, its twin: gRPC only, dearer",
    )
    parser.add_argument("--log", choices=FORMS, help="how lines of the log look (default: text)")
    parser.add_argument("--check", action="store_true", help="load everything, serve nothing")
    args = parser.parse_args(argv)

    def work() -> int:
        from predictor import server as predictor_server  # here, so that --help does not wait for torch

        default = None if args.model else conf_file(None, DEFAULT_CONF)
        conf = Path(args.conf) if args.conf else default
        config = predictor_server.checked(settle(PredictorConfig(), conf, "PREDICTOR", os.environ, vars(args)))
        log_to_stderr("predictor-server", config.log or FORMS[0])
        if args.check:
            loaded = asyncio.run(predictor_server.check(config))
            print(
                f"predictor-server: would serve {', '.join(f'{m.name} {m.version}' for m in loaded)} on {config.listen}"
            )
            return 0
        predictor_server.serve(config)
        if predictor_server.is_computing():
            sys.stdout.flush()
            os._exit(0)  # the interpreter would wait for a run that nobody waits for any more
        return 0

    log_to_stderr("predictor-server")
    return guarded("predictor-server", work)
