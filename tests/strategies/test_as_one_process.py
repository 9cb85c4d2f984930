"""In one process the strategy does what Lightning's own does there: the order of hooks, random numbers, what is left behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from strategy_helpers import Classifier, Rows, loader, make_trainer
from torch import nn

import kenotron


def data() -> Any:
    return loader(Rows(16), 8)


class Noted(Classifier):
    """Notes the order of its hooks."""

    def __init__(self, order: list[str]) -> None:
        super().__init__(depth=1, dropout=0.1)
        self.order = order
        self.hparams.clear()
        self.hparams["lr"] = 0.02

    def setup(self, stage: str) -> None:
        self.order.append("setup")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.order.append(f"on_load_checkpoint of {len(checkpoint['state_dict'])} tensors")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.order.append("load_state_dict")
        return super().load_state_dict(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        self.order.append("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.order.append("on_fit_start")


class Counter(L.Callback):
    def __init__(self, order: list[str]) -> None:
        self.order, self.count = order, 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order.append("callback's load_state_dict")
        self.count = state_dict["count"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.order.append(f"callback's on_fit_start at {self.count}")

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def fit(strategy: str, folder: Path, path: Path | None = None, epochs: int = 1) -> tuple[L.Trainer, list[str]]:
    order: list[str] = []
    trainer = make_trainer(strategy, [Counter(order)], default_root_dir=folder, max_epochs=epochs)
    trainer.fit(Noted(order), data(), ckpt_path=path)
    return trainer, order


@pytest.mark.parametrize("strategy", ["kenotron", "kenotron_ddp"])
def test_resume_calls_hooks_in_the_order_of_one_process(strategy: str, tmp_path: Path) -> None:
    found = {}
    for name in ("auto", strategy):
        trainer, _ = fit(name, tmp_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        trainer, found[name] = fit(name, tmp_path, tmp_path / f"{name}.ckpt", epochs=2)
        assert trainer.global_step == 4
    assert found[strategy] == found["auto"]
    assert "callback's on_fit_start at 2" in found[strategy]


def test_a_hook_may_change_the_weights_that_are_loaded(tmp_path: Path) -> None:
    class Renamed(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            state["shift"] = state.pop("old") * 2

    class Old(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["old"] = checkpoint["state_dict"].pop("shift")

    trainer = make_trainer("kenotron", max_steps=1)
    old = Old(depth=1)
    trainer.fit(old, data())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    new = Renamed(depth=1)
    make_trainer("kenotron").validate(new, data(), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    assert torch.equal(new.shift, 2 * old.shift)
    assert torch.equal(new.head.weight, old.head.weight)


def random_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.random())


def test_generators_go_on_as_in_one_process() -> None:
    found = {}
    for strategy in ("auto", "kenotron"):
        L.seed_everything(7, verbose=False)
        module, trainer = Classifier(depth=1, dropout=0.3), make_trainer(strategy, max_epochs=1)
        numbers = []
        for call in (trainer.fit, trainer.validate, trainer.fit):
            call(module, data())
            numbers.append(random_numbers())
        found[strategy] = numbers, module.head.weight.detach().clone()
    assert found["kenotron"][0] == found["auto"][0]
    assert torch.equal(found["kenotron"][1], found["auto"][1])


class Tuned(Classifier):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self) -> Any:
        return loader(Rows(16), self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(Rows(4), self.batch_size)


TUNE: list[Callable[[Tuner, Any], Any]] = [
    lambda tuner, module: tuner.lr_find(module, num_training=4),
    lambda tuner, module: tuner.scale_batch_size(module, max_trials=2),
]


@pytest.mark.parametrize("tune", TUNE, ids=["lr_find", "scale_batch_size"])
def test_the_tuner_leaves_nothing_behind(tune: Callable[[Tuner, Any], Any], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    trainer = make_trainer("kenotron", [ModelCheckpoint(tmp_path / "made")], default_root_dir=tmp_path)
    module = Tuned()
    weights = module.head.weight.detach().clone()
    tune(Tuner(trainer), module)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(module.head.weight, weights)
    assert not [thread for thread in set(threading.enumerate()) - before if "kenotron" in thread.name]


def test_saving_leaves_no_thread_behind(tmp_path: Path) -> None:
    trainer = make_trainer("kenotron", [ModelCheckpoint(tmp_path, every_n_train_steps=1)], max_steps=2)
    trainer.fit(Classifier(depth=1), data())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not [thread for thread in threading.enumerate() if "kenotron" in thread.name]


class Returns(Classifier):
    """Returns from its steps what it is given, of the loss."""

    def __init__(self, returns: Callable[[Any], Any], automatic: bool = True) -> None:
        super().__init__(depth=1)
        self.returns, self.automatic_optimization = returns, automatic
        self.hparams.clear()
        self.hparams["lr"] = 0.02

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.returns(self.loss(batch))


class Output(dict[str, Any]):
    """Stands for the outputs of other libraries, which are mappings."""


@pytest.mark.parametrize(
    ("returns", "automatic"),
    [
        (lambda loss: None, True),
        (lambda loss: Output(loss=loss, seen=[1]), True),
        (lambda loss: {"loss": loss.view(1)}, True),
        (lambda loss: {"anything": "else"}, False),
    ],
    ids=["none", "mapping", "one element", "manual dict"],
)
def test_training_step_may_return_what_lightning_allows(returns: Callable[[Any], Any], automatic: bool) -> None:
    trainer = make_trainer("kenotron", max_epochs=1)
    trainer.fit(Returns(returns, automatic), data())
    assert trainer.fit_loop.epoch_progress.current.completed == 1


def test_a_loss_that_cannot_be_differentiated_is_told_as_lightning_tells_it() -> None:
    with pytest.raises(L.pytorch.utilities.exceptions.MisconfigurationException, match="must return a Tensor, a dict, or None"):
        make_trainer("kenotron", max_epochs=1).fit(Returns(float), data())


def test_a_loss_of_many_elements_goes_with_a_backward_of_ones_own() -> None:
    class Summed(Returns):
        def backward(self, loss: torch.Tensor) -> None:
            loss.sum().backward()

    module = Summed(lambda loss: loss * torch.ones(3))
    before = module.head.weight.detach().clone()
    make_trainer("kenotron", max_epochs=1).fit(module, data())
    assert not torch.equal(module.head.weight, before)


def test_a_compiled_module_trains() -> None:
    found = {}
    for strategy in ("auto", "kenotron"):
        L.seed_everything(7, verbose=False)
        module = Returns(lambda loss: loss)
        make_trainer(strategy, max_epochs=1).fit(torch.compile(module, backend="eager"), data())
        found[strategy] = module.head.weight.detach()
    assert torch.equal(found["kenotron"], found["auto"])


def test_a_module_with_a_compiled_child_is_resumed(tmp_path: Path) -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__(depth=1)
            self.head: Any = torch.compile(nn.Linear(16, 3), backend="eager")

    trainer = make_trainer("kenotron", max_steps=1)
    trainer.fit(Compiled(), data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make_trainer("kenotron", max_steps=2)
    again.fit(Compiled(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 2


def test_a_module_is_trained_further_by_another_strategy() -> None:
    module = Classifier(depth=1)
    for strategy in ("kenotron", "auto", "kenotron_ddp", "kenotron_zero3", "kenotron"):
        before = module.head.weight.detach().clone()
        make_trainer(strategy, max_epochs=1).fit(module, data())
        assert not torch.equal(module.head.weight, before)
    assert isinstance(module.head.weight, nn.Parameter)
    assert kenotron.KenotronStrategy().layout.keeps_whole_parameters
