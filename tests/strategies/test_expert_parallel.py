"""Expert parallelism through the Trainer: resuming on other layouts, each expert stored once, loads that callbacks see."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import SLOW, WIDTH, Classifier, Task, close, fit
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from kenotron import checkpoint as checkpoints
from kenotron.testing import RankPool

EXPERTS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "ep2-zero0": (2, {"ep": 2, "zero_stage": 0}),
    "dp4-ep2": (4, {"ep": 2, "zero_stage": 2}),
    "ep4-zero3": (4, {"ep": 4, "zero_stage": 3}),
    "dp4-ep2-hsdp": (4, {"ep": 2, "dp_replicate": 2}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2, "microbatches": 2}),
}


class MoEBlock(nn.Module):
    """transformers' MoE between a user's own layers."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=WIDTH, intermediate_size=8, num_local_experts=EXPERTS, num_experts_per_tok=2)
        self.norm, self.moe = nn.LayerNorm(WIDTH), MixtralSparseMoeBlock(config)
        for param in self.moe.parameters():
            nn.init.normal_(param, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.moe(self.norm(x)[:, None])[:, 0]
        return out


class MoEClassifier(Classifier):
    def __init__(self, **settings: Any) -> None:
        super().__init__(depth=0)
        self.layers = nn.ModuleList(MoEBlock() for _ in range(2))


class KeepLoads(L.Callback):
    """Keeps what the strategy tells of each layer's experts at the end of an epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loads = trainer.strategy.expert_loads()  # type: ignore[attr-defined]
        pl_module.seen = {name: (load.load.tolist(), float(load.dropped), float(load.router_entropy))
                          for name, load in loads.items()}  # fmt: skip


def _save(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def _fit(pool: RankPool, layout: str, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    ranks, strategy = LAYOUTS[layout]
    settings.setdefault("trainer", {"max_epochs": 2, "gradient_clip_val": 0.5})
    return pool.run(fit, ranks, Task(MoEClassifier, strategy, rows=24, folder=str(folder), **settings))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ep2", "one"), ("one", "ep4-zero3"), ("ep4-zero3", "dp4-ep2"), ("ep2-zero0", "pp2-ep2"),
        pytest.param("pp2-ep2", "dp4-ep2-hsdp", marks=SLOW),
    ],
)  # fmt: skip
def test_resume_on_another_ep_continues_the_same_losses(pool: RankPool, first: str, second: str, tmp_path: Path) -> None:
    whole = _fit(pool, first, tmp_path, callbacks=[functools.partial(_save, str(tmp_path))])
    rest = _fit(pool, second, tmp_path, fit={"ckpt_path": str(tmp_path / "epoch=0.ckpt")})
    mean = [sum(r["losses"][i] for r in whole) / len(whole) for i in range(6)]
    close([sum(r["losses"][i] for r in rest) / len(rest) for i in range(3)], mean[3:])
    close(rest[0]["weights"], whole[0]["weights"], 1e-4)


def test_resume_on_the_same_layout_is_bit_for_bit(pool: RankPool, tmp_path: Path) -> None:
    whole = _fit(pool, "dp4-ep2", tmp_path, callbacks=[functools.partial(_save, str(tmp_path))])
    rest = _fit(pool, "dp4-ep2", tmp_path, fit={"ckpt_path": str(tmp_path / "epoch=0.ckpt")})
    for full, part in zip(whole, rest, strict=True):
        assert part["losses"] == full["losses"][3:]
        for name, value in full["weights"].items():
            assert (part["weights"][name] == value).all(), name


@pytest.mark.parametrize("layout", ["ep2-zero0", "dp4-ep2", "dp4-ep2-hsdp"])
def test_every_expert_is_stored_once(pool: RankPool, layout: str, tmp_path: Path) -> None:
    _fit(pool, layout, tmp_path, callbacks=[functools.partial(_save, str(tmp_path))], with_weights=False)
    path = tmp_path / "epoch=1.ckpt"
    manifest = checkpoints.read_manifest(path)
    experts = [tensor for name, tensor in manifest.tensors.items() if ".experts." in name and tensor.shape[:1] == (EXPERTS,)]
    assert len(experts) == 2 * 2 * 3  # layers × (gate_up, down) × (weight and two moments)
    for tensor in experts:
        assert sum(math.prod(piece.shape) for piece in tensor.pieces) == math.prod(tensor.shape)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in manifest.tensors.values())
    assert stored < needed + 8192 * len(manifest.files) + 64 * len(manifest.tensors)


@pytest.mark.parametrize("layout", ["one", "ep2", "pp2-ep2"])
def test_loads_of_experts_are_those_of_all_ranks(pool: RankPool, layout: str, tmp_path: Path) -> None:
    found = _fit(pool, layout, tmp_path, callbacks=[KeepLoads], val_rows=0, with_weights=False)
    expected = _fit(pool, "one", tmp_path, callbacks=[KeepLoads], val_rows=0, with_weights=False)[0]["seen"]
    assert set(expected) == {"layers.0.moe.experts", "layers.1.moe.experts"}
    for rank in found:
        close(rank["seen"], expected, 2e-2)  # a router near a tie may choose another expert
        for load, dropped, entropy in rank["seen"].values():
            assert sum(load) == pytest.approx(1) and dropped == 0 and 0 < entropy <= math.log(EXPERTS) + 1e-6


def test_capacity_drops_and_still_trains(pool: RankPool, tmp_path: Path) -> None:
    task = Task(MoEClassifier, {"ep": 2, "capacity_factor": 0.5}, rows=24, callbacks=[KeepLoads], folder=str(tmp_path))
    for rank in pool.run(fit, 2, task):
        assert all(math.isfinite(loss) for loss in rank["losses"])
        assert all(0.4 < dropped < 0.9 for _, dropped, _ in rank["seen"].values())


def test_recomputed_experts_train_alike(pool: RankPool, tmp_path: Path) -> None:
    class_of = {"recompute": Recomputed, "plain": MoEClassifier}
    found = {
        name: pool.run(fit, 2, Task(module, {"ep": 2}, rows=24, folder=str(tmp_path)))[0] for name, module in class_of.items()
    }
    close(found["recompute"]["losses"], found["plain"]["losses"])
    close(found["recompute"]["weights"], found["plain"]["weights"], 1e-4)


class Recomputed(MoEClassifier):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.shift
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
        logits: Tensor = self.head(x)
        return logits
