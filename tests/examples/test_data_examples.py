"""``examples/nanosets``, ``examples/custom-dataloader`` and ``examples/sft``, as their READMEs have them run."""

from __future__ import annotations

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
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def perplexities(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"step \d+: perplexity \w+ ([\d.e+]+)", output)]


def test_nanosets(tmp_path: Path) -> None:
    run(tmp_path, str(EXAMPLES / "nanosets" / "texts.py"), "runs/nanosets/texts")
    texts, tokens = "runs/nanosets/texts", "runs/nanosets/tokens"
    kenotron = ("-m", "kenotron.cli")
    run(tmp_path, *kenotron, "tokenize", f"{texts}/modules", f"{tokens}/modules", "--train-tokenizer", "2048", "--append-eos")
    for name in ("packages", "held_out"):
        given = ("--tokenizer", f"{tokens}/modules/tokenizer", "--append-eos")
        run(tmp_path, *kenotron, "tokenize", f"{texts}/{name}", f"{tokens}/{name}", *given)
    assert "sound" in run(tmp_path, *kenotron, "data", "check", f"{tokens}/modules", "--vocab-size", "2048")
    command = (str(EXAMPLES / "nanosets" / "train.py"), "fit", "--config", str(EXAMPLES / "nanosets" / "config.yaml"))
    first = perplexities(run(tmp_path, *command, "--trainer.max_steps", "80"))
    assert len(first) == 2 and first[1] < 400
    rest = run(tmp_path, *command, "--trainer.devices", "1", "--ckpt_path", "runs/nanosets/checkpoints/step=80.ckpt")
    assert perplexities(rest)[-1] < first[-1]


@pytest.mark.parametrize("data", ["loader", "stream"])
def test_custom_dataloader(data: str, tmp_path: Path) -> None:
    script = str(EXAMPLES / "custom-dataloader" / "train.py")
    found = perplexities(run(tmp_path, script, "--data", data, "--steps", "60"))
    assert len(found) == 3 and found[-1] < 6


def test_sft(tmp_path: Path) -> None:
    run(tmp_path, str(EXAMPLES / "sft" / "prepare.py"), "runs/sft")
    config = str(EXAMPLES / "sft" / "config.yaml")
    options = ("--data.steps_per_epoch", "20", "--trainer.max_epochs", "2")
    output = run(tmp_path, str(EXAMPLES / "sft" / "train.py"), "fit", "--config", config, *options)
    assert "of them learned" in output
    found = perplexities(output)
    assert len(found) == 2 and found[1] < found[0] < 1024
