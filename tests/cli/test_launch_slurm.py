"""``kenotron launch slurm``: the script that it writes is valid, asks for what was said, and runs what it should."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from kenotron.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my run.yaml").write_text("model: {}\ntrainer: {max_steps: 10}\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def dry(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the script, which bash can read."""
    assert main(["launch", "slurm", "--config", "my run.yaml", "--dry-run", *options]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    return text


def test_it_asks_for_nodes_a_signal_and_a_requeue(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--nodes", "4", "--gpus-per-node", "2", "--time", "1-00:00:00", "--partition", "long", "--sbatch", "exclusive")
    lines = dry(capsys, *options).splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=1-00:00:00", "partition=long", "exclusive"} <= asked
    assert {"requeue", "signal=SIGUSR1@180", "open-mode=append"} <= asked
    assert not list(folder.glob("*.sbatch"))


def test_the_script_trains_from_the_last_checkpoint(folder: Path) -> None:
    """With an `srun` that tells what it was asked to run, and with what in its environment."""
    program(folder, "srun", 'printf "%s\\n" "$@"; echo "NAME=$NAME"; pwd')
    setup = ("--setup", "export NAME=first", "--env", "NAME=a b$c")
    arguments = ("--nodes", "2", "--gpus-per-node", "4", *setup, "-o", "job.sbatch", "--", "--trainer.max_steps", "7")
    assert main(["launch", "slurm", "--config", "my run.yaml", *arguments]) == 0
    environment = {**os.environ, "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "a[1-2]"}
    command = ["bash", str(folder / "job.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=environment, cwd="/")
    said, *ran = done.stdout.splitlines()
    assert said == "job 12 on a[1-2], restart 0"
    assert ran == [
        "--kill-on-bad-exit=1", "kenotron", "fit", "--config", "my run.yaml", "--trainer.num_nodes=2", "--trainer.devices=4",
        "--trainer.callbacks+=kenotron.callbacks.Preemption", "--ckpt_path", "last", "--trainer.max_steps", "7",
        "NAME=a b$c", str(folder),
    ]  # fmt: skip
    assert (folder / "logs").is_dir()


def test_a_callback_that_is_there_is_not_added(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my run.yaml").write_text("trainer: {callbacks: [{class_path: kenotron.callbacks.Preemption}]}\n")
    assert "--trainer.callbacks" not in dry(capsys)


def test_containers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(capsys, "--container", "images/train.sif", "--container-mount", "/data:/data")
    assert "apptainer exec --nv --bind=/data:/data images/train.sif" in text
    text = dry(capsys, "--container", "nvcr.io#nvidia/pytorch:25.06-py3", "--container-mount", "/a", "--container-mount", "/b")
    assert "'--container-image=nvcr.io#nvidia/pytorch:25.06-py3'" in text and "--container-mounts=/a,/b" in text
    assert "gpus-per-node" not in dry(capsys, "--cpu")


def test_submit_runs_sbatch(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["launch", "slurm", "--config", "my run.yaml", "--job-name", "one", "--submit"]
    program(folder, "sbatch", 'echo "Submitted $1"')
    assert main(command) == 0
    assert "Submitted one.sbatch" in capfd.readouterr().out
    program(folder, "sbatch", "exit 3")
    assert main(command) == 3


def test_submit_without_slurm_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder / "bin"))
    assert main(["launch", "slurm", "--config", "my run.yaml", "--submit"]) == 2
    assert "There is no sbatch here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--nodes", "0"), "--nodes 0: set it to 1 or more"),
        (("--time", "soon"), "--time soon: write minutes"),
        (("--env", "A"), "--env A: write it as NAME=VALUE"),
        (("--partition", "a\nrm"), "can't stand in a line"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: there is no such file"),
        (("--config", "typo.yaml"), "trainer.max_stepz is not known; the nearest is max_steps"),
        (("--config", "tp3.yaml", "--gpus-per-node", "8"), "= 3 does not divide the world of 8 processes"),
        (("--config", "tp3.yaml", "--gpus-per-node", "3", "--", "--data.sequence_lenght=3"), "the nearest is sequence_length"),
    ],
)
def test_bad_input_is_told(folder: Path, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "typo.yaml").write_text("trainer: {max_stepz: 10}\n")
    (folder / "tp3.yaml").write_text("trainer: {strategy: 'kenotron:tp=3'}\n")
    assert main(["launch", "slurm", "--config", "my run.yaml", "--dry-run", *options]) == 2
    assert told in capsys.readouterr().err


def test_a_run_that_could_not_go_on_after_a_crash_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: %s}}"
    for value, is_told in (("true", False), ("false", True)):
        (folder / "my run.yaml").write_text(f"trainer: {{callbacks: [{saving % value}]}}\n")
        assert main(["launch", "slurm", "--config", "my run.yaml", "--dry-run"]) == 0
        assert ("Set save_last: true" in capsys.readouterr().err) == is_told
