"""`make train`, as a user runs it: train, be killed, resume, and see the summary."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import stdlib_data  # noqa: E402
from stdlib_data import StdlibData, TokenLoader  # noqa: E402


class Run:
    """One start of the script, all its ranks in a process group of their own."""

    def __init__(self, out: Path, *arguments: str) -> None:
        self.log = out.with_suffix(f".{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / "pretrain_stdlib.py"), "--out", str(out), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def finish(self, timeout_s: float) -> str:
        """Return the output of a run that succeeds."""
        try:
            status: Any = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"no end after {timeout_s} s"
            self.kill()
        assert status == 0, f"exit status: {status}\n{self.output}"
        return self.output

    def wait_for(self, text: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.output:
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{text!r} was not printed within {timeout_s} s:\n{self.output}")
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def val_losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)/\d+ +val_loss ([\d.]+)", output)}


@pytest.mark.timeout(600)
def test_killed_and_started_again_it_resumes_and_ends_with_the_summary(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("--steps", "6", "--val-every", "2", "--devices", "2", "--tp", "1", "--pp", "2")

    first = Run(out, *command)
    first.wait_for("step 4/6", timeout_s=300)
    first.kill()
    assert "tokens seen" not in first.output

    second = Run(out, *command).finish(timeout_s=300)
    assert re.search(r"Resuming from .*step=[24]\.ckpt", second), second
    assert 6 in val_losses(second), second
    assert 0 not in val_losses(second), second
    for text in ("pp 2", "tokens seen", "tokens/s", "step=6.ckpt", "logs", "class Queue:"):
        assert text in second, second
    assert "site-packages" not in second, f"a warning or a traceback:\n{second}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_ends_with_the_losses_of_an_undisturbed_one_and_can_go_on_on_another_layout(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ("--steps", "9", "--val-every", "3")

    expected = val_losses(Run(whole, *command, "--devices", "1", "--tp", "1", "--pp", "1").finish(timeout_s=400))
    first = Run(killed, *command)
    first.wait_for("step 6/9", timeout_s=400)
    first.kill()
    found = val_losses(first.output)
    found |= val_losses(Run(killed, *command, "--devices", "2", "--tp", "1", "--pp", "1").finish(timeout_s=400))
    assert found.keys() == expected.keys() == {0, 3, 6, 9}
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=2e-3), (found, expected)  # three digits are printed

    again = Run(killed, *command).finish(timeout_s=200)
    assert "has 9 steps already" in again, again
    assert "tokens seen" in again, again
    longer = Run(killed, "--steps", "11", "--val-every", "3").finish(timeout_s=400)
    assert "Resuming from" in longer, longer
    assert 11 in val_losses(longer), longer


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_learns(tmp_path: Path) -> None:
    losses = val_losses(Run(tmp_path / "run").finish(timeout_s=1700))
    assert losses[0] == pytest.approx(8.3, abs=0.3)
    assert losses[max(losses)] < 5.0, losses


def batches(loader: TokenLoader) -> list[list[int]]:
    return [batch[:, 0].tolist() for batch in loader]


def test_loader_goes_on_with_the_batches_not_seen_yet_on_any_number_of_ranks() -> None:
    windows_NS = np.arange(22)[:, None]

    def loader(rank: int = 0, num_ranks: int = 1) -> TokenLoader:
        return TokenLoader(windows_NS, batch_size=4, rank=rank, num_ranks=num_ranks, seed=3)

    undisturbed = loader()
    epochs = [batches(undisturbed), batches(undisturbed)]
    assert len(epochs[0]) == len(undisturbed) == 5
    assert len({index for batch in epochs[0] for index in batch}) == 20, "a window came twice"
    assert epochs[0] != epochs[1]

    stopped = loader()
    iterator = iter(stopped)
    seen = [next(iterator)[:, 0].tolist() for _ in range(3)]
    halves = [loader(rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(stopped.state_dict())
    rest = [sorted(a + b) for a, b in zip(batches(halves[0]), batches(halves[1]), strict=True)]
    assert seen == epochs[0][:3]
    assert rest == [sorted(batch) for batch in epochs[0][3:]]
    assert sorted(batches(halves[0])[0] + batches(halves[1])[0]) == sorted(epochs[1][0])


def test_data_cut_short_by_a_kill_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(f"{i}.py", f"def function_{i}():\n    return {i}\n" * 50) for i in range(60)]
    monkeypatch.setattr(stdlib_data, "source_files", lambda: files)
    held_out = [path for path, _ in files if stdlib_data.is_held_out(path)]
    assert 0 < len(held_out) < 10

    def make(folder: Path) -> StdlibData:
        data = StdlibData(folder, vocabulary=300, sequence_length=16, batch_size=4, val_samples=8)
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": 1, "num_replicas": 2})  # type: ignore[assignment]
        return data

    data = make(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(stdlib_data.os, "rename", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            data.prepare_data()
    assert not data.folder.exists()
    data.prepare_data()
    other = make(tmp_path / "b")
    other.prepare_data()
    for name in ("tokenizer.json", "train.npy", "val.npy"):
        assert (data.folder / name).read_bytes() == (other.folder / name).read_bytes(), f"{name} differs between two runs"
    assert next(iter(data.train_dataloader())).shape == (2, 16)
    assert sum(len(batch) for batch in data.val_dataloader()) == 4

    data.batch_size = 3
    with pytest.raises(ValueError, match="multiple of 2"):
        data.train_dataloader()
