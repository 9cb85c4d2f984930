"""TokenData in one process: the sequence of samples goes on exactly, whatever stops and resumes the training."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

import kenotron
from kenotron.data.loader import Loading
from kenotron.data.source import ArraySource
from kenotron.data.stages import Stage
from kenotron.data.stream import Sampling
from kenotron.tasks.token_data import TokenData, token_data_class

QUICK = Loading(num_workers=0)


def corpora() -> dict[str, Any]:
    """Corpora whose tokens are their positions plus 1000 for each corpus before them."""
    return {"a": ArraySource("a", [np.arange(401)]), "b": ArraySource("b", [np.arange(1000, 1257)])}


def token_data(**changes: Any) -> TokenData:
    settings: dict[str, Any] = {"corpora": corpora(), "sequence_length": 10, "global_batch_size": 8, "loading": QUICK}
    return TokenData(**{**settings, **changes})


class Recorder(L.LightningModule):
    """Keeps the first token of each sample that it trains, which tells the sample; fails at a batch if told to."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[tuple[int, list[int]]] = []
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(self.seen) == self.fail_at:
            raise RuntimeError("as told")
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.validated.append((dataloader_idx, batch["input_ids"][:, 0].tolist()))
        return self.weight * 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def samples(self) -> list[int]:
        return [sample for batch in self.seen for sample in batch]


class SaveAt(L.Callback):
    """Saves a checkpoint after a batch."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch, self.count = path, batch, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count += 1
        if self.count == self.batch:
            trainer.save_checkpoint(self.path)


def make_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 20, "limit_val_batches": 0}
    defaults |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fit(data: TokenData, *callbacks: L.Callback, ckpt_path: Any = None, module: Any = None, **settings: Any) -> Recorder:
    module = module or Recorder()
    make_trainer(*callbacks, **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def uninterrupted() -> list[int]:
    return fit(token_data(), max_steps=40).samples


def test_without_a_trainer_it_says_so() -> None:
    data = token_data()
    data.setup("fit")
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ValueError, match="give it to one"):
            loader()


def test_batches_are_those_of_the_stream(uninterrupted: list[int]) -> None:
    assert len(uninterrupted) == 320
    counts = np.cumsum([sample < 1000 for sample in uninterrupted])
    assert np.abs(counts - np.arange(1, 321) * 40 / 66).max() < 1
    assert len(set(uninterrupted[:60])) == 60


@pytest.mark.parametrize("strategy", ["auto", "kenotron"])
@pytest.mark.parametrize(
    ("before", "after", "stop"),
    [
        ({}, {}, 3),  # in the middle of an epoch
        ({}, {}, 8),  # at its end
        ({}, {}, 19),  # in the middle of a later one
        ({"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 4}, 6),  # in the middle of a step
        ({"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 2}, 7),
        ({"accumulate_grad_batches": 2}, {}, 5),
        ({"limit_train_batches": 3}, {"limit_train_batches": 5}, 4),
    ],
)
def test_a_resumed_run_goes_on_with_the_next_sample(
    uninterrupted: list[int], strategy: str, before: Any, after: Any, stop: int, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.ckpt"
    first = fit(token_data(), SaveAt(saved, stop), strategy=strategy, max_steps=20, **before)
    assert first.samples == uninterrupted[: len(first.samples)]
    position = sum(len(batch) for batch in first.seen[:stop])
    data = token_data()
    second = fit(data, ckpt_path=saved, strategy=strategy, max_steps=30, **after)
    assert second.samples == uninterrupted[position : position + len(second.samples)]
    assert len(second.samples) >= 60
    assert data.num_trained_samples == position + len(second.samples)


def test_workers_and_prefetching_change_nothing(uninterrupted: list[int], tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    fit(token_data(loading=Loading(num_workers=2, prefetch=3)), SaveAt(saved, 5), max_steps=7)
    second = fit(token_data(loading=Loading(num_workers=1, prefetch=1)), ckpt_path=saved, max_steps=12)
    assert second.samples == uninterrupted[40:96]


def test_another_batch_size_goes_on_with_the_next_sample(uninterrupted: list[int], tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    fit(token_data(), SaveAt(saved, 5), max_steps=5)
    second = fit(token_data(global_batch_size=12), SaveAt(saved, 3), ckpt_path=saved, max_steps=8)
    assert second.samples == uninterrupted[40:76]
    assert [len(batch) for batch in second.seen] == [12] * 3
    third = fit(token_data(global_batch_size=4), ckpt_path=saved, max_steps=10)
    assert third.samples == uninterrupted[76:84]


def test_a_batch_that_failed_is_trained_after_a_resume(uninterrupted: list[int], tmp_path: Path) -> None:
    class SaveOnException(L.Callback):
        def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    module = Recorder(fail_at=5)
    with pytest.raises(RuntimeError, match="as told"):
        fit(token_data(), SaveOnException(), module=module)
    assert module.samples == uninterrupted[:40]
    assert fit(token_data(), ckpt_path=tmp_path / "saved.ckpt", max_steps=9).samples[:8] == uninterrupted[40:48]


def test_a_checkpoint_at_validation_is_between_batches(uninterrupted: list[int], tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")

    settings = {"limit_val_batches": 2, "val_check_interval": 3}
    first = fit(token_data(validation=corpora()), Save(), max_steps=7, **settings)
    assert len(first.validated) == 4 + 8  # the check before training, and after batches 3 and 6
    second = fit(token_data(validation=corpora()), ckpt_path=tmp_path / "step=3.ckpt", max_steps=10, **settings)
    assert second.samples == uninterrupted[24:80]


def test_a_second_fit_goes_on_and_another_trainer_begins_anew(uninterrupted: list[int]) -> None:
    data, module, trainer = token_data(), Recorder(), make_trainer(max_steps=5)
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 11
    trainer.fit(module, datamodule=data)
    assert module.samples == uninterrupted[:88]
    assert fit(data, max_steps=3).samples == uninterrupted[:24]


def test_epochs_of_the_trainer_count_steps(uninterrupted: list[int], tmp_path: Path) -> None:
    module = fit(token_data(), max_steps=-1, max_epochs=2)
    assert len(module.seen) == 2 * (66 // 8)
    assert module.samples == uninterrupted[:128]
    saved = tmp_path / "saved.ckpt"
    fit(token_data(steps_per_epoch=6), SaveAt(saved, 8), max_steps=-1, max_epochs=3)
    rest = fit(token_data(steps_per_epoch=6), ckpt_path=saved, max_steps=-1, max_epochs=3)
    assert rest.samples == uninterrupted[64:144]


def test_stages_begin_at_their_steps_also_after_a_resume(tmp_path: Path) -> None:
    stages = [
        Stage(start_step=4, corpora={"b": 1}, sequence_length=5, global_batch_size=4),
        Stage(start_step=9, corpora={"a": 1}),
    ]
    whole = fit(token_data(stages=stages), max_steps=12, accumulate_grad_batches=2)
    sizes = [len(batch) for batch in whole.seen]
    assert sizes == [4] * 8 + [2] * 16
    assert all((sample >= 1000) == (i < 9 * 2) for i, batch in enumerate(whole.seen[8:], 8) for sample in batch)
    saved = tmp_path / "saved.ckpt"
    fit(token_data(stages=stages[:1]), SaveAt(saved, 11), max_steps=7, accumulate_grad_batches=2)
    rest = fit(token_data(stages=stages), ckpt_path=saved, max_steps=12, accumulate_grad_batches=2)
    assert rest.seen == whole.seen[11:]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling": Sampling(seed=1)}, "seed=0, and the data module has seed=1"),
        ({"sampling": Sampling(samples="documents")}, "samples='windows'"),
        ({"sequence_length": 12}, "sequence_length=10 at step 0, and the data module says"),
        ({"weights": {"a": 1, "b": 2}}, "add a Stage with start_step=4"),
        ({"stages": [Stage(start_step=2, corpora={"a": 1})]}, "add a Stage with start_step=4"),
        ({"corpora": {**corpora(), "a": ArraySource("a", [np.arange(400)])}}, "a had 401 tokens .* has 400"),
        ({"corpora": {"a": corpora()["a"]}}, "uses b, but the corpora are a"),
    ],
)
def test_a_past_that_was_another_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    fit(token_data(), SaveAt(tmp_path / "saved.ckpt", 4), max_steps=4)
    with pytest.raises(ValueError, match=says):
        fit(token_data(**change), ckpt_path=tmp_path / "saved.ckpt")


@pytest.mark.parametrize(
    ("data", "trainer", "says"),
    [
        ({"corpora": {}}, {}, "corpora is empty"),
        ({"corpora": "data/web"}, {}, "corpora='data/web' has no names"),
        ({"validation": ["data/web"]}, {}, "validation=.* has no names"),
        ({"sequence_length": 0}, {}, "sequence_length=0"),
        ({"global_batch_size": 0}, {}, "global_batch_size=0"),
        ({"weights": {"c": 1.0}}, {}, "c has a weight, but the corpora are a, b"),
        ({"corpora": {"a": 3}}, {}, "the corpus a is a int"),
        ({"corpora": {"a": {"folder": "x"}}}, {}, "give path"),
        ({}, {"accumulate_grad_batches": 3}, "global_batch_size=8 .*1 data-parallel ranks × 3 accumulated batches"),
        ({}, {"overfit_batches": 2}, "overfit_batches=2"),
        ({"vocab_size": 1000}, {}, "token id 1000 at position 0"),
        ({"vocab_size": 2000, "sampling": Sampling(pad_token_id=2000)}, {}, "pad_token_id=2000"),
    ],
)
def test_mistakes_are_told_before_training(data: Any, trainer: Any, says: str) -> None:
    module = Recorder()
    with pytest.raises(ValueError, match=says):
        fit(token_data(**data), module=module, **trainer)
    assert not module.seen


def test_accumulation_by_a_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        fit(token_data(), L.pytorch.callbacks.GradientAccumulationScheduler({4: 2}))


def test_an_id_that_no_look_found_is_an_error_that_names_the_sample() -> None:
    tokens = np.zeros(300_000, dtype=np.int64)
    tokens[202_003] = 77
    data = token_data(corpora={"a": ArraySource("a", [tokens])}, vocab_size=50, sequence_length=1000, global_batch_size=300)
    with pytest.raises(ValueError, match=r"samples 0 to 299 of the run, of a, hold token ids from 0 to 77"):
        fit(data, max_steps=3)


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_has_a_loader_for_each_corpus_in_its_own_order() -> None:
    module = fit(
        token_data(validation=corpora(), val_batch_size=16), limit_val_batches=1.0, num_sanity_val_steps=-1, max_steps=1
    )
    by_corpus = [[s for i, batch in module.validated if i == index for s in batch] for index in range(2)]
    assert by_corpus == [list(range(0, 400, 10)), list(range(1000, 1256, 10))]


def test_validating_moves_no_training(uninterrupted: list[int], tmp_path: Path) -> None:
    data, module, trainer = token_data(validation=corpora()), Recorder(), make_trainer(max_steps=5, limit_val_batches=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert data.num_trained_samples == 56
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, datamodule=data)
    assert module.samples == uninterrupted[:72]


# ------------------------------------------------------------------------------------------------------- other packages


def test_the_other_package_of_lightning_has_a_class_of_its_own(uninterrupted: list[int]) -> None:
    import pytorch_lightning as pl

    module_class = type("Other", (pl.LightningModule,), {
        name: value for name, value in vars(Recorder).items() if name not in ("__init__", "__module__", "samples")
    })  # fmt: skip
    module = module_class()
    module.weight, module.seen, module.fail_at = torch.nn.Parameter(torch.zeros(())), [], -1
    data = token_data_class("pytorch_lightning")(corpora(), 10, 8, loading=QUICK)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)  # type: ignore[arg-type]
    assert [sample for batch in module.seen for sample in batch] == uninterrupted[:24]


def test_it_is_public() -> None:
    assert kenotron.TokenData is TokenData
