"""The committed protobuf modules are what proto/ says. Run as a program, this file writes them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOMES = {
    "cube": "cube", "cube_config": "cube", "health": "cube", "reflection": "cube",
    "kserve": "predictor", "predictor_config": "predictor", "serving_config": "predictor",
    "paddle_framework": "trainer_tools",
}  # fmt: skip


def generate(into: Path) -> None:
    for name, package in HOMES.items():
        home = into / package / "pb"
        home.mkdir(parents=True, exist_ok=True)
        args = [
            "-I",
            str(ROOT / "proto"),
            f"--python_out={home}",
            f"--pyi_out={home}",
            str(ROOT / "proto" / f"{name}.proto"),
        ]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *args], check=True)


def test_every_schema_has_a_home():
    assert {path.stem for path in (ROOT / "proto").glob("*.proto")} == set(HOMES)


def test_generated_modules_are_in_step_with_their_schemas(tmp_path):
    generate(tmp_path)
    for made in sorted(p for p in tmp_path.rglob("*_pb2.py*")):
        committed = ROOT / made.relative_to(tmp_path)
        assert committed.read_text() == made.read_text(), f"{committed}: run `make proto`"


if __name__ == "__main__":
    generate(ROOT)
