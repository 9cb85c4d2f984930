"""What hooks do to ``checkpoint["state_dict"]``: it is what is saved, and what is loaded, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from strategy_helpers import SLOW, TP2_PP2, Classifier, Keep, Task, close, loaders, make_trainer

import kenotron
from kenotron import checkpoint as checkpoints
from kenotron.testing import RankPool

LAYOUTS: dict[str, tuple[int, Any]] = {"one": (1, {}), "dp2-zero3": (2, {"zero_stage": 3}), "tp2-pp2": TP2_PP2}


class Renames(Classifier):
    """Saves under the names of another version, which it knows when it loads, and edits a value on both ways."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in state.items()}
        checkpoint["state_dict"]["statistics"] = torch.arange(3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        self.statistics = state.pop("statistics") + 1
        for name in list(state):
            state[name.removeprefix("old.")] = state.pop(name)
        self.untouched = sum(isinstance(value, checkpoints.LazyTensor) and value.is_untouched for value in state.values())
        state["head.bias"] = 2 * state["head.bias"]
        state["shift"].add_(1)
        self.seen = float(state["layers.3.up.weight"].sum())


def save_and_resume(strategy: Any, folder: str) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    whole, rest = Keep(), Keep()
    trainer = make_trainer(strategy, [whole], max_epochs=2)

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(f"{folder}/{trainer.current_epoch}.ckpt")

    trainer.callbacks.append(Save())
    trainer.fit(Renames(), *loaders(trainer, Task(Renames, strategy)))

    class Exact(Renames):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            checkpoint["state_dict"]["head.bias"] = checkpoint["state_dict"]["head.bias"] / 2
            checkpoint["state_dict"]["shift"].sub_(1)

    module = Exact()
    trainer = make_trainer(strategy, [rest], max_epochs=2)
    trainer.fit(module, *loaders(trainer, Task(Renames, strategy)), ckpt_path=f"{folder}/0.ckpt")
    edited = Renames()
    trainer = make_trainer(strategy, max_epochs=1)
    trainer.validate(edited, loaders(trainer, Task(Renames, strategy))[1], ckpt_path=f"{folder}/0.ckpt", verbose=False)
    trainer.save_checkpoint(f"{folder}/edited.ckpt")
    return {
        "whole": whole.losses, "rest": rest.losses, "untouched": module.untouched, "seen": module.seen,
        "statistics": module.statistics.tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["one", pytest.param("dp2-zero3", marks=SLOW), "tp2-pp2"])
def test_renamed_and_edited_tensors_are_saved_and_loaded(pool: RankPool, name: str, tmp_path: Path) -> None:
    found = pool.run(save_and_resume, *LAYOUTS[name], str(tmp_path))
    saved = kenotron.load_state_dict(tmp_path / "0.ckpt")
    names = set(Classifier().state_dict())
    assert set(saved) == {"statistics"} | {f"old.{each}" for each in names}
    assert saved["old.layers.0.up.weight"].shape == (32, 16)
    for rank in found:
        close(rank["rest"], rank["whole"][3:], 1e-5)  # the optimizer's state found its renamed parameters
        assert rank["untouched"] == len(names) and rank["statistics"] == [1, 2, 3]
        close(rank["seen"], float(saved["old.layers.3.up.weight"].sum()), 1e-5)
    edited = kenotron.load_state_dict(tmp_path / "edited.ckpt")
    assert torch.equal(edited["old.head.bias"], 2 * saved["old.head.bias"])
    assert torch.equal(edited["old.shift"], saved["old.shift"] + 1)
    assert torch.equal(edited["old.layers.1.down.weight"], saved["old.layers.1.down.weight"])


class EditsAndRenames(Classifier):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["half"] = state.pop("layers.0.up.weight") / 2


def save_what_is_told(strategy: Any, folder: str) -> str:
    trainer = make_trainer(strategy, max_steps=1)
    trainer.fit(EditsAndRenames(), loaders(trainer, Task(EditsAndRenames, strategy))[0])
    try:
        trainer.save_checkpoint(f"{folder}/a.ckpt")
    except ValueError as error:
        return str(error)
    return "saved"


def test_a_part_of_a_weight_is_not_saved_as_a_whole_one(pool: RankPool, tmp_path: Path) -> None:
    for told in pool.run(save_what_is_told, 2, {"tp": 2}, str(tmp_path)):
        assert "'half'" in told and "'layers.0.up.weight'" in told and "not both" in told
    assert pool.run(save_what_is_told, 2, {}, str(tmp_path)) == ["saved", "saved"]


def test_an_emptied_list_of_optimizer_states_starts_them_anew(tmp_path: Path) -> None:
    class Forgets(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(self.parameters()))
            checkpoint["optimizer_states"] = []

        def on_train_start(self) -> None:
            self.kept = len(self.trainer.optimizers[0].state)

    trainer = make_trainer({}, max_epochs=1)
    trainer.fit(Forgets(), *loaders(trainer, Task(Forgets, {})))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = Forgets()
    trainer = make_trainer({}, max_epochs=2)
    trainer.fit(module, *loaders(trainer, Task(Forgets, {})), ckpt_path=tmp_path / "a.ckpt")
    assert module.kept == 0


def test_a_lazy_tensor_behaves_as_a_tensor() -> None:
    read = []

    def load() -> torch.Tensor:
        read.append(1)
        return torch.arange(6.0).view(2, 3)

    def lazy() -> Any:
        return checkpoints.LazyTensor("w", (2, 3), torch.float32, load)

    one = lazy()
    assert one.shape == (2, 3) and one.dtype == torch.float32 and one.is_untouched and not read
    one[0] = 7
    assert one.tolist() == [[7, 7, 7], [3, 4, 5]] and len(read) == 1
    assert torch.equal(lazy() + 1, torch.arange(1, 7.0).view(2, 3))
    assert lazy().numpy().sum() == 15 and lazy().clone().sum() == 15 and type(lazy() * 1) is torch.Tensor
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.load_state_dict({"weight": lazy()})
    assert layer.weight.tolist() == load().tolist()
    assert torch.nn.Parameter(lazy()).sum() == 15
    assert torch.cat([lazy(), lazy()]).shape == (4, 3)
