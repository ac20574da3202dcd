"""How much memory prune-program takes for a program, in a process of its own."""

import subprocess
import sys

from places import ROOT

CODE = """
import re, sys
from pathlib import Path
from trainer_tools.prune_program import prune
from trainer_tools.pruning import Options
def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
small, wide, out, samples = sys.argv[1:]
options = Options(verify_samples=int(samples))
prune(Path(small), Path(out), options)  # loads and compiles what is needed
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = resident("VmRSS")
report = prune(Path(wide), Path(out), options)
assert report.largest_difference == 0
print(resident("VmHWM") - before)
"""


def taken(small, wide, out, samples=256):
    """Bytes at the most, beyond what a small program of the same kind takes. samples: to compare on."""
    line = [sys.executable, "-c", CODE, *map(str, (small, wide, out, samples))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
