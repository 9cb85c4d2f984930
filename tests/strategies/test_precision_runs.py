"""Every precision on every axis, and the scaler on which all ranks agree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from strategy_helpers import SLOW, TP2_PP2, Classifier, Task, close, fit
from torch import Tensor, nn

from kenotron.strategies.precision import SharedGradScaler
from kenotron.testing import RankPool


class Typed(Classifier):
    """Notes the types of weights, hidden states and gradients."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr=lr)
        self.seen: dict[str, str] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen["batch"] = str(batch[0].dtype)
        self.head.register_forward_hook(self._note, always_call=False)
        return super().training_step(batch, batch_idx)

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen["output"] = str(output.dtype)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        self.seen["weights"] = ",".join(sorted({str(p.dtype) for p in params}))
        self.seen["gradients"] = ",".join(sorted({str(p.grad.dtype) for p in params}))


LAYOUTS = {
    "dp2": (2, {}), "dp2-zero0": (2, {"zero_stage": 0}), "dp2-zero3": (2, {"zero_stage": 3}), "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2, "microbatches": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 2e-2), pytest.param("bf16-true", 5e-2, marks=SLOW), ("64-true", 1e-6)]
)
def test_precisions_train_as_in_one_process(
    pool: RankPool, name: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    ranks, strategy = LAYOUTS[name]
    task = {"trainer": {"precision": precision, "gradient_clip_val": 1.0}, "folder": str(tmp_path)}
    expected = pool.run(fit, 1, Task(Typed, None, **task))[0]
    for found in pool.run(fit, ranks, Task(Typed, strategy, **task)):
        close(found["losses"], expected["losses"], tolerance)
        close(found["metrics"], expected["metrics"], tolerance)
        for key in {"weights", "gradients", "batch"}:
            assert found["seen"][key] == expected["seen"][key]
    assert expected["losses"][-1] < expected["losses"][0]


@pytest.mark.parametrize(
    "name",
    ["dp2-zero3", "tp2", pytest.param("dp2", marks=SLOW), pytest.param("pp2", marks=SLOW), pytest.param("tp2-pp2", marks=SLOW)],
)
def test_a_hundred_steps_in_bf16_stay_with_one_process(pool: RankPool, name: str, tmp_path: Path) -> None:
    # At 20 times the rate this small model leaves fp32 by 0.3 within one process, and every layout leaves another by as much.
    task: dict[str, Any] = {
        "trainer": {"precision": "bf16-mixed"}, "settings": {"lr": 1e-3}, "rows": 1600, "batch": 32, "val_rows": 0,
        "with_weights": False,
    }  # fmt: skip
    ranks, strategy = (LAYOUTS | {"tp2-pp2": TP2_PP2})[name]
    expected = pool.run(fit, 1, Task(Classifier, None, **task))[0]["losses"]
    assert len(expected) == 100 and expected[-1] < expected[0] / 2
    for found in pool.run(fit, ranks, Task(Classifier, strategy, **task)):
        close(found["losses"], expected, 2e-2)


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, {"zero_stage": 3}),
        pytest.param(4, {"tp": 2, "zero_stage": 3}, marks=SLOW),
    ],
)
def test_weights_gathered_as_bf16_train_like_those_that_autocast_casts(
    pool: RankPool, ranks: int, strategy: dict[str, Any]
) -> None:
    task: dict[str, Any] = {
        "trainer": {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, "settings": {"lr": 1e-3}, "rows": 320,
        "batch": 32, "val_rows": 0, "with_weights": False,
    }  # fmt: skip
    expected = pool.run(fit, 1, Task(Typed, None, **task))[0]
    for found in pool.run(fit, ranks, Task(Typed, {**strategy, "gather_bf16": True}, **task)):
        close(found["losses"], expected["losses"], 1e-2)
        assert found["seen"]["weights"] == found["seen"]["gradients"] == "torch.float32"


def test_what_can_not_be_gathered_as_bf16_is_refused() -> None:
    for strategy, precision, message in (
        ({}, "32-true", "goes with precision='bf16-mixed'"),
        ({"zero_stage": 0}, "bf16-mixed", "zero_stage=0: weights are whole"),
        ({"zero_stage": 2}, "bf16-mixed", "zero_stage=2: weights are whole"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Task(Classifier, {**strategy, "gather_bf16": True}, trainer={"precision": precision}))


def scale_and_step(overflowing_rank: int) -> dict[str, Any]:
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = SharedGradScaler(device="cpu", init_scale=8.0, growth_interval=1)
    weight.grad = torch.full((3,), 16.0)
    if dist.get_rank() == overflowing_rank:
        weight.grad[1] = torch.inf
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return {"weight": weight.tolist(), "scale": scaler.get_scale()}


def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: RankPool) -> None:
    for rank in (0, 1):
        for found in pool.run(scale_and_step, 2, rank):
            assert found == {"weight": [1.0] * 3, "scale": 4.0}
    for found in pool.run(scale_and_step, 2, -1):
        assert found == {"weight": [0.0] * 3, "scale": 16.0}
