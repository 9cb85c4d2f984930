"""Throughput: tokens exactly, FLOPs whatever the layout, a state that goes on, batches of any structure."""

from __future__ import annotations

import time
from collections import namedtuple
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder_helpers import LENGTH, Model, loader, quiet, run

from kenotron.callbacks import Throughput
from kenotron.callbacks.batches import amount_in

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("layout", ["tp2-pp2", pytest.param("dp2-zero3-full", marks=pytest.mark.slow)])
def test_layouts_count_the_tokens_and_flops_of_one_process(layout: str) -> None:
    one, alone = run("llama", "one")
    found, events = run("llama", layout)
    for rank in found:
        assert rank["flops"] == pytest.approx(one[0]["flops"], rel=1e-3)  # each microbatch has its rotary angles
    assert events["throughput/tokens"] == alone["throughput/tokens"] == [(2, 256.0), (4, 512.0), (6, 768.0)]


def test_parts_of_a_step_fit_into_it() -> None:
    for layout in ("one", "tp2-pp2"):
        _, events = run("llama", layout)
        parts = ["data_wait", "forward_backward", "optimizer", "checkpoint_stall"]
        for step, seconds in events["throughput/step_seconds"]:
            spent = {part: dict(events[f"throughput/{part}_seconds"])[step] for part in parts}
            assert spent["forward_backward"] > 0 and spent["optimizer"] > 0
            assert sum(spent.values()) <= seconds * 1.01
            full, causal = (dict(events[f"throughput/mfu_{kind}_percent"])[step] for kind in ("full", "causal"))
            assert 0 < causal < full < 100


def _fit(folder: Any, steps: int, **settings: Any) -> tuple[Throughput, L.Trainer]:
    quiet()
    callback = Throughput(2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(Model(), loader(8), **settings)
    return callback, trainer


def test_a_restart_goes_on_and_the_time_between_is_no_goodput(tmp_path) -> None:
    first, trainer = _fit(tmp_path / "a", 4)
    path = trainer.checkpoint_callback.best_model_path or str(next((tmp_path / "a").glob("*step=4*")))
    time.sleep(0.5)
    second, again = _fit(tmp_path / "b", 6, ckpt_path=path, weights_only=False)
    assert second.state_dict()["total"] == 6 * 8 * LENGTH
    assert second.state_dict()["first_start"] == first.state_dict()["first_start"]
    assert second.state_dict()["productive_seconds"] > first.state_dict()["productive_seconds"] * 0.5
    assert "save_checkpoint" not in again.__dict__  # put back


def test_batches_that_accumulate_and_differ_in_size_are_counted_as_they_are() -> None:
    quiet()
    seen: list[float] = []

    class Keep(Throughput):
        def record(self, trainer: Any, values: Any) -> None:
            seen.append(values["throughput/tokens"])

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=2, callbacks=[Keep(1)], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Model(), loader(8, rows=20))  # batches of 8, 8 and 4: two updates an epoch
    assert seen == [16 * LENGTH, 20 * LENGTH, 36 * LENGTH, 40 * LENGTH]


def test_validation_is_no_part_of_a_step() -> None:
    quiet()
    seen: list[float] = []

    class Keep(Throughput):
        def record(self, trainer: Any, values: Any) -> None:
            seen.append(values["throughput/step_seconds"])

    class Slow(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(5.0)

    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=2, num_sanity_val_steps=0, limit_val_batches=1, callbacks=[Keep(3)], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Slow(), loader(8), loader(8))  # in the middle of the first window, and after the last batch
    assert len(seen) == 2 and all(0 < seconds < 2.0 for seconds in seen)


def test_an_exception_leaves_nothing_behind(tmp_path) -> None:
    class Broken(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no")

    quiet()
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, callbacks=[Throughput()])
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(Broken(), loader(8))
    assert "save_checkpoint" not in trainer.__dict__
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


Pair = namedtuple("Pair", ["pixels", "label"])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"attention_mask": torch.ones(2, 5), "input_ids": torch.zeros(2, 5, dtype=torch.long)}, (10, 5, "tokens")),
        ({"mask": torch.ones(2, 9, dtype=torch.long), "tokens": torch.zeros(2, 5, dtype=torch.int32)}, (10, 5, "tokens")),
        ((torch.zeros(3, 4, dtype=torch.long), torch.zeros(3)), (12, 4, "tokens")),
        ([{"deep": {"input_ids": torch.zeros(7, dtype=torch.long)}}], (7, 7, "tokens")),
        (Pair(torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)), (6, None, "samples")),
    ],
)
def test_tokens_are_found(batch: Any, expected: Any) -> None:
    assert amount_in(batch) == expected


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        Throughput(0)
    with pytest.raises(ValueError, match="peak_flops=-1"):
        Throughput(peak_flops=-1)
    with pytest.raises(ValueError, match=r"tokens_of returned 1\.5"):
        amount_in(torch.zeros(2), lambda batch: 1.5)
    with pytest.raises(ValueError, match="holds no tensor"):
        amount_in({"text": "a"})


def test_compilation_is_told_apart() -> None:
    pause = 1.5

    def backend(graph: Any, examples: Any) -> Any:
        time.sleep(pause)
        return graph.forward

    class Compiled(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.scaled(torch.ones(1)).sum()

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "_scaled"):
                self._scaled = torch.compile(self.scale.forward, backend=backend)
            return self._scaled(x)

    quiet()
    seen: list[dict[str, float]] = []

    class Kept(Throughput):
        def record(self, trainer: L.Trainer, values: Any, *args: Any) -> None:
            seen.append(dict(values))

    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Kept(3)],
    )  # fmt: skip
    trainer.fit(Compiled(), loader(8))
    first = seen[0]
    assert first["throughput/compile_seconds"] > pause
    assert first["throughput/forward_backward_seconds"] <= first["throughput/step_seconds"] < pause / 2
