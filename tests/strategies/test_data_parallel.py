"""Data parallelism as Lightning users know it from ``ddp``, with and without ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos import Transformer as DemoTransformer
from strategy_helpers import (
    SLOW,
    WIDTH,
    Classifier,
    Rows,
    Task,
    close,
    data_rank,
    fit,
    fit_like_one_process,
    floats,
    loader,
    loaders,
    make_trainer,
    whole_weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kenotron.testing import RankPool

SOME_ZERO = pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 3])
ZERO = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


@ZERO
def test_fit_with_clipping_and_accumulation(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    trainer = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    layout = (2, {"zero_stage": zero_stage})
    expected, *_ = fit_like_one_process(pool, Classifier, layout, tmp_path, trainer=trainer, rows=24)
    assert expected["step"] == 4


class Odd(L.LightningModule):
    """Sizes that nothing divides: scalars, one row, three rows; and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Linear(8, 1)
        self.three = nn.Linear(8, 3, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.three(x) * self.scale + self.one(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        loss = nn.functional.cross_entropy(hidden, y)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("zero_stage", "ranks"), [(0, 2), pytest.param(1, 4, marks=SLOW), (2, 2), (3, 2), pytest.param(3, 4, marks=SLOW)]
)
def test_scalars_and_sizes_that_the_ranks_do_not_divide(pool: RankPool, zero_stage: int, ranks: int, tmp_path: Path) -> None:
    layout = (ranks, {"zero_stage": zero_stage})
    fit_like_one_process(pool, Odd, layout, tmp_path, rows=24, val_rows=0, trainer={"gradient_clip_val": 0.5})


class Convolutions(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(4 * 2 * 2, 3),
        )  # fmt: skip

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.reshape(-1, 1, 4, 2).repeat(1, 1, 1, 2)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class NestedLists(Classifier):
    """Blocks that are lists of lists and dicts: the step calls their parts."""

    def __init__(self) -> None:
        super().__init__(depth=0)

        def mlp() -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())

        self.layers = nn.ModuleList(nn.ModuleList([mlp(), nn.ModuleDict({"b": mlp()}), nn.Linear(WIDTH, WIDTH)]) for _ in "123")

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.shift
        for first, rest, last in self.layers:
            x = x + first(x)
            x = x + rest["b"](x) @ last.weight  # a weight used without its module
        logits: Tensor = self.head(x)
        return logits


@ZERO
def test_blocks_that_are_lists_train_like_one_process(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    fit_like_one_process(pool, NestedLists, (2, {"zero_stage": zero_stage}), tmp_path, rows=24)


class Generative(L.LightningModule):
    """The GAN of Lightning's documentation: two optimizers, updated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        # The second in a list, as several discriminators would be.
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminators = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))])

    def discriminator(self, x: Tensor) -> Tensor:
        return self.discriminators[0](x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        first, second = self.optimizers()  # type: ignore[misc]
        noise = real[:, :4].sin()
        judge = nn.functional.binary_cross_entropy_with_logits
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

        self.toggle_optimizer(first)
        generator_loss = judge(self.discriminator(self.generator(noise)), ones)
        first.zero_grad()
        self.manual_backward(generator_loss)
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        real_loss = judge(self.discriminator(real), ones)
        fake_loss = judge(self.discriminator(self.generator(noise).detach()), zeros)
        second.zero_grad()
        self.manual_backward((real_loss + fake_loss) / 2)
        second.step()
        self.untoggle_optimizer(second)
        self.log("train_loss", generator_loss.detach(), prog_bar=True, sync_dist=True)
        self.log("discriminator", (real_loss + fake_loss).detach(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminators.parameters(), lr=0.05, momentum=0.9),
        )


def fit_like_ddp(pool: RankPool, module: Any, zero_stage: int, folder: Path, ddp: str = "ddp", **task: Any) -> list[Any]:
    """Train with Lightning's DDP and with Kénotron over the same two processes, and compare."""
    expected = pool.run(fit, 2, Task(module, ddp, folder=str(folder), **task))
    found = pool.run(fit, 2, Task(module, {"zero_stage": zero_stage}, folder=str(folder), **task))
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        for key in ("losses", "rates", "epochs", "metrics", "step", "seen"):
            close(one[key], other[key], where=f"rank {rank} {key}")
    close(found[0]["weights"], expected[0]["weights"], where="weights")
    return expected


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_optimizers_by_hand_train_as_under_ddp(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    # DDP looks for unused parameters: each update trains one of the two networks.
    fit_like_ddp(pool, Generative, zero_stage, tmp_path, "ddp_find_unused_parameters_true", rows=24, val_rows=0)


@ZERO
def test_batch_norm_trains_as_under_ddp(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    fit_like_ddp(pool, Convolutions, zero_stage, tmp_path, rows=24, val_rows=0)


class Demo(L.LightningModule):
    """Lightning's demo of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DemoTransformer(vocab_size=50, ninp=16, nhead=2, nhid=16, nlayers=2, dropout=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        ids = (x * 40).long().abs() % 50
        output = self.model(ids[:, :-1], ids[:, 1:])
        loss = nn.functional.nll_loss(output, ids[:, 1:].reshape(-1))
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


@SOME_ZERO
def test_lightnings_demo_transformer(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    fit_like_one_process(pool, Demo, (2, {"zero_stage": zero_stage}), tmp_path, rows=16, val_rows=0)


class UsesOneBranch(Classifier):
    """Each rank goes through a layer of its own; one layer is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss((self.branches[self.trainer.global_rank](x), y))
        self.log("train_loss", loss, sync_dist=True)
        return loss


def test_parameters_that_only_one_rank_uses(pool: RankPool, tmp_path: Path) -> None:
    expected = fit_like_ddp(pool, UsesOneBranch, 0, tmp_path, "ddp_find_unused_parameters_true", rows=16, val_rows=0)
    L.seed_everything(1, verbose=False)
    initial = UsesOneBranch().state_dict()
    moved = [
        abs(expected[0]["weights"][f"branches.{i}.weight"] - initial[f"branches.{i}.weight"].numpy()).max() for i in range(3)
    ]
    assert min(moved[:2]) > 1e-3
    assert moved[2] == 0


# ------------------------------------------------------------------------------------------- what Lightning does for dp


def sees_data(strategy: Any) -> dict[str, Any]:
    module = Collects()
    trainer = make_trainer(strategy, use_distributed_sampler=True, max_epochs=1)
    trainer.fit(module, DataLoader(Rows(16), batch_size=2, shuffle=True))
    sampler = trainer.train_dataloader.sampler
    kind = type(sampler).__name__
    return {
        "rows": module.rows,
        "sampler": (kind, getattr(sampler, "num_replicas", 1), getattr(sampler, "rank", 0)),
        "gathered": module.gathered,
        "metrics": floats(trainer.callback_metrics),
    }


class Collects(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []
        self.gathered: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows += batch[0][:, 0].tolist()
        rank = float(data_rank(self.trainer)[0])
        self.log("mean", rank, sync_dist=True)
        self.log("sum", rank + 1, sync_dist=True, reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("max", rank, sync_dist=True, reduce_fx="max")
        if self.gathered is None:
            self.gathered = {
                key: value.tolist()
                for key, value in self.all_gather({"rank": torch.tensor([rank]), "more": torch.tensor(rank)}).items()
            }
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, {}), (4, {"tp": 2, "zero_stage": 3})], ids=["dp2", "dp2-tp2-zero3"])
def test_samplers_reductions_and_gathers_see_data_parallel_ranks(pool: RankPool, ranks: int, strategy: Any) -> None:
    found = pool.run(sees_data, ranks, strategy)
    tp = ranks // 2
    first, second = found[0], found[tp]
    assert sorted(first["rows"] + second["rows"]) == pytest.approx(sorted(Rows(16).x[:, 0].tolist()))
    for rank, seen in enumerate(found):
        assert seen["rows"] == found[rank // tp * tp]["rows"], "ranks of one model copy see the same samples"
        assert seen["sampler"] == ("DistributedSampler", 2, rank // tp)
        assert seen["gathered"] == {"rank": [[0.0], [1.0]], "more": [0.0, 1.0]}
        assert seen["metrics"]["mean"] == 0.5
        assert seen["metrics"]["sum"] == 4 * (1 + 2)
        assert seen["metrics"]["max"] == 1


class Lbfgs(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=3)


def test_lbfgs_on_one_process(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, Lbfgs, (1, {}), tmp_path, rows=16)


def gathers_eval(strategy: Any, folder: str) -> Any:
    """Evaluate between epochs under ZeRO, then train on: gathered parameters must not go stale."""
    L.seed_everything(1, verbose=False)
    module = Classifier()
    trainer = make_trainer(strategy, max_epochs=2, val_check_interval=1)
    trainer.fit(module, *loaders(trainer, Task(Classifier, strategy)))
    rank, size = data_rank(trainer)
    result = trainer.validate(module, loader(Rows(12, seed=4), 4, rank, size), verbose=False)
    return result, whole_weights(trainer, folder)


@SOME_ZERO
def test_validating_after_every_batch_changes_nothing(pool: RankPool, zero_stage: int, tmp_path: Path) -> None:
    (metrics, weights), *_ = pool.run(gathers_eval, 1, None, str(tmp_path))
    found = pool.run(gathers_eval, 2, {"zero_stage": zero_stage}, str(tmp_path))
    for rank_metrics, rank_weights in found:
        close(rank_metrics, metrics)
        close(rank_weights, weights, 1e-4)


def test_the_strategy_by_name_is_the_same(pool: RankPool, tmp_path: Path) -> None:
    by_name = pool.run(fit, 2, Task(Classifier, "kenotron", folder=str(tmp_path)))
    by_class = pool.run(fit, 2, Task(Classifier, {}, folder=str(tmp_path)))
    assert by_name[0]["losses"] == by_class[0]["losses"]
