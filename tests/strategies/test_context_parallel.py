"""Context parallelism through the Trainer: resuming on other layouts, packed documents, validation, steps of any kind."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import SLOW, Keep, close, make_trainer, whole_weights
from torch import Tensor
from torch.utils.data import DataLoader

from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import tiny

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "cp2-ulysses": (2, {"cp": 2, "context": "ulysses", "zero_stage": 0}),
    "cp2-pp2": (4, {"cp": 2, "pp": 2, "microbatches": 2}),
    "cp2-dp2": (4, {"cp": 2, "zero_stage": 3}),
}
LENGTH, ROWS, BATCH = 22, 24, 4  # a length that nothing divides


class PackedLM(tiny.TinyLM):
    """Batches are mappings with packed documents; the step is one of those that users write."""

    def __init__(self, step: str = "labels") -> None:
        super().__init__("llama", layers=2)
        self.step = step

    def loss(self, batch: dict[str, Tensor]) -> Any:
        assert self.model is not None
        ids, positions = batch["input_ids"], batch["position_ids"]
        if self.step == "labels":
            return self.model(input_ids=ids, position_ids=positions, labels=batch["labels"], use_cache=False).loss
        logits = self.model(ids, position_ids=positions, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        if self.step == "own":
            return each.sum() / (batch["labels"][:, 1:] != -100).sum()
        return {"loss": each.sum(), "num_tokens": (batch["labels"][:, 1:] != -100).sum()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        loss = self.loss(batch)
        self.log("train_loss", loss["loss"] / loss["num_tokens"] if isinstance(loss, dict) else loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        assert self.model is not None
        out = self.model(**batch, use_cache=False)
        right = out.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
        self.log_dict({"val_loss": out.loss, "accuracy": right.float().mean()}, sync_dist=True)


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(0, tiny.VOCABULARY, (LENGTH,), generator=generator)
        cut = int(torch.randint(2, LENGTH - 2, (), generator=generator))
        positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
        labels = ids.clone()
        labels[cut] = -100  # the first token of a document follows from nothing
        labels[: cut // 2] = -100
        found.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    return found


def train(strategy: dict[str, Any], folder: str, step: str, epochs: int, saves: bool, resume: str | None) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    keep = Keep()
    callbacks: list[Any] = [keep]
    if saves:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    trainer = make_trainer(strategy, callbacks, max_epochs=epochs, gradient_clip_val=0.5)
    layout = trainer.strategy.layout  # type: ignore[attr-defined]
    own = [row for start in range(0, ROWS, BATCH) for row in rows(ROWS)[start : start + BATCH]]
    size, rank = layout.dp_size, layout.dp_rank(trainer.global_rank)
    own = [row for i, row in enumerate(own) if i % BATCH // (BATCH // size) == rank]
    loader: Any = DataLoader(own, batch_size=BATCH // size)  # type: ignore[arg-type]
    trainer.fit(PackedLM(step), loader, loader, ckpt_path=resume)
    return {"losses": keep.losses, "epochs": keep.epochs, "weights": whole_weights(trainer, folder)}


def fit(pool: RankPool, layout: str, folder: Path, step: str = "labels", **settings: Any) -> dict[str, Any]:
    count, strategy = LAYOUTS[layout]
    settings = {"epochs": 1, "saves": False, "resume": None, **settings}
    ranks = pool.run(train, count, strategy, str(folder), step, **settings)
    for rank in ranks:  # what is reduced over dp is the same on all ranks, and the rest on those of one dp rank
        close([epoch["val_loss"] for epoch in rank["epochs"]], [epoch["val_loss"] for epoch in ranks[0]["epochs"]])
    return {**ranks[0], "losses": [sum(r["losses"][i] for r in ranks) / count for i in range(len(ranks[0]["losses"]))]}


@pytest.mark.parametrize("step", ["labels", "own", "sums"])
@pytest.mark.parametrize("layout", ["cp2", "cp2-ulysses"])
def test_steps_of_any_kind_train_like_one_process(pool: RankPool, layout: str, step: str, tmp_path: Path) -> None:
    expected, found = fit(pool, "one", tmp_path, step), fit(pool, layout, tmp_path, step)
    close(found["losses"], expected["losses"])
    close(found["weights"], expected["weights"], 1e-4)
    close(found["epochs"], expected["epochs"], 1e-5)  # metrics from logits in validation among them


@pytest.mark.parametrize("layout", ["cp2-pp2", pytest.param("cp2-dp2", marks=SLOW)])
def test_sums_over_tokens_train_like_one_process(pool: RankPool, layout: str, tmp_path: Path) -> None:
    """Where batches are split, means over unlike documents are another loss than one process has; sums are not."""
    expected, found = fit(pool, "one", tmp_path, "sums"), fit(pool, layout, tmp_path, "sums")
    close(found["weights"], expected["weights"], 1e-4)


@pytest.mark.parametrize(("first", "second"), [("cp2", "dp2"), ("one", "cp2-dp2"), ("cp2-dp2", "cp2-ulysses")])
def test_resume_on_another_cp_continues_the_same_losses(pool: RankPool, first: str, second: str, tmp_path: Path) -> None:
    whole = fit(pool, first, tmp_path, "sums", epochs=2, saves=True)
    rest = fit(pool, second, tmp_path, "sums", epochs=2, resume=str(tmp_path / "epoch=0.ckpt"))
    close(rest["weights"], whole["weights"], 1e-4)
    assert len(rest["losses"]) == len(whole["losses"]) // 2


def test_resume_on_the_same_layout_is_bit_for_bit(pool: RankPool, tmp_path: Path) -> None:
    train_two = functools.partial(fit, pool, "cp2", tmp_path, epochs=2)
    whole, rest = train_two(saves=True), train_two(resume=str(tmp_path / "epoch=0.ckpt"))
    assert rest["losses"] == whole["losses"][len(rest["losses"]) :]
    for name, value in whole["weights"].items():
        assert (rest["weights"][name] == value).all(), name
