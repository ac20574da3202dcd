"""The table of where the time goes, to the letter."""

import asyncio
import logging
import shutil

import numpy as np
import pytest
from small_services import Add, ask, chain, service_of

from predictor.profile.counts import BITS, RequestCounts, RunTotals
from predictor.profile.snapshot import LaneSnapshot, ServiceSnapshot, Snapshot, snapshot
from predictor.profile.tracer import table, trace


def totals_of(runs, nodes, waits=0):
    """nodes: for each, its runs and milliseconds of its phases."""
    zeros = np.zeros(BITS, np.int64)
    phases = np.array([[ms * 1e6 for ms in phases] for _, phases in nodes]).astype(np.int64)
    return RunTotals(
        runs=runs, rows=50 * runs, run_ns=0, runs_by_ns=zeros, runs_by_rows=zeros, waits_by_ns=zeros + waits // BITS,
        wait_ns=waits * 2_000_000, node_runs=np.array([n for n, _ in nodes]), node_ns=phases[:, 1:4].sum(axis=1),
        nodes_by_ns=np.zeros((len(nodes), BITS), np.int64), phases_ns=phases, failures={},
    )  # fmt: skip


def snapshot_of(at, totals, requests, waiting=0, version="3"):
    lane = LaneSnapshot(
        "ctr", ("gather", "infer"), totals, waiting // 8, 4, waiting, 65536, 0, 0, {"infer": {"busy": 2}}
    )
    return Snapshot(at, 0, (ServiceSnapshot("ctr", version, requests, 0, (lane,)),))


def requests_of(ok, ns=0, **codes):
    counts = RequestCounts()
    for each in range(ok):
        counts.answered(ns or 1_000_000 * (each + 1), 50)
    return counts.totals()._replace(by_code={"OK": ok, **codes})


def test_the_table_is_what_happened_between_two_snapshots():
    before = snapshot_of(100.0, totals_of(1, [(1, [0, 0, 1, 0, 0]), (1, [0, 0, 1, 0, 0])]), requests_of(0))
    nodes = [(101, [2, 10, 1001, 30, 40]), (101, [5, 20, 8001, 60, 10_000])]
    after = snapshot_of(
        110.0, totals_of(101, nodes, waits=128), requests_of(100, OVERLOADED=20, CANCELLED=5, INTERNAL=0), waiting=16
    )
    assert table(before, after) == (
        "==================== TRACER ==================== ctr 3, 10.0 s\n"
        "Node (workflow ctr)         runs     in ms   prep ms    run ms   post ms    out ms    idle\n"
        "  gather                     100     0.020     0.100    10.000     0.300     0.400   0.896\n"
        "  infer                      100     0.050     0.200    80.000     0.600   100.000   0.192\n"
        "Requests\n"
        "  Query count[125] QPS[12.5] Rows[5000] Succ[0.800] Error req[CANCELLED 5, OVERLOADED 20]\n"
        "  Latency ms: ave[50.500] .50[49.283] .60[59.769] .70[69.206]"
        " .80[81.789] .90[90.178] .95[94.372] .99[98.566]\n"
        "Queues\n"
        "  ctr: rows waiting[16/65536] runs in flight[2/4] wait[2.000 ms] batch[50.0 rows]\n"
        "  ctr.infer: busy[2]"
    )


def test_an_interval_without_requests_is_a_line():
    nothing = snapshot_of(5.0, totals_of(0, [(0, [0] * 5), (0, [0] * 5)]), requests_of(0))
    later = nothing._replace(at=9.0)
    assert table(nothing, later) == "==================== TRACER ==================== ctr 3, 4.0 s: no requests"


def test_a_table_of_requests_none_of_which_has_ended_has_no_division_by_zero():
    nothing = snapshot_of(5.0, totals_of(0, [(0, [0] * 5), (0, [0] * 5)]), requests_of(0))
    waiting = nothing._replace(services=(nothing.services[0]._replace(in_flight=1),))
    text = table(nothing, waiting)
    assert "Query count[0] QPS[0.0] Rows[0] Succ[1.000] Error req[]" in text
    assert ".99[0.000]" in text
    assert "infer                        0     0.000     0.000     0.000     0.000     0.000   0.000" in text


def test_a_service_that_was_not_there_before_gets_its_table_next_time():
    before = snapshot_of(1.0, totals_of(0, [(0, [0] * 5), (0, [0] * 5)]), requests_of(0), version="2")
    after = snapshot_of(2.0, totals_of(9, [(9, [0] * 5), (9, [0] * 5)]), requests_of(0), version="3")
    assert table(before, after) == ""


def test_tables_go_to_the_log_or_to_a_file_and_a_bad_file_ends_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def main():
        tracing = [
            asyncio.ensure_future(trace(lambda: snapshot([service]), 0.02, file))
            for file in (None, tmp_path / "tables", tmp_path / "none" / "tables")
        ]
        await ask(service, 5)
        tables = tmp_path / "tables"
        while "count[1]" not in caplog.text or not tables.exists() or "count[1]" not in tables.read_text():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tracing)
        for task in tracing:
            task.cancel()

    service = service_of(*chain(Add()))
    asyncio.run(main())
    for text in (caplog.text, (tmp_path / "tables").read_text()):
        assert text.count("Query count[1]") == 1
        assert text.count("TRACER") >= 2
    assert "No such file or directory" in caplog.text


@pytest.mark.parametrize("why", ["No such file or directory", "No space left on device"])
def test_a_file_that_cannot_be_written_is_a_line_when_it_begins_and_one_when_it_is_over(tmp_path, caplog, why):
    file = tmp_path / "logs" / "tables"
    file.parent.mkdir()
    seen = []

    def now():
        """What is counted, at once; and what becomes of the file meanwhile: gone for the tables 2 to 4, and 7."""
        seen.append(len(seen))
        is_bad = seen[-1] in (2, 3, 4, 7)
        shutil.rmtree(file.parent, ignore_errors=True)
        if why.startswith("No space"):
            file.parent.mkdir()
            if is_bad:
                file.symlink_to("/dev/full")
        elif not is_bad:
            file.parent.mkdir()
        return snapshot([service])

    async def main():
        tracing = asyncio.ensure_future(trace(now, 0.001, file))
        while len(seen) < 10 and not tracing.done():
            await asyncio.sleep(0.001)
        tracing.cancel()

    service = service_of(*chain(Add()))
    asyncio.run(main())
    lines = [r.getMessage().removeprefix(f"tracer: {file}: ") for r in caplog.records if "tracer" in r.getMessage()]
    lost = f"{why}; tables are lost until it can be written"
    assert lines == [
        lost,
        "written again, after 3 tables were lost",
        lost,
        "written again, after 1 tables were lost",
    ]
