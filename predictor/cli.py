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
BATCHING = ("adaptive", "off")


def server(argv: Sequence[str] | None = None) -> int:
    """predictor-server."""
    parser = argparse.ArgumentParser(
        prog="predictor-server",
        description="Serve models over gRPC (Open Inference Protocol v2, as KServe and Triton speak it): what "
        "prune-program wrote, or any torch.export, ONNX or Paddle program. Once it answers it prints one line: where "
        "it listens, what it serves, which versions. Ctrl-C stops it.",
        epilog="Settings come from flags, then PREDICTOR_<FIELD> in the environment, then the file; its fields are "
        "described in proto/predictor_config.proto.",
    )
    parser.add_argument("--model", action="append", metavar="DIR", help="directory to serve; may be repeated")
    parser.add_argument(
        "--conf",
        metavar="PLACE",
        help="a directory with service.prototxt, workflow.prototxt ... (see predictor/config.py), or a file "
        f"(default: {DEFAULT_CONF} if it exists and no --model is given)",
    )
    parser.add_argument(
        "--flagfile", metavar="FILE", help="flags of such a directory, --name=value; go before its gflags.conf"
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
    parser.add_argument(
        "--slow-request-ms", type=positive, metavar="MS",
        help="requests that take longer get a line in the log (default: none does)",
    )  # fmt: skip
    parser.add_argument(
        "--tracer-interval-s", type=positive, metavar="S",
        help="every so often a table of where the time goes (default: never)",
    )  # fmt: skip
    parser.add_argument("--tracer-file", metavar="FILE", help="what these tables are appended to (default: the log)")
    parser.add_argument(
        "--otel-endpoint", metavar="URL", help="where OpenTelemetry spans of requests go (default: nowhere)"
    )
    parser.add_argument(
        "--batching", choices=BATCHING,
        help="merge requests that wait at the same time: adaptive (default; nobody waits for company) or off",
    )  # fmt: skip
    parser.add_argument("--batch-max-samples", type=positive, metavar="N", help="largest batch (default: 4096)")
    parser.add_argument(
        "--batch-max-delay-ms", type=positive, metavar="MS", help="longest wait for company (default: none)"
    )
    parser.add_argument(
        "--allow-recording", action="store_true", default=None,
        help="hand requests of callers to whoever asks for /debug/record (default: to nobody)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="load everything, serve nothing")
    args = parser.parse_args(argv)

    def leave_if_computing(status: int) -> None:
        """The interpreter would wait for a run, or a model's loading, that nobody waits for any more."""
        from predictor.server import is_computing

        if is_computing():
            sys.stdout.flush()
            os._exit(status)

    def work() -> int:
        from predictor import server as predictor_server  # here, so that --help does not wait for it
        from predictor.assembly import outlined
        from predictor.config import load

        is_directory = bool(args.flagfile or (args.conf and Path(args.conf).is_dir()))
        default = None if args.model or is_directory else conf_file(None, DEFAULT_CONF)
        file = Path(args.conf) if args.conf and not is_directory else default
        config = settle(PredictorConfig(), file, "PREDICTOR", os.environ, vars(args))
        log_to_stderr("predictor-server", config.log or FORMS[0])
        said = load(args.conf and Path(args.conf), args.flagfile and Path(args.flagfile)) if is_directory else None
        config = predictor_server.checked(config, said)
        if args.check:
            try:
                loaded = asyncio.run(predictor_server.check(config, said))
            except KeyboardInterrupt:
                leave_if_computing(130)
                raise
            print(
                f"predictor-server: would serve {', '.join(f'{m.name} {m.version}' for m in loaded)} on {config.listen}"
            )
            if said is not None:
                print("\n".join(line for service in loaded for line in outlined(service)))
            return 0
        predictor_server.serve(config, said)
        leave_if_computing(0)
        return 0

    log_to_stderr("predictor-server")
    return guarded("predictor-server", work)
