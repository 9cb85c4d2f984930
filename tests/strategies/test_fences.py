"""Whatever runs after a save, the file holds what was there at the call; and nothing waits that need not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import make_trainer
from torch import Tensor, nn

from kenotron.checkpoint import Checkpointer, EngineSettings, SaveFailedError, load_state_dict
from kenotron.strategies import CheckpointSettings

#: So slow that nothing that need not be has been copied when the call returns.
CRAWLING = EngineSettings(pool_bytes=1 << 14, slot_bytes=1 << 12, max_bytes_per_s=4e5)
SAVED_AT = 4


def through_data(param: nn.Parameter, value: Tensor) -> None:
    param.data.copy_(value)


def with_other_memory(param: nn.Parameter, value: Tensor) -> None:
    param.data = value.clone()


def in_place(param: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


def with_foreach(param: nn.Parameter, value: Tensor) -> None:
    torch._foreach_copy_([param.detach()], [value])


def with_numpy(param: nn.Parameter, value: Tensor) -> None:
    param.detach().numpy()[...] = value.numpy()


def with_load_state_dict(param: nn.Parameter, value: Tensor) -> None:
    nn.ParameterDict({"p": param}).load_state_dict({"p": value})


WAYS = [through_data, with_other_memory, in_place, with_foreach, with_numpy, with_load_state_dict]


class Module(L.LightningModule):
    """``change`` is called by the hook ``where``."""

    def __init__(self, where: str = "", change: Callable[[Module], None] = lambda module: None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))
        self._in_step = change if where == "training_step" else lambda module: None
        if where and where != "training_step":
            setattr(self, where, lambda *args: change(self))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self._in_step(self)
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@dataclass
class Noted:
    """What the parameters were when they were saved, by the checkpoint's name; who waited for copies."""

    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    waited: list[str] = field(default_factory=list)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted, save, fence = Noted(), Checkpointer.save, Checkpointer.fence

    def save_and_note(self: Checkpointer, path: Any, tensors: Any, *args: Any, **options: Any) -> Any:
        held = {each.name.removeprefix("model/"): each.tensor.clone() for each in tensors if each.name.startswith("model/")}
        noted.saved[Path(path).name] = held
        return save(self, path, tensors, *args, **options)

    def fence_and_note(self: Checkpointer) -> float:
        if self._unsettled:
            noted.waited.append(sys._getframe(1).f_code.co_name)
        return fence(self)

    monkeypatch.setattr(Checkpointer, "save", save_and_note)
    monkeypatch.setattr(Checkpointer, "fence", fence_and_note)
    return noted


def fit(module: Module, callbacks: list[Any], *, max_steps: int = 6) -> None:
    strategy = {"checkpoint": CheckpointSettings(engine=CRAWLING)}
    trainer = make_trainer(strategy, callbacks, max_steps=max_steps, max_epochs=-1)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=4))


def assert_all_hold(folder: Path, noted: Noted, count: int) -> None:
    """Assert that so many checkpoints are there, and hold what was there when they were saved."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(noted.saved)
    assert len(noted.saved) == count
    for name, expected in noted.saved.items():
        found = load_state_dict(folder / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name


# ------------------------------------------------------------------------------------------------------ foreign callers


@pytest.mark.parametrize("put", WAYS)
def test_weights_that_a_callback_swaps_in_saves_and_swaps_out_are_those_in_the_file(
    tmp_path: Path, put: Callable[[nn.Parameter, Tensor], None], noted: Noted
) -> None:
    class Swap(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step != SAVED_AT:
                return
            raw = {name: param.detach().clone() for name, param in pl_module.named_parameters()}
            trainer.save_checkpoint(tmp_path / "raw")
            for param in pl_module.parameters():
                put(param, torch.full_like(param, 7.0))
            trainer.save_checkpoint(tmp_path / "swapped")
            for name, param in pl_module.named_parameters():
                put(param, raw[name])

    fit(Module(), [Swap()])
    assert all(bool((value == 7.0).all()) for value in noted.saved["swapped"].values())
    assert not any(bool((value == 7.0).all()) for value in noted.saved["raw"].values())
    assert_all_hold(tmp_path, noted, 2)


# ---------------------------------------------------------------------------------------------------------- what follows


def clip(module: Module) -> None:
    for param in module.parameters():
        param.data.clamp_(-0.02, 0.02)


def prune(module: Module) -> None:
    module.net[0].weight.detach().numpy()[::2] = 0.0


def reload(module: Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("on_train_batch_end", clip),
        ("on_train_batch_start", prune),
        ("on_before_optimizer_step", reload),
        ("on_train_epoch_start", reload),
        ("training_step", clip),
    ],
)
def test_what_runs_after_a_save_does_not_reach_the_file(
    tmp_path: Path, where: str, change: Callable[[Module], None], noted: Noted
) -> None:
    module = Module(where, change)
    hook = vars(module).get(where)
    fit(module, [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)])
    assert_all_hold(tmp_path, noted, 6)
    assert vars(module).get(where) is hook


class KeepsFormerWeights(L.LightningModule):
    """Steps by hand, and has ``ModelCheckpoint`` save what was there before the step, as its documentation says."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(16, 256)
        self.saved_models: dict[int, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.saved_models[batch_idx] = {name: value.clone() for name, value in self.layer.state_dict().items()}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_weights_that_lightning_itself_swaps_in_are_those_in_the_file(tmp_path: Path) -> None:
    module = KeepsFormerWeights()
    fit(module, [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)], max_steps=4)
    for number in range(4):
        found = load_state_dict(tmp_path / f"step={number + 1}.ckpt")
        assert torch.equal(found["layer.weight"], module.saved_models[number]["weight"])


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_start"])
def test_a_callback_that_comes_after_the_one_that_saves_waits(tmp_path: Path, hook: str, noted: Noted) -> None:
    def scale(trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        for param in pl_module.parameters():
            param.data.mul_(0.5)

    late = L.Callback()
    setattr(late, hook, scale)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer({"checkpoint": CheckpointSettings(engine=CRAWLING)}, [keep], max_steps=4, max_epochs=-1)
    trainer.callbacks.append(late)
    loader = torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4)
    module = Module()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    trainer.fit(module, loader, loader)
    assert_all_hold(tmp_path, noted, 4)
    assert vars(late)[hook] is scale


def test_without_foreign_hooks_the_step_alone_waits(tmp_path: Path, noted: Noted) -> None:
    fit(Module(), [ModelCheckpoint(tmp_path / "plain", filename="{step}", every_n_train_steps=1, save_top_k=-1)])
    assert set(noted.waited) == {"then_fence", "_drain"}
    noted.waited.clear()
    module = Module("on_train_batch_end")
    fit(module, [ModelCheckpoint(tmp_path / "hooked", filename="{step}", every_n_train_steps=1, save_top_k=-1)])
    assert set(noted.waited) == {"waits"}


def test_what_a_step_changes_for_the_first_time_is_told_and_not_published(tmp_path: Path, noted: Noted) -> None:
    def scale_late(module: Module) -> None:
        if module.trainer.global_step == SAVED_AT:
            module.net[2].weight.data.mul_(0.5)

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(SaveFailedError, match=r"step=4.*: model/net\.2\.weight changed between the call and the copy"):
        fit(Module("training_step", scale_late), [keep], max_steps=5)
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]
