"""``examples/doremi`` and ``examples/mamba``, shortened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(folder: Path, *arguments: str) -> str:
    """Run Python in a folder, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL,
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_doremi_finds_that_noise_is_not_worth_learning(tmp_path: Path) -> None:
    script = str(EXAMPLES / "doremi" / "train.py")
    run(tmp_path, script, "corpora")
    for name in ("reference", "proxy"):
        run(tmp_path, script, name, "--steps", "150", "--tp", "2")
    weights = json.loads((tmp_path / "runs/doremi/weights.json").read_text())
    assert weights["noise"] < 0.15 < weights["python"]
    assert "weights python" in run(tmp_path, script, "main", "--steps", "50")


def test_mamba(tmp_path: Path) -> None:
    texts, tokens = "runs/nanosets/texts", "runs/nanosets/tokens"
    run(tmp_path, str(EXAMPLES / "nanosets" / "texts.py"), texts)
    given = ["--train-tokenizer", "2048"]
    for name in ("modules", "packages", "held_out"):
        run(tmp_path, "-m", "kenotron.cli", "tokenize", f"{texts}/{name}", f"{tokens}/{name}", *given, "--append-eos")
        given = ["--tokenizer", f"{tokens}/modules/tokenizer"]
    config = str(EXAMPLES / "mamba" / "config.yaml")
    output = run(tmp_path, "-m", "kenotron.cli", "fit", "--config", config, "--trainer.max_steps", "80")
    perplexities = [float(value) for value in re.findall(r"step \d+: perplexity \w+ ([\d.e+]+)", output)]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0] < 2048
