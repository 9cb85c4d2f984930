"""What a user got wrong is a ``ValueError`` on every rank, soon, and says what to type instead."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

import kenotron
from kenotron.models import Decoder
from kenotron.testing import RankPool

SECONDS = 10.0


class TinyLM(L.LightningModule):
    """A transformers model whose sizes a test chooses; ``step`` names what its training_step does wrong."""

    def __init__(self, step: str = "", kind: str = "llama", **sizes: int) -> None:
        super().__init__()
        settings = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 96, **sizes}
        config = AutoConfig.for_model(kind, intermediate_size=96, num_hidden_layers=2, **settings)
        self.model = AutoModelForCausalLM.from_config(config)
        self.step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.step == "raises" and self.global_rank == self.trainer.world_size - 1:
            raise ValueError("this sample is broken")
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        if self.step == "twice":
            loss = loss + self.model(input_ids=batch, labels=batch, use_cache=False).loss
        if self.step == "vector":
            return loss.expand(3)
        if self.step == "nothing":
            return {"no_loss": loss}
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DecoderLM(TinyLM):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.model = Decoder(self.model.config)


class ManualLM(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(TinyLM):
    def configure_optimizers(self) -> Any:
        head, rest = self.model.lm_head, self.model.model
        return [torch.optim.SGD(head.parameters(), lr=0.1), torch.optim.SGD(rest.parameters(), lr=0.1)]


class NoBlocks(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.second(self.first(batch.float()[:, :8])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NestedLists(L.LightningModule):
    """Blocks that are lists, of which only the parts are called; ``kind``: what else is odd about it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        parts = [nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]) for _ in range(2)]
        self.layers, self.head = nn.ModuleList(parts), nn.Linear(8, 1)
        if kind == "loose":
            self.automatic_optimization = False
            self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(8))])
        self.kind = kind

    def configure_callbacks(self) -> Any:
        return [StochasticWeightAveraging(0.1)] if self.kind == "averaged" else []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.float()
        for first, second in self.layers:
            x = x + second(torch.tanh(first(x)))
        return self.head(x).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attempt(
    module: type[L.LightningModule], model: dict[str, Any], strategy: dict[str, Any], batch: int
) -> tuple[str, str, float]:
    """Try to fit on this rank. Returns the error's type and text, and how long it took to come."""
    world = int(os.environ["WORLD_SIZE"])
    start = time.monotonic()
    try:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=kenotron.KenotronStrategy(**strategy),
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DataLoader(torch.randint(0, 90, (4 * batch, 8)), batch_size=batch)
        trainer.fit(module(**model), data)
    except Exception as error:
        told: BaseException | None = error
        for _ in range(100):  # no error is its own cause
            told = None if told is None else told.__cause__
        assert told is None
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "nothing was raised", time.monotonic() - start


PP2: dict[str, Any] = {"pp": 2, "microbatches": 2}

CASES = {
    "sizes that do not multiply to the world": (TinyLM, {}, {"tp": 3}, 4, "does not divide the world of 2"),
    "dp that does not fit": (TinyLM, {}, {"dp": 4}, 4, "Start 4 processes"),
    "heads": (TinyLM, {"num_attention_heads": 3, "head_dim": 16}, {"tp": 2}, 4, "3 heads, which tp=2 does not divide"),
    "KV heads": (TinyLM, {}, {"tp": 2}, 4, "3 KV heads"),
    "KV heads in one matrix with others": (DecoderLM, {}, {"tp": 2}, 4, "one has 3 heads of 8 rows: tp=2 does not divide"),
    "vocabulary": (TinyLM, {"vocab_size": 97, "num_key_value_heads": 2}, {"tp": 2}, 4, "vocabulary is 97"),
    "a style that does not fit its module": (
        TinyLM, {"num_key_value_heads": 2}, {"tp": 2, "plan": {"model.model.layers.*.input_layernorm": "colwise"}}, 4,
        "applies to nn.Linear",
    ),
    "fewer blocks than stages": (
        TinyLM, {}, {"pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, 4, "2 blocks, fewer than the 4",
    ),
    "batch not divisible by microbatches": (TinyLM, {}, {"pp": 2, "microbatches": 3}, 4, "not divisible by microbatches=3"),
    "no block list": (NoBlocks, {}, PP2, 4, "no block list found"),
    "blocks names nothing": (TinyLM, {}, {**PP2, "blocks": "stack"}, 4, "blocks='stack' names no"),
    "tp without a plan": (NoBlocks, {}, {"tp": 2}, 4, "no plan says what becomes of NoBlocks"),
    "blocks that nobody calls": (NestedLists, {}, PP2, 4, "layers.0 is a ModuleList, which has no forward"),
    "parameters in a list, updated by hand": (NestedLists, {"kind": "loose"}, {"zero_stage": 3}, 4, "dict in it (shifts.0)"),
    "averages of sharded weights": (
        NestedLists, {"kind": "averaged"}, {"zero_stage": 3}, 4, "StochasticWeightAveraging averages whole",
    ),
    "a plan naming no module": (TinyLM, {}, {"tp": 2, "plan": {"model.encoder.q": "colwise"}}, 4, "no module of TinyLM"),
    "ep that does not divide the ranks": (TinyLM, {}, {"ep": 3}, 4, "ep=3 does not divide dp_shard × cp = 2 × 1"),
    "ep on a model without experts": (TinyLM, {}, {"ep": 2}, 4, "TinyLM has no experts modules"),
    "ep that does not divide the experts": (
        TinyLM, {"kind": "mixtral", "num_local_experts": 3}, {"ep": 2}, 4, "has 3 experts, which ep=2 does not divide",
    ),
    "cp without a transformers model": (NoBlocks, {}, {"cp": 2}, 4, "NoBlocks holds no transformers model"),
    "cp with layers that are no attention": (
        TinyLM, {"kind": "qwen3_next", "num_experts": 4}, {"cp": 2}, 4, "layers of kind linear_attention",
    ),
    "heads that ulysses can't split": (
        TinyLM, {"num_attention_heads": 3, "head_dim": 16}, {"cp": 2, "context": "ulysses"}, 4, "splits 3 attention heads",
    ),
    "manual optimization": (ManualLM, {}, PP2, 4, "manual optimization"),
    "several optimizers": (TwoOptimizers, {}, PP2, 4, "multiple optimizers"),  # Lightning's own
    "the model called twice": (TinyLM, {"step": "twice"}, PP2, 4, "called the pipelined module twice"),
    "a loss that is no scalar, pp": (TinyLM, {"step": "vector"}, PP2, 4, "must be a scalar"),
    "a loss that is no scalar, dp": (TinyLM, {"step": "vector"}, {}, 4, "must be a scalar"),
    "no loss at all": (TinyLM, {"step": "nothing"}, PP2, 4, "without a loss tensor"),
    "a rank raises, pp": (TinyLM, {"step": "raises"}, PP2, 4, "this sample is broken"),
    "a rank raises, dp": (TinyLM, {"step": "raises"}, {}, 4, "this sample is broken"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_rank_raises_a_value_error_that_says_what_to_type(name: str, pool: RankPool) -> None:
    module, model, strategy, batch, text = CASES[name]
    for kind, message, seconds in pool.run(attempt, 2, module, model, strategy, batch, timeout_s=60):
        assert kind == ("RuntimeError" if module is TwoOptimizers else "ValueError"), f"{kind}: {message}"
        assert text in message
        assert seconds < SECONDS


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tp": 0}, "tp=0 is not a number of ranks"),
        ({"pp": True}, "pp=True is not a number of ranks"),
        ({"zero_stage": 4}, "zero_stage=4 is not a ZeRO stage"),
        ({"dp": 4, "dp_replicate": 3}, "dp_replicate=3 does not divide dp=4"),
        ({"cp": 2, "context": "spiral"}, "context='spiral' is unknown"),
        ({"ep": 2, "capacity_factor": 0}, "capacity_factor=0, ep=2"),
        ({"capacity_factor": 1.25}, "capacity_factor=1.25, ep=1"),
        ({"tpp": 2}, "KenotronStrategy has no setting tpp; the nearest is tp"),
        ({"schedule": "gpipe", "pp": 2}, "schedule='gpipe' is unknown"),
        ({"schedule": "interleaved_1f1b", "pp": 2}, "set virtual_stages to 2 or more"),
        ({"virtual_stages": 2, "pp": 2}, "one stage per rank"),
        ({"schedule": "zbv", "pp": 2, "virtual_stages": 3}, "exactly two stages"),
        ({"schedule": "interleaved_1f1b", "pp": 2, "virtual_stages": 2, "microbatches": 5}, "set a multiple of 2"),
        ({"microbatches": 0, "pp": 2}, "microbatches=0 is no number"),
        ({"microbatches": 4}, "but pp=1"),
        ({"sequence_parallel": True}, "but tp=1"),
        ({"plan": "auto", "tp": 2}, "plan='auto' is a str"),
        ({"plan": {"x": "columnwise"}}, "is no style"),
    ],
)
def test_settings_that_can_not_be_are_refused_at_once(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        kenotron.KenotronStrategy(**settings)
