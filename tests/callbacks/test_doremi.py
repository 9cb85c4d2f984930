"""DoReMi against Algorithm 1 of its paper written out for one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

import kenotron
from kenotron.callbacks import DoReMi
from kenotron.data.rows import IGNORED
from kenotron.models import Decoder
from kenotron.testing import RankPool

CORPORA = ("a", "b", "c")
STEPS, BATCH, LENGTH, WORDS = 5, 8, 12, 32
CONFIG = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip


def models() -> tuple[Decoder, Decoder]:
    """Return the proxy and the reference, which knows a little: its weights are larger."""
    torch.manual_seed(3)
    proxy, reference = Decoder(LlamaConfig(**CONFIG)), Decoder(LlamaConfig(**CONFIG))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return proxy, reference.requires_grad_(False)


def batches() -> list[dict[str, Tensor]]:
    """Return batches in which corpora are unlike each other; the third batch has none of the second corpus."""
    random = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        corpus = torch.randint(0, 3, (BATCH,), generator=random)
        if step == 2:
            corpus[corpus == 1] = 0
        ids = torch.randint(0, WORDS, (BATCH, LENGTH + 1), generator=random) // (1 + 3 * corpus[:, None])
        labels = ids[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=random) < 0.2] = IGNORED
        found.append({"input_ids": ids[:, :-1], "shift_labels": labels, "corpus": corpus})
    return found


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits, labels = model(input_ids=batch["input_ids"], use_cache=False).logits, batch["shift_labels"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none").view(labels.shape)


def in_plain_pytorch() -> tuple[list[list[float]], list[float], dict[str, Tensor]]:
    """Return the weights after each step, their means, and the proxy's parameters: Algorithm 1, corpus by corpus."""
    proxy, reference = models()
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=1e-2)
    weights, history = [1 / 3] * 3, []
    for batch in batches():
        ours, theirs = token_losses(proxy, batch), token_losses(reference, batch)
        scores, terms = [], []
        for corpus in range(3):
            learned = (batch["corpus"] == corpus)[:, None] & (batch["shift_labels"] != IGNORED)
            excess = (ours - theirs)[learned].detach().clamp(min=0)
            scores.append(float(excess.mean()) if learned.any() else 0.0)
            terms.append(ours[learned].mean() if learned.any() else torch.zeros(()))
        moved = torch.tensor(weights, dtype=torch.float64) * torch.tensor(scores, dtype=torch.float64).mul(2.0).exp()
        weights = ((1 - 1e-2) * moved / moved.sum() + 1e-2 / 3).tolist()
        history.append(weights)
        optimizer.zero_grad()
        sum(weight * term for weight, term in zip(weights, terms, strict=True)).backward()
        optimizer.step()
    means = [sum(column) / STEPS for column in zip(*history, strict=True)]
    return history, means, {name: value.detach() for name, value in proxy.named_parameters()}


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.proxy, self.reference = models()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        (doremi,) = (callback for callback in self.trainer.callbacks if isinstance(callback, DoReMi))
        with torch.no_grad():
            reference = token_losses(self.reference, batch)
        learned = batch["shift_labels"] != IGNORED
        return doremi.loss(token_losses(self.proxy, batch), reference, learned, batch["corpus"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.proxy.parameters(), lr=1e-2)


class History(L.Callback):
    def __init__(self, doremi: DoReMi) -> None:
        self.doremi, self.seen = doremi, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.doremi._weights.tolist())


def make_trainer(strategy: Any, doremi: DoReMi, steps: int = STEPS, **settings: Any) -> L.Trainer:
    warnings.filterwarnings("ignore")
    return L.Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[doremi, History(doremi)], **settings,
    )  # fmt: skip


class Loader:
    """This rank's samples of all batches, every other one of two; a resumed run goes on with the next."""

    def __init__(self, trainer: L.Trainer) -> None:
        place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        self.rank, self.ranks, self.drawn = place["rank"], place["num_replicas"], 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for batch in batches()[self.drawn :]:
            self.drawn += 1
            yield {name: value[self.rank :: self.ranks] for name, value in batch.items()}

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def fit(strategy: Any, folder: str) -> tuple[list[list[float]], list[float], dict[str, Tensor]]:
    """Train three steps, then the rest in another trainer from their checkpoint; return what ``in_plain_pytorch`` does."""
    made = kenotron.KenotronStrategy(**strategy) if isinstance(strategy, dict) else strategy
    doremi = DoReMi(CORPORA, step_size=2.0, smoothing=1e-2)
    trainer = make_trainer(made, doremi, 3)
    trainer.fit(Module(), Loader(trainer))
    history = trainer.callbacks[1].seen
    trainer.save_checkpoint(f"{folder}/third.ckpt")

    made = kenotron.KenotronStrategy(**strategy) if isinstance(strategy, dict) else strategy
    doremi = DoReMi(CORPORA, step_size=2.0, smoothing=1e-2, out=f"{folder}/weights.json")
    trainer = make_trainer(made, doremi)
    trainer.fit(Module(), Loader(trainer), ckpt_path=f"{folder}/third.ckpt")
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    return history + trainer.callbacks[1].seen, list(doremi.weights.values()), {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "strategy"), [(1, {}), (2, "ddp"), (2, {"zero_stage": 3}), (2, {"tp": 2}), (4, {"tp": 2, "zero_stage": 2})]
)
def test_weights_and_the_proxy_follow_the_algorithm_also_over_a_resume(tmp_path: Path, pool: RankPool, ranks, strategy) -> None:
    history, means, parameters = in_plain_pytorch()
    for seen, found, _ in pool.run(fit, ranks, strategy, str(tmp_path)):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(history), rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(means), rtol=0, atol=2e-6)
    if isinstance(strategy, dict):
        stored = kenotron.load_state_dict(tmp_path / "last.ckpt")
        for name, value in parameters.items():
            torch.testing.assert_close(stored[f"proxy.{name}"], value, rtol=0, atol=1e-5)
    assert '"a":' in (tmp_path / "weights.json").read_text()


def test_what_can_not_be_weighed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name two or more"):
        DoReMi(["a"])
    with pytest.raises(ValueError, match="step_size=0"):
        DoReMi(CORPORA, step_size=0)
    with pytest.raises(ValueError, match="smoothing=1"):
        DoReMi(CORPORA, smoothing=1)
    trainer = make_trainer("auto", DoReMi(CORPORA), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        trainer.fit(Module(), Loader(trainer))
    with pytest.raises(ValueError, match="weighs a, b, c"):
        DoReMi(["a", "b"]).load_state_dict(DoReMi(CORPORA).state_dict())


def test_a_training_step_that_does_not_ask_is_told() -> None:
    class Forgetful(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return token_losses(self.proxy, batch).mean()

    trainer = make_trainer("auto", DoReMi(CORPORA))
    with pytest.raises(ValueError, match="not updated in a training step"):
        trainer.fit(Forgetful(), Loader(trainer))
