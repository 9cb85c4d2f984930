"""Fitting over a pipeline, as an ordinary user of Lightning does it, against plain Lightning in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from strategy_helpers import (
    DP2_PP2,
    PP2,
    SLOW,
    TP2_PP2,
    Classifier,
    Task,
    close,
    fit,
    fit_like_one_process,
    floats,
    loaders,
    make_trainer,
)
from torch import Tensor

from kenotron.testing import RankPool

LAYOUTS = pytest.mark.parametrize("layout", [PP2, TP2_PP2, DP2_PP2], ids=["pp2", "tp2-pp2", "dp2-pp2"])
SMALL_FIRST = pytest.mark.parametrize("layout", [PP2, pytest.param(DP2_PP2, marks=SLOW)], ids=["pp2", "dp2-pp2"])
SMALL = pytest.mark.parametrize("layout", [PP2, DP2_PP2], ids=["pp2", "dp2-pp2"])


@LAYOUTS
def test_fit_with_validation_and_a_smaller_last_batch(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    fit_like_one_process(pool, Classifier, layout, tmp_path)


class CountsSteps(Classifier):
    """Counts validation steps; batches beyond the limits must not be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"val": 0, "sanity": 0}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["sanity" if self.trainer.sanity_checking else "val"] += 1
        super().validation_step(batch, batch_idx)


def test_limits_and_sanity_check(pool: RankPool, tmp_path: Path) -> None:
    trainer = {"limit_train_batches": 2, "limit_val_batches": 0.67, "num_sanity_val_steps": 1, "max_epochs": 2}
    expected, *found = fit_like_one_process(pool, CountsSteps, PP2, tmp_path, trainer=trainer)
    assert expected["seen"] == {"val": 4, "sanity": 1}
    assert [rank["seen"] for rank in found] == [expected["seen"]] * 2
    assert expected["step"] == 4


def stop_early(strategy: Any, folder: str) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    best = ModelCheckpoint(folder, filename="{epoch}-{val_loss:.4f}", monitor="val_loss", save_top_k=2)
    stop = EarlyStopping("val_loss", patience=1, min_delta=0.05)
    trainer = make_trainer(strategy, [best, stop], max_epochs=12)
    trainer.fit(Classifier(), *loaders(trainer, Task(Classifier, strategy)))
    return {
        "stopped": stop.stopped_epoch,
        "best": Path(best.best_model_path).name.removesuffix(".ckpt"),
        "score": float(best.best_model_score),  # type: ignore[arg-type]
        "kept": sorted(path.name.removesuffix(".ckpt") for path in Path(folder).iterdir()),
    }


@SMALL
def test_checkpointing_and_early_stopping_decide_as_in_one_process(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    expected = pool.run(stop_early, 1, None, str(tmp_path / "one"))[0]
    found = pool.run(stop_early, layout[0], layout[1], str(tmp_path / "many"))
    assert 0 < expected["stopped"] < 11
    assert len(expected["kept"]) == 2
    for rank in found:
        close(rank, expected)


class Schedules(Classifier):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        return [optimizer], [{"scheduler": schedule, "interval": self.kind}]


@pytest.mark.parametrize("kind", ["step", "epoch", "plateau"])
def test_learning_rate_schedulers(pool: RankPool, kind: str, tmp_path: Path) -> None:
    trainer = {"max_epochs": 4}
    expected, *_ = fit_like_one_process(pool, Schedules, PP2, tmp_path, settings={"kind": kind}, trainer=trainer)
    assert expected["rates"][-1] < expected["rates"][0]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@SMALL
def test_gradient_clipping(pool: RankPool, layout: Any, algorithm: str, tmp_path: Path) -> None:
    clip = {"gradient_clip_val": 0.2 if algorithm == "norm" else 0.01, "gradient_clip_algorithm": algorithm}
    # SGD: Adam hardly sees the scale of a gradient.
    expected, *_ = fit_like_one_process(pool, Sgd, layout, tmp_path, trainer=clip)
    unclipped = pool.run(fit, 1, Task(Sgd, None))[0]
    assert abs(expected["losses"][-1] - unclipped["losses"][-1]) > 1e-3


class Sgd(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("clip", [None, pytest.param(0.2, marks=SLOW)])
@LAYOUTS
def test_accumulation_with_a_partial_last_update(pool: RankPool, layout: Any, clip: float | None, tmp_path: Path) -> None:
    # 3 batches in an epoch: one update from two of them, one from the last alone.
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    expected, *_ = fit_like_one_process(pool, Sgd, layout, tmp_path, trainer=trainer)
    assert expected["step"] == 4


HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end", "on_train_epoch_end", "on_validation_batch_end", "on_validation_epoch_end",
)  # fmt: skip


class Hooked(Classifier):
    """Notes the order in which hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []


def _note(name: str) -> Any:
    def hook(self: Hooked, *args: Any, **kwargs: Any) -> None:
        self.seen.append(name)

    return hook


for _name in HOOKS:
    setattr(Hooked, _name, _note(_name))


class HookedCallback(L.Callback):
    events: list[str]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.seen_by_callback = self.events = []


for _name in HOOKS:
    setattr(HookedCallback, _name, lambda self, *args, _name=_name, **kwargs: self.events.append(_name))


class HookedBoth(Hooked):
    def on_fit_end(self) -> None:
        self.seen = [*self.seen, "callback:", *self.seen_by_callback]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_run_once_per_batch_and_update(pool: RankPool, accumulate: int, tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": accumulate}
    expected, *found = fit_like_one_process(pool, HookedBoth, PP2, tmp_path, trainer=trainer, callbacks=[HookedCallback])
    assert expected["seen"].count("on_before_optimizer_step") == 2 * (6 if accumulate == 1 else 4)
    for rank in found:
        assert rank["seen"] == expected["seen"]


def test_fast_dev_run(pool: RankPool, tmp_path: Path) -> None:
    expected, *_ = fit_like_one_process(pool, Classifier, PP2, tmp_path, trainer={"fast_dev_run": 2}, with_weights=False)
    assert expected["step"] == 2


def test_overfit_batches(pool: RankPool, tmp_path: Path) -> None:
    trainer = {"overfit_batches": 1, "max_epochs": 4}
    expected, *_ = fit_like_one_process(pool, Classifier, PP2, tmp_path, trainer=trainer)
    assert expected["step"] == 4


class LossInDict(Classifier):
    """Returns more than the loss, and reads it at the end of the batch, on the stage that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "twice": 2 * loss.detach(), "text": "kept"}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


def test_loss_in_a_dict_with_other_keys(pool: RankPool, tmp_path: Path) -> None:
    expected, *found = fit_like_one_process(pool, LossInDict, PP2, tmp_path)
    assert len(expected["seen"]) == 6
    for rank in found:
        close(rank["seen"], expected["seen"], where="outputs of on_train_batch_end")


class Frozen(Classifier):
    """The whole first stage needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.embed, *self.layers[:2]):
            part.requires_grad_(False)
        self.shift.requires_grad_(False)


class FrozenAndFiltered(Frozen):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02, eps=1e-6)


class HeadOnly(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.head.parameters(), lr=0.02, eps=1e-6)


class GroupsByName(Classifier):
    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        decayed = [p for n, p in named if not n.endswith("bias") and "norm" not in n]
        plain = [p for n, p in named if n.endswith("bias") or "norm" in n]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0, "lr": 0.01}], lr=0.02, eps=1e-6
        )


class GroupsByDims(Classifier):
    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors}], lr=0.02, eps=1e-6)


@pytest.mark.parametrize("module", [Frozen, FrozenAndFiltered, HeadOnly, GroupsByName, GroupsByDims])
@SMALL_FIRST
def test_what_the_optimizer_gets(pool: RankPool, layout: Any, module: Any, tmp_path: Path) -> None:
    fit_like_one_process(pool, module, layout, tmp_path, trainer={"gradient_clip_val": 0.5})


class ModelInside(L.LightningModule):
    """The model is an attribute; the head belongs to the LightningModule and is registered after it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)))
        self.out = torch.nn.Linear(8, 3)
        self.temperature = torch.nn.Parameter(torch.tensor(1.5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.out(self.net(x)) / self.temperature, y)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-6)


@SMALL
def test_sequential_with_head_and_scalar_outside(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    strategy = (layout[0], {**layout[1], "blocks": "net"})
    fit_like_one_process(pool, ModelInside, strategy, tmp_path, val_rows=0, trainer={"gradient_clip_val": 0.5})


def stages_see(strategy: Any) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    module = Noisy(dropout=0.3)
    trainer = make_trainer(strategy, max_epochs=1)
    train, _ = loaders(trainer, Task(Noisy, strategy, rows=16))
    trainer.fit(module, train)
    return {"noise": list(dict.fromkeys(module.noise)), "metrics": floats(trainer.callback_metrics)}


class Noisy(Classifier):
    """Augments with noise and a mixup of targets before the model."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.noise: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x)
        self.noise.append(float(noise.sum()))
        return super().training_step((x + noise, y), batch_idx)  # type: ignore[no-any-return]


def test_augmentation_before_the_model_is_the_same_on_all_stages_and_pipelines(pool: RankPool, tmp_path: Path) -> None:
    two = pool.run(stages_see, 2, {"pp": 2, "microbatches": 4})
    four = pool.run(stages_see, 4, {"pp": 4, "microbatches": 4})
    tensor = pool.run(stages_see, 4, {"pp": 2, "tp": 2, "microbatches": 4})
    assert len(two[0]["noise"]) == 8
    for rank in (*two, *four, *tensor):
        assert rank["noise"] == two[0]["noise"]
    # Without dropout the losses are the same, too.
    task = {"rows": 16, "val_rows": 0, "folder": str(tmp_path)}
    losses = [pool.run(fit, pp, Task(Noisy, {"pp": pp, "microbatches": 4}, **task))[0]["losses"] for pp in (2, 4)]
    close(losses[0], losses[1])


def test_dropout_differs_between_microbatches_and_repeats_with_the_seed(pool: RankPool, tmp_path: Path) -> None:
    task = Task(Classifier, PP2[1], settings={"dropout": 0.5}, val_rows=0, folder=str(tmp_path))
    first, again = (pool.run(fit, 2, task)[0] for _ in range(2))
    without = pool.run(fit, 1, Task(Classifier, None, val_rows=0))[0]
    assert first["losses"] == again["losses"]
    assert abs(first["losses"][0] - without["losses"][0]) > 1e-3
