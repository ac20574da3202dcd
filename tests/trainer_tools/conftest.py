"""What the tests of Paddle programs share."""

import shutil

import pytest
from places import GOLDEN


@pytest.fixture
def model(tmp_path):
    """A copy of a golden Paddle program's directory: model("331-ctr")."""
    return lambda name: shutil.copytree(GOLDEN / f"paddle-{name}", tmp_path / name)
