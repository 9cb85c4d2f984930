"""Batches and models of every kind under a pipeline, against plain Lightning in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from strategy_helpers import DP2_PP2, PP2, SLOW, TP2_PP2, WIDTH, Block, Classifier, Task, fit, fit_like_one_process
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from kenotron.testing import RankPool, RanksFailedError

PP4 = (4, {"pp": 4, "microbatches": 4})

# ------------------------------------------------------------------------------------------------------------- batches


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def as_dict(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "nested": {"y": [y]}, "name": "training", "scale": 1.0}


def as_named_tuple(rows: list[Any]) -> Any:
    return Pair(*default_collate(rows))


def as_encoding(rows: list[Any]) -> Any:
    from transformers import BatchEncoding

    x, y = default_collate(rows)
    return BatchEncoding({"x": x, "y": y})


def with_texts(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "y": y, "texts": ["a" * int(label + 1) for label in y], "shared": torch.ones(3, 1)}


def with_targets(rows: list[Any]) -> Any:
    """As detection has it: a list of dicts whose tensors have a size for each sample, some that of the batch."""
    targets = [{"y": torch.full((i % 3 + 2,), int(y)), "id": torch.tensor(i)} for i, (_, y) in enumerate(rows)]
    return [default_collate([x for x, _ in rows]), targets]


def with_ragged_rows(rows: list[Any]) -> Any:
    return {"x": torch.stack([x for x, _ in rows]), "of samples": [torch.cat([y.view(1).float(), x]) for x, y in rows]}


class AnyBatch(Classifier):
    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, list):
            images, targets = batch
            assert len(images) == len(targets)
            return super().loss((images, torch.stack([target["y"][0] for target in targets])))
        if "of samples" in batch:
            assert len(batch["x"]) == len(batch["of samples"])
            return super().loss((batch["x"], torch.stack([row[0] for row in batch["of samples"]]).long()))
        if isinstance(batch, tuple):
            assert isinstance(batch, Pair)
            return super().loss((batch.x, batch.y))
        if "nested" in batch:
            assert batch["name"] == "training"
            return super().loss((batch["x"], batch["nested"]["y"][0]))
        if "texts" in batch:
            assert batch["shared"].shape == (3, 1)
            lengths = torch.tensor([len(text) for text in batch["texts"]])
            assert len(lengths) == len(batch["y"])
            return super().loss((batch["x"], lengths - 1))
        assert type(batch).__name__ == "BatchEncoding"
        return super().loss((batch.x, batch["y"]))


@pytest.mark.parametrize("collate", [as_dict, as_named_tuple, as_encoding, with_texts, with_targets, with_ragged_rows])
def test_batches_of_any_structure(pool: RankPool, collate: Any, tmp_path: Path) -> None:
    fit_like_one_process(pool, AnyBatch, PP2, tmp_path, collate=collate, trainer={"max_epochs": 1})


# -------------------------------------------------------------------------------------------------------------- models


class Recomputes(Classifier):
    """Users' own activation checkpointing around each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.shift
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.compile(backend="aot_eager")


class Wrapped(L.LightningModule):
    """The network is an attribute; the loss has parameters of its own; ``forward`` is called through ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.criterion = Weighted()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-6)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.out(self.norm(x))
        return logits


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.ones(3))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits * self.classes, y)


@pytest.mark.parametrize("module", [Recomputes, Compiled, Wrapped])
@pytest.mark.parametrize("layout", [PP2, pytest.param(DP2_PP2, marks=SLOW)], ids=["pp2", "dp2-pp2"])
def test_plain_modules(pool: RankPool, layout: Any, module: Any, tmp_path: Path) -> None:
    fit_like_one_process(pool, module, layout, tmp_path)


def tokens(rows: list[Any]) -> Tensor:
    return torch.stack([(x * 40).long().abs() % 50 for x, _ in rows])


class Transformer(L.LightningModule):
    """A transformers model, as its documentation says to train one."""

    def __init__(self, kind: str = "llama", reentrant: bool | None = None) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
        more = {"intermediate_size": 32, "max_position_embeddings": 16} if kind != "gpt2" else {"n_positions": 16}
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
        config = AutoConfig.for_model(kind, **sizes, **more, **dropouts, bos_token_id=1, eos_token_id=2)
        self.model = AutoModelForCausalLM.from_config(config)
        if reentrant is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-6)

    def on_fit_start(self) -> None:
        self.model.train()


@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [
        ("llama", None), ("llama", False), ("llama", True),
        ("gpt2", None), pytest.param("gpt2", False, marks=SLOW), pytest.param("gpt2", True, marks=SLOW),
    ],
)  # fmt: skip
def test_transformers_with_and_without_recompute(pool: RankPool, kind: str, reentrant: bool | None, tmp_path: Path) -> None:
    settings = {"kind": kind, "reentrant": reentrant}
    trainer = {"max_epochs": 1}
    fit_like_one_process(pool, Transformer, PP2, tmp_path, settings=settings, collate=tokens, trainer=trainer)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=SLOW)])
def test_transformers_recompute_with_tensor_parallelism(pool: RankPool, reentrant: bool, tmp_path: Path) -> None:
    settings = {"kind": "llama", "reentrant": reentrant}
    fit_like_one_process(pool, Transformer, TP2_PP2, tmp_path, settings=settings, collate=tokens, trainer={"max_epochs": 1})


class CallsTwice(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + super().loss(batch)


class SkipsBlocks(Classifier):
    """Connections around blocks, written where the blocks are called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.embed(x) + self.shift
        for i, layer in enumerate(self.layers):
            if self.kind == "residual":
                x = x + layer(x)
            elif self.kind == "from the first":
                x = layer(x + 0.5 * first) if i == 3 else layer(x)
            else:  # shapes alone
                x = layer(x) + torch.ones_like(first)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("kind", ["residual", "from the first"])
@pytest.mark.parametrize("layout", [PP2, PP4], ids=["pp2", "pp4"])
def test_numbers_that_do_not_travel_are_missed_in_the_first_step(
    pool: RankPool, layout: Any, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(RanksFailedError, match="skip connections that go around blocks inside"):
        pool.run(fit, layout[0], Task(SkipsBlocks, layout[1], {"kind": kind}, folder=str(tmp_path)), timeout_s=60)


def test_shapes_of_what_does_not_travel_may_be_used(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, SkipsBlocks, PP2, tmp_path, settings={"kind": "shapes"}, trainer={"max_epochs": 1})


class Outside(Classifier):
    """What a loss takes from elsewhere than the last block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Sequential(self.embed, nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList(WithLoss() for _ in range(4))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        first = x = self.embed(x) + self.shift
        losses = torch.zeros(())
        for layer in self.layers:
            x, loss = layer(x)
            losses = losses + loss
        if self.kind == "losses of blocks":
            return F.cross_entropy(self.head(x), y) + losses
        if self.kind == "to the head":
            return F.cross_entropy(self.head(x + first), y)
        if self.kind == "head tied by hand":
            x = F.linear(x, self.embed[1].weight)
        penalty = sum(p.square().sum() for p in self.parameters()) if self.kind == "penalty" else torch.zeros(())
        if self.kind == "looks":
            norms = torch.stack([p.detach().norm() for p in self.parameters() if p.dtype.is_floating_point])
            penalty = 0.0 * (norms.sum() + losses + first.sum()).detach()
        return F.cross_entropy(self.head(x), y) + penalty


class WithLoss(Block):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x, x.square().mean()


@pytest.mark.parametrize("val_rows", [0, 8], ids=["first in training", "first in validation"])
@pytest.mark.parametrize("kind", ["head tied by hand", "penalty"])
def test_weights_of_other_stages_are_refused(pool: RankPool, kind: str, val_rows: int, tmp_path: Path) -> None:
    task = Task(Outside, PP2[1], {"kind": kind}, val_rows=val_rows, folder=str(tmp_path))
    with pytest.raises(RanksFailedError, match=r"computes with 'embed\.[01]\.weight' while pipeline stage 1 runs"):
        pool.run(fit, 2, task, timeout_s=60)


@pytest.mark.parametrize(("kind", "layout"), [("losses of blocks", PP4), ("to the head", PP2)], ids=["losses", "head"])
def test_a_loss_of_what_does_not_travel_is_refused(pool: RankPool, layout: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="the loss depends on what an earlier pipeline stage computed"):
        pool.run(fit, layout[0], Task(Outside, layout[1], {"kind": kind}, folder=str(tmp_path)), timeout_s=60)


def test_looking_at_what_is_elsewhere_is_allowed(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, Outside, PP2, tmp_path, settings={"kind": "looks"}, trainer={"max_epochs": 1})


def with_nan(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return Pair(x.where(x < 1, torch.nan), y)


class Broken(Classifier):
    """One block of the second stage has weights that are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.layers[2].down.weight.fill_(torch.nan)


@pytest.mark.parametrize(("module", "collate"), [(Classifier, with_nan), (Broken, None)], ids=["data", "weights"])
def test_nan_of_another_origin_is_no_such_thing(pool: RankPool, module: Any, collate: Any, tmp_path: Path) -> None:
    task = Task(module, PP2[1], collate=collate, trainer={"max_epochs": 1}, folder=str(tmp_path))
    for found in pool.run(fit, 2, task, timeout_s=60):
        assert len(found["losses"]) == 3
        assert not torch.tensor(found["losses"]).isfinite().any()


def test_calling_the_model_twice_is_refused_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="called the pipelined module twice") as error:
        pool.run(fit, 2, Task(CallsTwice, PP2[1], val_rows=0, folder=str(tmp_path)), timeout_s=60)
    assert "--- rank 0" in str(error.value)
    assert "--- rank 1" in str(error.value)
