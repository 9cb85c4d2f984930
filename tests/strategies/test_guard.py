"""Steps that would do harm: skipped on all ranks, where one rank's part of a batch is broken, and not for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_helpers import DP2_PP2, PP2, SLOW, TP2_PP2, Classifier, Task, close, fit

from kenotron.strategies import Guard
from kenotron.strategies.guard import StepGuard, TooManySkippedStepsError
from kenotron.testing import RankPool

EPOCHS = {"max_epochs": 3, "gradient_clip_val": 0.5}


class Broken(Classifier):
    """One batch of each epoch is broken, on the last data-parallel rank alone. With ``skips`` it is left out instead."""

    def __init__(self, factor: float, skips: bool = False, lr: float = 0.02) -> None:
        super().__init__(lr=lr)
        self.factor, self.skips, self.seen = factor, skips, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx != 1 or self.current_epoch == 0:
            return loss
        if self.skips:
            return None
        layout = self.trainer.strategy.layout  # type: ignore[attr-defined]
        is_last = layout.dp_rank(self.trainer.global_rank) == layout.dp_size - 1
        return loss * (self.factor if is_last else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)  # momenta must stay as they are, too

    def on_train_end(self) -> None:
        skipped = getattr(self.trainer.strategy, "skipped_steps", None)
        self.seen = [int(skipped())] if skipped else []


@pytest.mark.parametrize("factor", [float("nan"), pytest.param(1e4, id="spike"), pytest.param(float("inf"), marks=SLOW)])
@pytest.mark.parametrize(
    "layout",
    [(1, {}), (2, {}), (2, {"zero_stage": 0}), pytest.param((2, {"zero_stage": 3}), marks=SLOW), (2, {"tp": 2}), PP2,
     pytest.param(TP2_PP2, marks=SLOW), DP2_PP2],
    ids=["one", "dp2", "dp2-zero0", "dp2-zero3", "tp2", "pp2", "tp2-pp2", "dp2-pp2"],
)  # fmt: skip
def test_a_broken_step_leaves_weights_and_moments_as_they_were(
    pool: RankPool, layout: Any, factor: float, tmp_path: Path
) -> None:
    ranks, strategy = layout
    guard = Guard(norm_spike=20.0, warmup_steps=2)
    expected = pool.run(fit, 1, Task(Broken, None, settings={"factor": factor, "skips": True}, trainer=EPOCHS, val_rows=0))[0]
    task = Task(
        Broken, {**strategy, "guard": guard}, settings={"factor": factor}, trainer=EPOCHS, val_rows=0, folder=str(tmp_path)
    )
    for result in pool.run(fit, ranks, task):
        assert result["seen"] == [2]
        close(result["weights"], expected["weights"], 1e-4)


def test_training_stops_after_so_many_in_a_row_on_all_ranks(pool: RankPool) -> None:
    task = Task(
        AlwaysBroken, {"guard": Guard(max_in_row=3)}, settings={"factor": float("nan")}, trainer=EPOCHS, with_weights=False
    )
    with pytest.raises(Exception, match=r"step skipped: gradient norm nan.*3 in a row.*max_in_row=3: training has diverged"):
        pool.run(fit, 2, task)


class AlwaysBroken(Broken):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Classifier.training_step(self, batch, batch_idx) * self.factor


# ---- One guard ------------------------------------------------------------------------------------------------------


def make(**settings: Any) -> StepGuard:
    param = torch.nn.Parameter(torch.zeros(2))
    return StepGuard(Guard(**settings), torch.optim.SGD([param], lr=1.0), torch.device("cpu"))


def verdicts(guard: StepGuard, norms: list[float], losses: list[float] | None = None) -> str:
    found = ""
    for index, norm in enumerate(norms):
        loss = None if losses is None else torch.tensor(losses[index])
        found += "x" if guard.judge(torch.tensor(norm), loss) else "."
    return found


def test_spikes_are_told_by_the_running_mean_which_they_do_not_enter() -> None:
    norms = [100.0, 1.0, 1.0, 1.0, 9.0, 1.0, 40.0, 40.0, 1.0]
    assert verdicts(make(norm_spike=5.0, warmup_steps=4, decay=0.5), norms) == "......xx."
    assert verdicts(make(warmup_steps=1), norms) == "........."
    losses = [2.0, 2.0, 2.0, 2.0, 9.0, 2.0, 2.0, float("nan"), 2.0]
    assert verdicts(make(loss_spike=3.0, warmup_steps=2), [1.0] * 9, losses) == "....x..x."
    assert verdicts(make(loss_spike=3.0, warmup_steps=1), [1.0] * 3, [-1.0, -9.0, -1.0]) == "..."  # it says nothing below zero


def test_a_guard_goes_on_where_it_was_saved() -> None:
    norms = [1.0, 2.0, 1.5, 30.0, 1.0, 8.0, 1.2, 9.0]
    whole = verdicts(make(norm_spike=4.0, warmup_steps=2), norms)
    for cut in range(1, len(norms)):
        first, second = make(norm_spike=4.0, warmup_steps=2), make(norm_spike=4.0, warmup_steps=2)
        begun = verdicts(first, norms[:cut])
        second.load_state_dict(first.state_dict())
        assert begun + verdicts(second, norms[cut:]) == whole
        assert int(second.num_skipped) == whole.count("x")


def test_a_row_of_skipped_steps_ends_with_a_good_one() -> None:
    guard = make(max_in_row=3)
    for norm in (torch.nan, torch.inf, 1.0, torch.nan, torch.nan):
        guard.judge(torch.tensor(norm), None)
        told = guard.report()
        assert (told is None) == (norm == 1.0)
    guard.judge(torch.tensor(torch.nan), None)
    with pytest.raises(TooManySkippedStepsError, match="5 skipped in all, 3 in a row"):
        guard.report()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"norm_spike": 1.0}, "norm_spike=1.0: set a factor above 1"),
        ({"warmup_steps": 0}, "warmup_steps=0"),
        ({"max_in_row": 0}, "max_in_row=0"),
        ({"decay": 1.0}, "decay=1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Guard(**settings)


def test_an_optimizer_that_could_only_skip_by_waiting_is_refused_on_cuda() -> None:
    optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"RMSprop can't skip a step unless the host waits.*fused=True"):
        StepGuard(Guard(), optimizer, torch.device("cuda"))
