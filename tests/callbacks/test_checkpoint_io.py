"""``AsyncCheckpointIO`` under Lightning's own strategies and ours: what plain Lightning would have saved, and resumed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

import kenotron
from kenotron.callbacks import AsyncCheckpointIO
from kenotron.checkpoint import EngineSettings, NotACheckpointError, SaveFailedError, is_checkpoint, load_state_dict
from kenotron.testing import RankPool

#: Slow enough that a save is still in flight when the next step comes.
SLOW = EngineSettings(pool_bytes=1 << 15, slot_bytes=1 << 13, max_bytes_per_s=2e5)


class Regressor(L.LightningModule):
    """Batch norm (buffers that change in forward), dropout, a scheduler, and an output tied to the input's weight."""

    def __init__(self, width: int = 24, automatic: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = automatic
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 6))
        self.out = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.out.weight
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = (self.again(self.out(self.body(batch))) - batch).square().mean()
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]

    def train_dataloader(self) -> Any:
        rows = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


class EachStep(L.Callback):
    """Saves every step, and at once spoils what must have been copied already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}")


def trainer_of(strategy: Any, plugins: list[Any], callbacks: list[Any], epochs: int = 2, devices: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, plugins=plugins, callbacks=callbacks, max_epochs=epochs,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip


def train(plugin: Any, folder: Path, *, strategy: Any = "auto", automatic: bool = True) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module = Regressor(automatic=automatic)
    trainer_of(strategy, [plugin], [EachStep(folder)]).fit(module)
    return {"losses": module.losses, "weights": {name: value.clone() for name, value in module.state_dict().items()}}


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize("automatic", [True, False])
def test_every_checkpoint_is_what_plain_lightning_saves(automatic: bool, tmp_path: Path) -> None:
    expected = train(TorchCheckpointIO(), tmp_path / "plain", automatic=automatic)
    plugin = AsyncCheckpointIO(SLOW)
    found = train(plugin, tmp_path / "ours", automatic=automatic)
    assert_same(found, expected)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 12
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        plain = torch.load(tmp_path / "plain" / name, weights_only=False)
        ours = plugin.load_checkpoint(tmp_path / "ours" / name)
        assert_same({key: ours[key] for key in plain}, plain, name)


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(AsyncCheckpointIO(), tmp_path)
    L.seed_everything(3, verbose=False)
    module = Regressor()
    trainer = trainer_of("auto", [AsyncCheckpointIO()], [], epochs=3)
    trainer.fit(module, ckpt_path=tmp_path / "step-12")
    L.seed_everything(3, verbose=False)
    plain = Regressor()
    again = trainer_of("auto", [], [], epochs=3)
    checkpoint = AsyncCheckpointIO().load_checkpoint(tmp_path / "step-12")
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    again.fit(plain, ckpt_path=tmp_path / "plain.ckpt", weights_only=False)
    assert len(module.losses) == 6
    assert module.losses == plain.losses
    assert whole["losses"] != module.losses


def test_pruning_and_last_see_published_checkpoints_only(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=2, every_n_train_steps=1, save_last=True, filename="{step}")
    trainer = trainer_of("auto", [AsyncCheckpointIO(SLOW)], [keep])
    trainer.fit(Regressor())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([*(Path(path).name for path in keep.best_k_models), "last.ckpt"])
    assert all(is_checkpoint(tmp_path / name) for name in names)
    module = Regressor()
    trainer_of("auto", [AsyncCheckpointIO()], [ModelCheckpoint(tmp_path, save_last=True)], epochs=3).fit(
        module, ckpt_path="last"
    )
    assert len(module.losses) == 6


def test_an_error_is_raised_at_the_next_save_or_told_as_asked(tmp_path: Path) -> None:
    class Spoil(EachStep):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(self.folder / "file" / "step-4")
            else:
                super().on_train_batch_end(trainer, pl_module, *args)

    for on_error in ("raise", "warn"):
        folder = tmp_path / on_error
        folder.mkdir()
        (folder / "file").write_text("")
        module = Regressor()
        trainer = trainer_of("auto", [AsyncCheckpointIO(on_error=on_error)], [Spoil(folder)])  # type: ignore[arg-type]
        if on_error == "raise":
            with pytest.raises(SaveFailedError, match="step-4 failed on rank 0"):
                trainer.fit(module)
        else:
            with pytest.warns(UserWarning, match="training goes on: saving .*step-4 failed"):
                trainer.fit(module)
            assert len(module.losses) == 12
            assert is_checkpoint(folder / "step-12")
        assert is_checkpoint(folder / "step-3")


def test_an_exception_in_training_waits_for_the_checkpoint_and_is_the_one_that_is_raised(tmp_path: Path) -> None:
    class Fails(EachStep):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of("auto", [AsyncCheckpointIO(SLOW)], [Fails(tmp_path)]).fit(Regressor())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step}" for step in range(1, 5)]


def test_outside_of_fit_a_save_is_there_when_the_call_returns(tmp_path: Path) -> None:
    trainer = trainer_of("auto", [AsyncCheckpointIO(SLOW)], [])
    module = Regressor()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "after")
    assert is_checkpoint(tmp_path / "after")
    assert torch.equal(load_state_dict(tmp_path / "after")["again.weight"], module.out.weight)


def test_urls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directories on a file system"):
        AsyncCheckpointIO().save_checkpoint({"state_dict": {}}, "s3://bucket/a")


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: small\n")
    (tmp_path / "empty.ckpt").touch()
    for path in (tmp_path / "a.yaml", tmp_path / "empty.ckpt", tmp_path):
        with pytest.raises(NotACheckpointError, match="is not a checkpoint"):
            AsyncCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        AsyncCheckpointIO().load_checkpoint(tmp_path / "nowhere")
    for legacy in (False, True):
        torch.save({"epoch": 3}, tmp_path / "torch.ckpt", _use_new_zipfile_serialization=not legacy)
        assert AsyncCheckpointIO().load_checkpoint(tmp_path / "torch.ckpt") == {"epoch": 3}


def test_the_twin_package_takes_it_too(tmp_path: Path) -> None:
    script = f"""
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
from kenotron.callbacks import AsyncCheckpointIO
trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, plugins=[AsyncCheckpointIO()])
trainer.fit(BoringModel())
trainer.save_checkpoint({str(tmp_path / "a")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
    assert is_checkpoint(tmp_path / "a")


# -------------------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as workers:
        yield workers


def train_on_ranks(strategy: Any, ours: bool, folder: str) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    if strategy == "kenotron":
        strategy = kenotron.KenotronStrategy(zero_stage=1)
    plugin = AsyncCheckpointIO(SLOW) if ours else TorchCheckpointIO()
    trainer = trainer_of(strategy, [plugin], [EachStep(Path(folder))], devices=2)
    module = Regressor()
    trainer.fit(module)
    trainer.strategy.barrier()
    return {"losses": module.losses}


def test_with_ddp_on_two_ranks(pool: RankPool, tmp_path: Path) -> None:
    expected = pool.run(train_on_ranks, 2, "ddp", False, str(tmp_path / "plain"))
    found = pool.run(train_on_ranks, 2, "ddp", True, str(tmp_path / "ours"))
    assert found == expected
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 6
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        plain = torch.load(tmp_path / "plain" / name, weights_only=False)
        ours = AsyncCheckpointIO().load_checkpoint(tmp_path / "ours" / name)
        assert_same(ours["state_dict"], dict(plain["state_dict"]), name)
        assert_same(ours["optimizer_states"], plain["optimizer_states"], name)


def test_our_strategy_saves_its_shards_through_the_plugin(pool: RankPool, tmp_path: Path) -> None:
    pool.run(train_on_ranks, 2, "kenotron", True, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step}" for step in range(1, 7)]
    assert len(list((tmp_path / "step-6").glob("shard-*"))) == 2
