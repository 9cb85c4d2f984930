"""ZeRO 1 and 2 where nobody looks at whole gradients: each rank keeps its parts, on any layout, and trains like one process."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor
from lightning.pytorch.utilities import grad_norm
from strategy_helpers import SLOW, Classifier, Task, close, fit, fit_like_one_process, make_trainer
from torch import Tensor, nn

from kenotron.callbacks.step_lines import StepLines
from kenotron.strategies.gradients import who_looks
from kenotron.testing import RankPool

#: Outside of any class: what a class names counts as looking.
slope_of = operator.attrgetter("grad")


class Watched(Classifier):
    """Notes how many gradients there are after each update."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.seen: list[int] = []
        self.updates = 0

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step > self.updates:
            self.seen.append(sum(slope_of(param) is not None for param in self.parameters()))
        self.updates = self.trainer.global_step


class ByParameter(Watched):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=0.02)


INTERLEAVED = {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "microbatches": 2}
LAYOUTS: dict[str, Any] = {
    "zero1": (Watched, (2, {})),
    "zero2": (Watched, (2, {"zero_stage": 2})),
    "zero2-by-parameter": (ByParameter, (2, {"zero_stage": 2})),
    "zero2-offloaded": (Watched, (2, {"zero_stage": 2, "offload_optimizer": True})),
    "zero2-tp2": (Watched, (4, {"tp": 2, "zero_stage": 2})),
    "zero2-interleaved": (Watched, (4, {**INTERLEAVED, "zero_stage": 2})),
    "zero2-hsdp": (Watched, (4, {"dp_replicate": 2, "zero_stage": 2})),
    "zero2-pp2": (Watched, (4, {"pp": 2, "microbatches": 2, "zero_stage": 2})),
    "zero1-interleaved": (Watched, (4, INTERLEAVED)),
    "zero1-hsdp-by-parameter": (ByParameter, (4, {"dp_replicate": 2})),
}
_FAST = ("zero1", "zero2", "zero2-by-parameter", "zero2-offloaded", "zero2-tp2", "zero2-interleaved", "zero2-hsdp")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in _FAST else SLOW) for n in LAYOUTS])
def test_parts_of_gradients_train_like_one_process(pool: RankPool, name: str, tmp_path: Path) -> None:
    module, layout = LAYOUTS[name]
    trainer = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    _, *ranks = fit_like_one_process(pool, module, layout, tmp_path, rows=24, val_rows=0, trainer=trainer)
    if "offloaded" not in name:
        assert all(not any(found["seen"]) for found in ranks), "the ranks had whole gradients"


class Skips(Watched):
    """A rank has nothing to differentiate in some batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        x, _ = batch
        return None if bool(x[0, 0] > 0) else loss


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_rank_may_return_no_loss(pool: RankPool, zero_stage: int) -> None:
    trainer = {"accumulate_grad_batches": 2, "max_epochs": 1}
    task = Task(Skips, {"zero_stage": zero_stage}, rows=24, val_rows=0, with_weights=False, trainer=trainer)
    steps = [found["step"] for found in pool.run(fit, 2, task, timeout_s=120)]
    assert steps == [2, 2]


class Norms(Classifier):
    """Logs norms as Lightning's documentation does, and changes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append({name: float(norm) for name, norm in grad_norm(self.head, 2).items()})
        self.head.bias.grad = None


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_who_looks_at_gradients_sees_whole_ones(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": 2}
    expected, *ranks = fit_like_one_process(
        pool, Norms, (2, {"zero_stage": zero_stage}), tmp_path, rows=24, val_rows=0, trainer=trainer
    )
    for found in ranks:
        close(found["seen"], expected["seen"])


class Plain(Classifier):
    pass


class OnTheWay(L.Callback):
    def on_after_backward(self, *_: Any) -> None:
        pass


class Speaks(L.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.norms = [param.grad for param in pl_module.parameters()]


def norms_of(module: Any) -> list[Any]:
    return [param.grad for param in module.parameters()]


class Keeper:
    def note(self, module: Any) -> None:
        self.norms = norms_of(module)


class ThroughAnObject(L.Callback):
    def __init__(self) -> None:
        self.keeper = Keeper()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.keeper.note(pl_module)


class ThroughAFunction(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.upgraded = norms_of(pl_module)


class Averages(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.count = 1


def test_whole_gradients_are_kept_for_whoever_may_look() -> None:
    class ByHand(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    plugin = L.pytorch.plugins.MixedPrecision("bf16-mixed", "cpu")
    assert who_looks(Plain(), [LearningRateMonitor(), Averages(), StepLines()], plugin) is None
    assert who_looks(Plain(), [OnTheWay()], plugin) == "OnTheWay.on_after_backward"
    assert who_looks(Plain(), [Speaks()], plugin) == "Speaks.on_train_epoch_end"
    assert who_looks(Plain(), [ThroughAnObject()], plugin) == "Keeper.note"
    assert who_looks(Plain(), [ThroughAFunction()], plugin) == "ThroughAFunction.on_train_batch_end"
    assert "optimizer_step" in str(who_looks(Plain(), [LambdaCallback(on_before_optimizer_step=print)], plugin))
    assert who_looks(Norms(), [], plugin) == "Norms.on_before_optimizer_step"
    assert who_looks(ByHand(), [], plugin) == "manual optimization"
    hooked = Plain()
    hooked.head.weight.register_post_accumulate_grad_hook(lambda param: None)
    assert who_looks(hooked, [], plugin) == "a hook on the gradient of head.weight"


def count_bytes(stage: int) -> dict[str, float]:
    """Train one epoch. Returns bytes that this rank has sent an update, as parts of the parameters', and its moments."""
    sent = [0.0]
    size = 2

    def counting(function: Any, factor: float, which: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[which]
            if tensor.nbytes > 1024:
                sent[0] += tensor.nbytes * factor
            return function(*args, **kwargs)

        return counted

    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "all_reduce", counting(dist.all_reduce, 2 * (size - 1) / size, 0))
    patch.setattr(dist, "isend", counting(dist.isend, 1, 0))
    patch.setattr(dist, "broadcast", counting(dist.broadcast, 1 / size, 0))  # on average: one rank of them sends
    module = Plain()
    trainer = make_trainer({"zero_stage": stage}, max_epochs=1)
    trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: sent.__setitem__(0, 0.0)))  # type: ignore[attr-defined]
    steps = 3
    data = torch.utils.data.TensorDataset(torch.randn(4 * steps, 8), torch.zeros(4 * steps, dtype=torch.long))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    patch.undo()
    whole = sum(param.nbytes for param in module.parameters())
    state = trainer.optimizers[0].state.values()
    moments = sum(value.nbytes for entry in state for value in entry.values() if value.ndim)
    return {"sent": sent[0] / steps / whole, "moments": moments / whole / 2}


@pytest.mark.parametrize(("stage", "sent"), [(0, 1.0), (1, 1.0), (2, 1.0)])
def test_bytes_of_an_update_and_of_its_state(pool: RankPool, stage: int, sent: float) -> None:
    for found in pool.run(count_bytes, 2, stage):
        assert found["sent"] == pytest.approx(sent, rel=0.04), "2 * (dp - 1) / dp, with flags"
        assert found["moments"] == pytest.approx(0.5 if stage else 1.0, rel=0.04)
