"""TokenData on several ranks: one sequence of samples on every layout, across kills and other numbers of ranks."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

import kenotron
from kenotron.callbacks import Perplexity
from kenotron.data.loader import Loading
from kenotron.data.source import ArraySource
from kenotron.data.stream import Sampling
from kenotron.tasks.token_data import TokenData
from kenotron.testing import RankPool, RanksFailedError

LENGTH = 8


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(5) as processes:
        yield processes


def token_data(batch: int, **changes: Any) -> TokenData:
    """Two corpora, whose tokens tell the sample."""
    documents = [np.arange(i, i + 41) for i in range(0, 820, 41)]
    corpora = {"a": ArraySource("a", documents), "b": ArraySource("b", [np.arange(900, 1157)])}
    settings: dict[str, Any] = {"sampling": Sampling(mask_documents=True), "loading": Loading(num_workers=0)}
    return TokenData(corpora, LENGTH, batch, **{**settings, **changes})


class Plain(L.LightningModule):
    """Keeps the first token of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.seen: list[int] = []
        self.validated: list[int] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += batch["input_ids"][:, 0].tolist()
        loss: Tensor = self.layer(torch.ones(2)).sum() * 0.01
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["input_ids"][:, 0].tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Llama(Plain):
    """Trains a model of transformers on the batch as it comes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(vocab_size=1160, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        )
        del self.layer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += batch["input_ids"][:, 0].tolist()
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("loss", loss, sync_dist=True)
        return loss


class Judged(Llama):
    """Tells the loss of its validation."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # a mean over ranks' means would differ with their labels


class Watch(L.Callback):
    """Saves after one batch and ends the process after another; keeps the losses."""

    def __init__(self, path: str, save_at: int, kill_at: int) -> None:
        self.path, self.save_at, self.kill_at, self.count = path, save_at, kill_at, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.count += 1
        if "loss" in trainer.callback_metrics:
            pl_module.losses.append(float(trainer.callback_metrics["loss"]))
        if self.count == self.save_at:
            trainer.save_checkpoint(self.path)
            if isinstance(trainer.strategy, kenotron.KenotronStrategy):
                trainer.strategy.checkpointer.wait()
            trainer.strategy.barrier()
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    strategy: Any,
    steps: int,
    batch: int,
    path: str = "",
    *,
    save_at: int = -1,
    kill_at: int = -1,
    resume: bool = False,
    module: type[Plain] = Plain,
    data: Any = (),
    trainer: Any = (),
) -> dict[str, Any]:
    """Train on this rank; return what it saw."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(1, verbose=False)
    if isinstance(strategy, dict):
        strategy = kenotron.KenotronStrategy(**strategy)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [Watch(path, save_at, kill_at), *([Perplexity()] if module is Judged else [])]
    made = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), max_steps=steps, callbacks=callbacks,
        **{**quiet, "limit_val_batches": 0, **dict(trainer)},
    )  # fmt: skip
    trained = module()
    made.fit(trained, datamodule=token_data(batch, **dict(data)), ckpt_path=path if resume else None)
    metrics = {name: float(value) for name, value in made.callback_metrics.items()}
    return {"seen": trained.seen, "validated": trained.validated, "losses": trained.losses, "metrics": metrics}


def sequence(ranks: list[dict[str, Any]], batch: int, accumulate: int = 1) -> list[int]:
    """Return the samples of a run in their global order: each batch's, rank after rank."""
    own = batch // len(ranks) // accumulate
    parts = [np.array(rank["seen"]).reshape(-1, own) for rank in ranks]
    return np.concatenate(parts, axis=1).ravel().tolist()


def expected(batch: int, first: int, count: int) -> list[int]:
    """Return the first tokens of samples, as one process in one go would train them."""
    data = token_data(batch)
    data.setup("fit")
    assert data._stream is not None
    return data._stream.batch(first, count)["input_ids"][:, 0].tolist()


@pytest.mark.parametrize(
    ("before", "after", "batch", "accumulate", "is_killed"),
    [
        (4, 2, 8, 1, False),
        (2, 4, 8, 2, False),
        (3, 5, 15, 1, False),
        pytest.param(4, 2, 8, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 4, 8, 2, True, marks=pytest.mark.slow),
        pytest.param(3, 5, 15, 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_kill_and_a_resume_on_other_ranks_change_no_sample(
    pool: RankPool, before: int, after: int, batch: int, accumulate: int, is_killed: bool, tmp_path: Path
) -> None:
    settings = {"trainer": {"accumulate_grad_batches": accumulate}}
    path = str(tmp_path / "saved.ckpt")
    if is_killed:
        with pytest.raises(RanksFailedError, match="died"):
            pool.run(train, before, {}, 30, batch, path, save_at=3, kill_at=5, **settings)
    else:
        pool.run(train, before, {}, 4, batch, path, save_at=3, **settings)
    rest = pool.run(train, after, {}, 12, batch, path, resume=True, **settings)
    first = 3 * batch // accumulate
    found = sequence(rest, batch, accumulate)
    assert len(found) >= 8 * batch
    assert found == expected(batch, first, len(found))


def test_ddp_trains_the_same_sequence_and_can_be_gone_on_from(pool: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    first = pool.run(train, 2, "ddp", 5, 8, path, save_at=3)
    assert sequence(first, 8) == expected(8, 0, 40)
    # One file of one strategy serves another.
    rest = pool.run(train, 2, {}, 7, 8, path, resume=True)
    assert sequence(rest, 8) == expected(8, 24, 32)


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"tp": 2}), (2, {"pp": 2, "microbatches": 2}), (2, {"cp": 2})])
def test_ranks_of_one_block_train_the_same_samples_like_one_process(pool: RankPool, ranks: int, layout: Any) -> None:
    whole = pool.run(train, 1, "auto", 3, 4, module=Llama)[0]
    for found in pool.run(train, ranks, layout, 3, 4, module=Llama):
        if "pp" in layout:  # the first batch runs once more, for its shapes; the loss is the mean of microbatches
            assert found["seen"][-12:] == whole["seen"]
            continue
        assert found["seen"] == whole["seen"] == expected(4, 0, 12)
        assert np.allclose(found["losses"], whole["losses"], rtol=1e-5)


def test_each_validation_sample_is_on_one_rank_and_all_have_as_many_batches(pool: RankPool) -> None:
    for tokens in (8 * 3 * 3 + 1, 8 * 10 + 3, 20, 2):
        data = {"validation": {"v": ArraySource("v", [np.arange(tokens)])}, "val_batch_size": 3}
        once = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 1}
        ranks = pool.run(train, 3, {}, 1, 3, data=data, trainer=once)
        starts = list(range(0, tokens - 1, LENGTH))
        found = sorted(sample for rank in ranks for sample in rank["validated"])
        again = found.copy()
        for start in starts:
            again.remove(start)  # each is there
        assert set(again) <= {starts[-1]}  # and the last one where a rank would have none
        assert len(again) < 3


def test_perplexity_does_not_depend_on_the_layout(pool: RankPool) -> None:
    once = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 1}
    data = {"validation": {"v": ArraySource("v", [np.arange(50), np.arange(3, 60)])}, "val_batch_size": 2}
    values = [
        pool.run(train, ranks, layout, 1, 6, module=Judged, data=data, trainer=once)[-1]["metrics"]["perplexity/v"]
        for ranks, layout in ((1, "auto"), (3, {}), (2, {"pp": 2}), (2, {"tp": 2}))
    ]
    assert np.allclose(values, values[0], rtol=1e-5)


def test_a_batch_that_ranks_cannot_share_is_refused(pool: RankPool) -> None:
    with pytest.raises(RanksFailedError, match=r"global_batch_size=8 .* 3 data-parallel ranks × 1 accumulated"):
        pool.run(train, 3, {}, 2, 8)
