"""Where things are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
BIN = Path(sys.executable).parent  # our commands, installed beside the interpreter
