"""Products in float8: torchao's, bit for bit, on any layout."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from kenotron import Float8, KenotronStrategy
from kenotron.models import Decoder
from kenotron.testing import RankPool


@pytest.fixture
def float8() -> Any:
    """torchao. It is not in the test extra: transformers imports it where it is, and it talks while it is imported."""
    return pytest.importorskip("torchao.float8")


CONFIG = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_products_are_those_of_torchao(float8: Any, recipe: Any) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False)).bfloat16()
    theirs = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False)).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    float8.convert_to_float8_training(theirs, config=config)
    assert Float8(recipe=recipe, emulate=True).apply([ours]) == 2
    x = torch.randn(48, 32, dtype=torch.bfloat16)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert torch.equal(ours(x), theirs(x))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_what_should_not_or_can_not_is_left_alone(float8: Any) -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    block = nn.ModuleDict({"gate": nn.Linear(32, 32), "narrow": nn.Linear(32, 8), "odd": Odd(32, 32), "up": nn.Linear(32, 32)})
    assert Float8(emulate=True).apply([block]) == 1
    assert "forward" in block["up"].__dict__ and "forward" not in block["odd"].__dict__
    assert Float8(emulate=True, skip=[]).apply([nn.ModuleDict({"gate": nn.Linear(32, 32)})]) == 1


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = Decoder(LlamaConfig(**CONFIG))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def fit(strategy: dict[str, Any]) -> list[float]:
    warnings.filterwarnings("ignore")
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=KenotronStrategy(**strategy), max_steps=20,
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    rows = torch.arange(8 * 24).view(8, 24) * 7 % 61
    own = rows[place["rank"] :: place["num_replicas"]]
    module = Module()
    trainer.fit(module, DataLoader(own, batch_size=len(own)))  # type: ignore[arg-type]
    return module.losses


@pytest.mark.timeout(300)
def test_layouts_train_alike_and_nearly_as_without(float8: Any) -> None:
    with RankPool(2) as pool:
        without = pool.run(fit, 1, {})[0]
        alone = pool.run(fit, 1, {"float8": Float8(emulate=True)})[0]
        assert alone != without and max(abs(a - b) for a, b in zip(alone, without, strict=True)) < 5e-2
        assert alone[-1] < alone[0] - 1
        for further in ({"tp": 2}, {"zero_stage": 3, "recompute": "full"}, {"pp": 2, "microbatches": 2}):
            found = pool.run(fit, 2, {"float8": Float8(emulate=True), **further})[0]
            assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) < 2e-2, further


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="recipe='fp4'"):
        Float8(recipe="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no regular expression"):
        Float8(skip=["("])
    with pytest.raises(ValueError, match=r"needs a GPU.*this is a CPU.*emulate=True"):
        Float8().check(torch.device("cpu"))
