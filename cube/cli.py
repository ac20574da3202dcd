"""cube-server, cube-build, cube-ctl: parsing and printing only."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cube import build as builder
from cube import server as cube_server
from cube.config import settle
from cube.errors import BadConfig, ServingError
from cube.keys import ShardRule
from cube.logs import FORMS, log_to_stderr
from cube.pb.cube_config_pb2 import CubeConfig
from cube.rows import RowFormat
from cube.rpc.process import DOORS
from cube.sources import open_source
from cube.storage.engines import ENGINES
from cube.version import Version

DEFAULT_CONF = Path("conf/cube.prototxt")


def guarded(program: str, work: Callable[[], int]) -> int:
    """Run a command: 0 done, 1 could not (one line on standard error), 130 interrupted."""
    try:
        return work()
    except (ServingError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """A flag's number, at least 1: 0 would read as a field that is not set, so as the default."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def conf_file(given: str | None, default: Path) -> Path | None:
    """The configuration file to read: the one named, else the default one if it is there."""
    return Path(given) if given else (default if default.exists() else None)


def server(argv: Sequence[str] | None = None) -> int:
    """cube-server."""
    parser = argparse.ArgumentParser(
        prog="cube-server",
        description="Serve one shard of a cube: rows of embedding tables by 64-bit key, over gRPC. Once it answers it "
        "prints one line: where it listens, what it serves, which versions. Ctrl-C stops it.",
        epilog="Settings come from flags, then CUBE_<FIELD> in the environment, then the file; its fields are "
        "described in conf/cube.prototxt. Without a file: "
        "cube-server --shard 0 --shards 2 --data cube-data --listen 127.0.0.1:0",
    )
    parser.add_argument("--shard", type=int, required=True, metavar="N", help="which shard to serve, from 0")
    parser.add_argument("--conf", metavar="FILE", help=f"configuration (default: {DEFAULT_CONF} if it exists)")
    parser.add_argument("--data", metavar="DIR", help="where cube-build put the segments (default: cube-data)")
    parser.add_argument("--shards", type=int, metavar="N", help="number of shards, where no configuration lists them")
    parser.add_argument(
        "--shard-rule",
        choices=[rule.text for rule in ShardRule],
        help="which keys are which shard's, as the files were built: mix (default) or modulo",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="address to listen on; port 0 takes a free one (default: the shard's)"
    )
    parser.add_argument(
        "--keep-versions", type=positive, metavar="N", help="newest versions of each table kept open (default: 2)"
    )
    parser.add_argument(
        "--max-keys", type=positive, metavar="N", help="largest number of keys in one call (default: 4194304)"
    )
    parser.add_argument(
        "--verify",
        choices=cube_server.VERIFY,
        help="compare the checksums of all rows: in the background while they are served (default), first, or off",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        default=None,
        help="copy rows to memory, in huge pages, instead of mapping "
        "the files: faster lookups, slower start, nothing shared between processes",
    )
    parser.add_argument(
        "--grpc",
        choices=DOORS,
        help="what carries gRPC: lean, one port for gRPC and HTTP (default), or grpcio, its twin: gRPC only, dearer",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes on the one port, over the same files (default: 1)"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="bearer tokens, one a line: callers must show one (default: none needed)"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM file of the certificate chain (default: no TLS)")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM file of its key")
    parser.add_argument(
        "--tls-client-ca", metavar="FILE", help="PEM file of the authorities that clients' certificates must come from"
    )
    parser.add_argument(
        "--legacy-table",
        metavar="NAME",
        help="what /DictService and /ControlService are about (default: the only table, if there is one)",
    )
    parser.add_argument("--log", choices=FORMS, help="how lines of the log look (default: text)")
    parser.add_argument("--check", action="store_true", help="check settings and files, serve nothing")
    args = parser.parse_args(argv)

    def work() -> int:
        config = settle(
            CubeConfig(), conf_file(args.conf, DEFAULT_CONF), "CUBE", os.environ, vars(args) | {"shard": None}
        )
        log_to_stderr("cube-server", config.log or FORMS[0])
        if args.shards is not None:
            if args.shards < 1:
                raise BadConfig("--shards", args.shards, "at least 1")
            del config.shard[args.shards :]
            config.shard.extend(CubeConfig().shard.add() for _ in range(args.shards - len(config.shard)))
        config = cube_server.checked(config, args.shard)
        if args.check:
            tables, where = cube_server.check(config, args.shard), f"shard {args.shard} of {len(config.shard)}"
            print(f"cube-server: {where} would serve {', '.join(tables)} on {config.listen}")
            return 0
        cube_server.serve(config, args.shard)
        return 0

    log_to_stderr("cube-server")
    return guarded("cube-server", work)


def build(argv: Sequence[str] | None = None) -> int:
    """cube-build."""
    parser = argparse.ArgumentParser(
        prog="cube-build",
        description="Build what cube-server serves: the rows of one version of one table, in one store per shard, "
        "published together as OUT/TABLE/VERSION/<shard>-of-<shards>.seg. Memory stays within --memory whatever the "
        "table's size; a build that was interrupted goes on where it was when it is asked for again.",
        epilog="ROWS are fsspec paths (local, s3://, gs://, hdfs://, memory:// ...), globs or directories of: keys.npy "
        "+ rows.npy (as prune-program writes them), Parquet, Arrow IPC, safetensors, or sequence files of Paddle's "
        "cube builder. Of rows with the same key the last wins.",
    )
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="where the rows are, in this order")
    parser.add_argument("--table", required=True, metavar="NAME", help="name of the table")
    parser.add_argument(
        "--version", required=True, metavar="BASE@DELTA", help="version of these rows, such as 1763766000@0"
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of shards (default: 1)")
    parser.add_argument(
        "--shard-rule", default="mix", choices=[rule.text for rule in ShardRule],
        help="which keys are which shard's: mix (default, even) or modulo (key %% shards, as in Paddle Serving)",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="cube-data", metavar="DIR", help="where the cube's files are (default: cube-data)"
    )
    parser.add_argument(
        "--format", default="f32", choices=[f.text for f in RowFormat],
        help="how rows are stored: f32 (default), f16, bf16, or i8 with a scale and a bias per row",
    )  # fmt: skip
    parser.add_argument(
        "--key-column", default="key", metavar="NAME", help="Parquet, Arrow, safetensors (default: key)"
    )
    parser.add_argument(
        "--row-column", default="row", metavar="NAME", help="Parquet, Arrow, safetensors (default: row)"
    )
    parser.add_argument(
        "--default-row",
        metavar="X,X,...",
        help="what absent keys read: one number for every element, or for all of them",
    )
    parser.add_argument(
        "--reject-nan", action="store_true", help="refuse rows with a NaN or an infinity (default: keep and count them)"
    )
    parser.add_argument(
        "--memory", type=mebibytes, default=builder.DEFAULT_MEMORY, metavar="SIZE",
        help="memory for rows, such as 800M or 4G; engines other than segment take some beside it "
        f"(default: {builder.DEFAULT_MEMORY >> 30}G)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument(
        "--engine", default="segment", choices=list(ENGINES), help="what holds the rows (default: segment, the fastest)"
    )
    parser.add_argument(
        "--url", default="", help="of the server, for --engine redis: redis://host:port, redis+cluster://..."
    )
    parser.add_argument("--restart", action="store_true", help="begin anew where an interrupted build would go on")
    args = parser.parse_args(argv)

    def work() -> int:
        version = Version.parse(args.version, "--version")
        source = open_source(args.rows, args.key_column, args.row_column)
        options = builder.Options(
            args.shards, RowFormat.parse(args.format), args.engine, args.url,
            _default_row(args.default_row, source.dim), args.reject_nan, args.memory, args.workers, args.restart,
            ShardRule.parse(args.shard_rule),
        )  # fmt: skip
        with _Bars(args.table) as bars:
            built = builder.build(source, Path(args.out), args.table, version, options, bars)
        counts = ", ".join(f"{n:,}" for n in built.keys_by_shard)
        print(f"cube-build: {built.directory}: {counts} rows by shard, {built.duplicates:,} duplicate keys replaced")
        if built.not_finite:
            print(f"cube-build: {built.not_finite:,} rows hold a NaN or an infinity (--reject-nan refuses them)")
        return 0

    return guarded("cube-build", work)


class _Bars:
    """A progress bar for each stage of a build."""

    def __init__(self, table: str):
        self._table, self._bars, self._stack = table, dict[str, Any](), contextlib.ExitStack()

    def __call__(self, stage: str, rows: int, of: int) -> None:
        if stage not in self._bars:
            bar = tqdm(total=of, unit="row", unit_scale=True, desc=f"{self._table} {stage}", disable=None)
            self._bars[stage] = self._stack.enter_context(bar)
        self._bars[stage].update(rows)

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def mebibytes(text: str) -> int:
    """A flag's size: a number with M or G after it, in bytes."""
    number, unit = text[:-1], {"M": 20, "G": 30}.get(text[-1:].upper())
    if unit is None or not (number.isascii() and number.isdigit()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 800M or 4G")
    return int(number) << unit


def _default_row(text: str | None, dim: int) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BadConfig("--default-row", repr(text), "numbers separated by commas") from error
    return numbers * dim if len(numbers) == 1 else numbers
