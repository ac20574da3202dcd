"""What cube-server counts, and how Prometheus reads it.

Every process of a server counts in a row of numbers of its own, in memory that all of them share since before the fork.
So whichever of them is asked for /metrics adds up the rows by itself: no files, no questions to others, nothing lost.
Counting is the addition of integers; everything else happens when somebody asks.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cube.errors import BadConfig
from cube.rpc.calls import GRPC_CODES
from cube.rpc.listener import Listener
from cube.table import Table

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
MOST_TABLES = 1_024  # of one server: the memory is set aside before it is known which there are

_SECONDS = [1e-5 * 2**n for n in range(17)]  # upper ends of buckets: 10 µs to 0.66 s
_KEYS = [float(1 << n) for n in range(23)]  # 1 to 4,194,304
_CODES = list(GRPC_CODES)

# The places of a row.
_SECONDS_OVER = len(_SECONDS)  # buckets from 0; this one is for what is above all ends
_NANOSECONDS = _SECONDS_OVER + 1  # of all lookups
_KEYS_AT = _NANOSECONDS + 1
_KEYS_OVER = _KEYS_AT + len(_KEYS)
_CODES_AT = _KEYS_OVER + 1
_PID = _CODES_AT + len(_CODES)
_OPEN, _ACCEPTED, _REFUSED, _HANDSHAKES, _BYTES_IN, _BYTES_OUT = range(_PID + 1, _PID + 7)
_TABLES_AT = _BYTES_OUT + 1  # for each table, in the order of names: keys found, keys absent
_ROW = _TABLES_AT + 2 * MOST_TABLES


class Counts:
    """One process's row."""

    __slots__ = ("_row",)

    def __init__(self, row: "memoryview[int]"):
        self._row = row

    def begin(self) -> None:
        """To be called by the process that counts here."""
        self._row[_PID] = os.getpid()

    def lookup(self, keys: int, seconds: float) -> None:
        """A lookup of so many keys was answered in so many seconds."""
        row = self._row
        bucket = (math.ceil(seconds * 1e5) - 1).bit_length() if seconds > 0 else 0
        row[bucket if bucket < _SECONDS_OVER else _SECONDS_OVER] += 1
        row[_NANOSECONDS] += int(seconds * 1e9)
        bucket = _KEYS_AT + ((keys - 1).bit_length() if keys else 0)
        row[bucket if bucket < _KEYS_OVER else _KEYS_OVER] += 1

    def refusal(self, code: str) -> None:
        """A call ended with a gRPC status; HTTP's are counted as the gRPC status they stand for."""
        self._row[_CODES_AT + GRPC_CODES[code]] += 1

    def table(self, number: int) -> "memoryview[int]":
        """Where keys of a table are counted, found and absent; number: of the tables in the order of names."""
        at = _TABLES_AT + 2 * number
        return self._row[at : at + 2]

    def port(self, listener: Listener) -> None:
        """What has become of connections so far."""
        row = self._row
        row[_OPEN], row[_ACCEPTED], row[_REFUSED] = listener.open, listener.accepted, listener.refused
        row[_HANDSHAKES] = listener.failed_handshakes
        row[_BYTES_IN], row[_BYTES_OUT] = listener.bytes_in, listener.bytes_out


class Telemetry(Collector):
    """The counts of all processes of a server. Made before they are forked."""

    def __init__(self, workers: int):
        self._memory = memoryview(mmap.mmap(-1, 8 * _ROW * workers)).cast("q")
        self._rows = [self._memory[n * _ROW : (n + 1) * _ROW] for n in range(workers)]
        self._tables: dict[str, Table] = {}
        self._registry = prometheus_client.CollectorRegistry(auto_describe=False)

    def counts(self, worker: int) -> Counts:
        """The row of one process."""
        return Counts(self._rows[worker])

    def begin(self, worker: int, tables: dict[str, Table]) -> Counts:
        """Count in the row of this process from now on; tables: those of /metrics, the same in every process.

        Raises BadConfig for more than MOST_TABLES.
        """
        if len(tables) > MOST_TABLES:
            raise BadConfig("tables", f"{len(tables):,}", f"at most {MOST_TABLES:,} in one server")
        self._tables = dict(sorted(tables.items()))
        counts = self.counts(worker)
        counts.begin()
        for number, table in enumerate(self._tables.values()):
            table.count_in(counts.table(number))
        self._registry.register(self)
        return counts

    def totals(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """Lookups that all processes have answered, and of each table the keys that they found and did not find."""
        rows = self._rows
        by_table = {
            name: (sum(row[at] for row in rows), sum(row[at + 1] for row in rows))
            for at, name in zip(range(_TABLES_AT, _ROW, 2), self._tables, strict=False)
        }
        return sum(sum(row[:_NANOSECONDS]) for row in rows), by_table

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Counters and histograms of all processes together; memory and CPU of each."""
        used = _TABLES_AT + 2 * len(self._tables)
        total = [sum(column) for column in zip(*(row[:used] for row in self._rows), strict=True)]
        yield _histogram(
            "cube_lookup_seconds", "time of a lookup from its keys to its rows",
            _SECONDS, total[:_NANOSECONDS], total[_NANOSECONDS] / 1e9,
        )  # fmt: skip
        # Every key of a lookup is found or absent in a table: their sum is counted there.
        yield _histogram(
            "cube_lookup_keys", "keys of a lookup", _KEYS, total[_KEYS_AT:_CODES_AT], sum(total[_TABLES_AT:])
        )
        for name, text, at in (
            ("bytes_in", "bytes received, as on the wire", _BYTES_IN),
            ("bytes_out", "bytes sent, as on the wire", _BYTES_OUT),
            ("connections_accepted", "connections accepted", _ACCEPTED),
            ("connections_refused", "connections over the limit", _REFUSED),
            ("handshakes_failed", "connections that did not get as far as a request", _HANDSHAKES),
        ):
            yield CounterMetricFamily(f"cube_{name}", text, value=total[at])
        yield GaugeMetricFamily("cube_connections", "connections that are open", value=total[_OPEN])
        lookups = sum(total[:_NANOSECONDS])
        yield CounterMetricFamily("cube_lookups", "lookups that were answered", value=lookups)
        refusals = CounterMetricFamily(
            "cube_refusals", "calls that ended with a status other than OK", labels=["status"]
        )
        for code, count in zip(_CODES, total[_CODES_AT:_PID], strict=True):
            if count:
                refusals.add_metric([code], count)
        yield refusals
        yield from self._about_tables(total)
        yield from self._about_processes()

    def _about_tables(self, total: list[int]) -> Iterator[Metric]:
        keys = CounterMetricFamily("cube_keys", "keys that were asked for", labels=["table", "found"])
        rows = GaugeMetricFamily(
            "cube_table_rows", "rows of a version that is loaded", labels=["table", "version", "current"]
        )
        for number, table in enumerate(self._tables.values()):
            found, absent = total[_TABLES_AT + 2 * number : _TABLES_AT + 2 * number + 2]
            keys.add_metric([table.name, "true"], found)
            keys.add_metric([table.name, "false"], absent)
            for store in table.stores:
                version = store.about.version
                current = "true" if version == table.current else "false"
                rows.add_metric([table.name, str(version), current], len(store))
        yield from (keys, rows)

    def _about_processes(self) -> Iterator[Metric]:
        resident = GaugeMetricFamily(
            "cube_worker_resident_bytes",
            "memory of a process, shared memory included",
            labels=["worker"],
        )
        cpu = CounterMetricFamily("cube_worker_cpu_seconds", "processor time of a process", labels=["worker"])
        for number, row in enumerate(self._rows):
            with contextlib.suppress(OSError):  # it has ended
                resident.add_metric([str(number)], _resident_bytes(row[_PID]))
                cpu.add_metric([str(number)], _cpu_s(row[_PID]))
        yield from (resident, cpu)


def _histogram(name: str, text: str, ends: Iterable[float], counts: list[int], total: float) -> Metric:
    """counts: of each bucket, one more than there are ends."""
    below, buckets = 0, []
    for end, count in zip([*map(repr, ends), "+Inf"], counts, strict=True):
        below += count
        buckets.append((end, below))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:  # the name, in parentheses, may hold anything
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
