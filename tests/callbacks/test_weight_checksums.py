"""A bit that flips on one rank is found, with its parameter and its rank; replicas that are well are left in peace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from operations_helpers import KeepLogger, Net, data, make_trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.callbacks import ReplicasDifferError, WeightChecksums
from kenotron.fingerprint import fingerprint
from kenotron.testing import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as processes:
        yield processes


class Tied(Net):
    """The head's weight is the embedding's, which lies on another stage."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.embed.weight


class Flip(L.Callback):
    """Flips the last bit of one number of a parameter on one rank, after the third step."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            param = pl_module.get_parameter(self.name).detach()
            local = param.to_local() if isinstance(param, DTensor) else param
            local.view(torch.int32).view(-1)[-1] ^= 1


def fit(strategy: Any, flip: tuple[str, int] | None, module: str = "Net", on_difference: Any = "raise") -> Any:
    L.seed_everything(1, verbose=False)
    logger = KeepLogger()
    flips = [Flip(*flip)] if flip else []
    trainer = make_trainer(strategy, *flips, WeightChecksums(2, on_difference), max_steps=6, logger=logger)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(Tied() if module == "Tied" else Net(), data())
        except ReplicasDifferError as error:
            return trainer.global_step, str(error), logger.values("checksums/different_parameters")
    texts = [str(each.message) for each in told if "replicas differ" in str(each.message)]
    return trainer.global_step, texts, logger.values("checksums/different_parameters")


CASES = [
    ("ddp", 2, "ddp", ("layers.1.up.weight", 1), "Net", r"layers.1.up.weight: .*ranks \[1\]"),
    ("zero0", 4, {"zero_stage": 0}, ("layers.1.up.weight", 2), "Net", r"layers.1.up.weight: ranks \[0, 1, 3\] .*ranks \[2\]"),
    ("hsdp", 4, {"zero_stage": 3, "dp_replicate": 2}, ("layers.1.up.weight", 3), "Net", r"layers.1.up.weight at .*ranks \[3\]"),
    ("tp norm", 2, {"tp": 2}, ("layers.0.norm.weight", 1), "Net", r"layers.0.norm.weight: .*ranks \[1\]"),
    ("pp tied", 2, {"pp": 2, "microbatches": 2}, ("embed.weight", 0), "Tied", r"embed.weight: .*ranks \[0\]"),
]


@pytest.mark.parametrize(
    ("ranks", "strategy", "flip", "module", "text"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_one_bit_on_one_rank_is_found(
    pool: RankPool, ranks: int, strategy: Any, flip: tuple[str, int], module: str, text: str
) -> None:
    import re

    well = pool.run(fit, ranks, strategy, None, module)
    assert well[0] == (6, [], [(2, 0.0), (4, 0.0), (6, 0.0)])
    for rank, (step, error, values) in enumerate(pool.run(fit, ranks, strategy, flip, module)):
        assert step == 4
        assert isinstance(error, str), "nothing was raised"
        assert re.search(text, error), error
        assert "in 1 parameters" in error
        assert values == [(2, 0.0), (4, 1.0)] or rank > 0


def test_what_no_other_rank_has_is_not_compared(pool: RankPool) -> None:
    (step, texts, _), _ = pool.run(fit, 2, {"zero_stage": 3}, ("layers.1.up.weight", 1))
    assert (step, texts) == (6, [])
    (step, texts, _), _ = pool.run(fit, 2, {"tp": 2}, ("layers.1.up.weight", 1))
    assert (step, texts) == (6, [])


def test_a_warning_lets_training_go_on(pool: RankPool) -> None:
    (step, texts, values), (_, others, _) = pool.run(fit, 2, {"zero_stage": 0}, ("head.bias", 1), on_difference="warn")
    assert step == 6
    assert len(texts) == 2
    assert "head.bias" in texts[0]
    assert not others
    assert values[0] == (2, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64])
def test_each_bit_counts(dtype: torch.dtype) -> None:
    tensor = (torch.randn(13) * 4).to(dtype)
    base = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == base
    seen = {base}
    for byte in range(tensor.numel() * tensor.element_size()):
        changed = tensor.clone()
        changed.view(torch.uint8)[byte] ^= 1
        seen.add(int(fingerprint(changed)))
    assert len(seen) == 1 + tensor.numel() * tensor.element_size()


def test_places_count_and_strides_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(48, 31)
    assert int(fingerprint(matrix.t())) == int(fingerprint(matrix.t().contiguous()))
    assert int(fingerprint(matrix[:, 1:])) == int(fingerprint(matrix[:, 1:].clone()))
    assert int(fingerprint(matrix.view(-1)[1:])) == int(fingerprint(matrix.view(-1)[1:].clone()))
    assert int(fingerprint(matrix.flip(0))) != int(fingerprint(matrix))
    zero = torch.zeros(8)
    assert int(fingerprint(-zero)) != int(fingerprint(zero))
    whole: Tensor = fingerprint(matrix)
    monkeypatch.setattr("kenotron.fingerprint._CHUNK_BYTES", 64)
    assert int(fingerprint(matrix)) == int(whole)
    assert int(fingerprint(torch.zeros(0))) == 0


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        WeightChecksums(0)
    with pytest.raises(ValueError, match="on_difference='ignore'"):
        WeightChecksums(1, "ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not of ModelParallelStrategy"):
        WeightChecksums().setup(_with_strategy("ModelParallelStrategy"), Net(), "fit")
    make_trainer("auto", WeightChecksums(1), max_steps=2).fit(Net(), data())


def _with_strategy(name: str) -> Any:
    from types import SimpleNamespace

    from lightning.pytorch import strategies

    return SimpleNamespace(strategy=getattr(strategies, name)())
