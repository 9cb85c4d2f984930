"""``kenotron compare`` as a program: rows, pictures, what can't run, and that losses are the same."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kenotron.cli import main

HERE = str(Path(__file__).parent)

CLASSIFIER = ("--model", "compare_modules.Classifier:width=16", "--data", "compare_modules.Rows", "--accelerator", "cpu")


def compare(folder: Path, *arguments: str, timeout: int = 170) -> tuple[int, str, list[dict[str, Any]]]:
    """Return the exit code, what is printed, and the rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    command = [sys.executable, "-m", "kenotron.cli", "compare", *arguments, "--json", "rows.json", "--plot", "rows.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=folder, env=environment)
    rows = json.loads((folder / "rows.json").read_text()) if (folder / "rows.json").exists() else []
    return done.returncode, done.stdout + done.stderr, rows


def test_rows_have_all_figures_and_what_cannot_run_says_why(tmp_path: Path) -> None:
    strategies = ("ddp", "deepspeed", "kenotron:tp=2")
    options = ("--devices", "2", "--steps", "5", "--repeats", "1")
    code, output, rows = compare(tmp_path, *CLASSIFIER, *options, "--strategies", *strategies)
    assert code == 1, output
    assert [row["strategy"] for row in rows] == list(strategies)
    ddp, deepspeed, tp = rows
    assert "deepspeed" in deepspeed["reason"].lower() and deepspeed["tokens_per_second"] is None
    assert f"deepspeed can't run here: {deepspeed['reason']}" in output
    assert ddp["loss_difference"] == 0
    for row in (ddp, tp):
        assert row["reason"] is None and row["load_error"] is None, output
        assert abs(row["loss_difference"]) <= 1e-5 and row["max_loss_difference"] <= 1e-5
        assert len(row["losses"]) == 5 and all(math.isfinite(loss) for loss in row["losses"])
        for name in ("tokens_per_second", "peak_memory_bytes", "checkpoint_stall_s", "checkpoint_bytes", "load_s"):
            assert row[name] > 0, name
    assert ddp["losses"][0] != ddp["losses"][-1]
    picture = (tmp_path / "rows.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG") and width > 1000 and height > 500


@pytest.mark.slow
def test_what_cannot_be_built_is_told_once(tmp_path: Path) -> None:
    code, output, rows = compare(tmp_path, "--model", "compare_modules.Broken", "--strategies", "ddp", "kenotron")
    assert code == 2 and rows == []
    assert output.strip().splitlines()[-1] == "RuntimeError: there is no such thing"
    code, output, _ = compare(tmp_path, "--model", "compare_modules.Classifer", "--strategies", "ddp")
    assert code == 2 and "compare_modules.Classifer can't be imported" in output, output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--strategies", "ddp"), "what should be trained?"),
        ((*CLASSIFIER, "--strategies", "dpp"), "The nearest is 'ddp'"),
        ((*CLASSIFIER, "--strategies", "ddp", "--steps", "2"), "steps=2: set it to 4 or more"),
        (("--model", "Classifier", "--strategies", "ddp"), "'Classifier' is no import path"),
    ],
)
def test_wrong_options_are_told(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_of_ddp_under_every_strategy(tmp_path: Path) -> None:
    strategies = (
        "ddp", "fsdp", "model_parallel", "kenotron_ddp", "kenotron_zero1", "kenotron_zero3", "kenotron:tp=2", "kenotron:pp=2",
    )  # fmt: skip
    options = ("--devices", "2", "--steps", "10", "--repeats", "1")
    code, output, rows = compare(tmp_path, *CLASSIFIER, *options, "--strategies", *strategies, timeout=850)
    assert code == 0, output
    for row in rows:
        assert row["max_loss_difference"] <= 1e-5, row["strategy"]
        assert row["load_error"] is None and row["load_s"] > 0, row["load_error"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_module_that_is_built_late_begins_alike(tmp_path: Path) -> None:
    strategies = ("ddp", "fsdp", "model_parallel", "kenotron_zero3")
    options = ("--devices", "2", "--steps", "5", "--repeats", "1", "--accelerator", "cpu")
    code, output, rows = compare(
        tmp_path, "--model", "compare_modules.Late", *options, "--strategies", *strategies, timeout=550
    )
    assert code == 0, output
    assert all(row["max_loss_difference"] <= 1e-5 for row in rows), output
    assert rows[0]["tokens_per_second"] == pytest.approx(12 * rows[0]["samples_per_second"])
