"""``examples/moe``, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "moe" / "train.py"


@pytest.mark.slow
def test_the_load_of_experts_evens_out(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--steps", "80", "--every", "10"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=170, check=False, stdin=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["steps"] == list(range(10, 81, 10)) and len(found["loads"]) == 3
    for shares in found["loads"].values():
        assert all(sum(each) == pytest.approx(1, abs=1e-4) for each in shares)
    worst = [max(max(shares[i]) for shares in found["loads"].values()) for i in (0, -1)]
    assert worst[1] < 0.75 * worst[0]
    assert (tmp_path / "load.png").stat().st_size > 10_000
    assert "greatest load / mean, worst layer" in done.stdout
