"""Where and on what a measurement was taken, and how it is kept."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def best_of(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each contender over interleaved rounds: the machine may be shared."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def keep(what: str, rows: list[dict[str, Any]]) -> None:
    """Print a table and write it, with machine, date and commit, to benchmarks/results/<what>.{md,json}."""
    changed = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    dirty = "-dirty" if subprocess.run(changed, capture_output=True, text=True).stdout else ""
    commit = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip() + dirty
    about = {
        "what": what,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{os.cpu_count()} × {_processor()}, Python {platform.python_version()}",
    }
    names = list(rows[0])
    table = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    table += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    text = f"# {what}\n\n{about['machine']}; {about['date']}; commit {commit}\n\n" + "\n".join(table) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{what}.md").write_text(text)
    (RESULTS / f"{what}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(text)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
