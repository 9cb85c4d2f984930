"""Schedules are the closed forms of their documentation, at every update, and go on from a state dict at any of them."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kenotron.optim import Schedule, ScheduleLR, scheduler_config


def closed_form(step: int, total: int, warmup: int, hold: int, shape: str, low: float) -> float:
    """Return the factor of update ``step``, as the documentation has it."""
    decaying = total - warmup - hold
    if step <= warmup and step < total + (decaying == 0):
        return step / warmup
    if step <= warmup + hold:
        return 1.0
    if step >= total:
        return low if decaying else 1.0
    t = (step - warmup - hold) / decaying
    return {
        "linear": low + (1 - low) * (1 - t),
        "cosine": low + (1 - low) * 0.5 * (1 + math.cos(math.pi * t)),
        "1-sqrt": low + (1 - low) * (1 - math.sqrt(t)),
    }[shape]


@st.composite
def numbers(draw: Any) -> dict[str, Any]:
    total = draw(st.integers(1, 400))
    minimum = draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1))
    least = 0 if minimum == 1.0 else 1
    warmup = draw(st.integers(0, total - least))
    hold = draw(st.integers(0, total - warmup - least))
    return {
        "total": total,
        "warmup": warmup,
        "hold": hold,
        "shape": draw(st.sampled_from(["linear", "cosine", "1-sqrt"])),
        "low": minimum,
    }


def schedule_of(total: int, warmup: int, hold: int, shape: Any, low: float, by_decay: bool = False) -> Schedule:
    span: dict[str, Any] = {"decay_steps": total - warmup - hold} if by_decay else {"hold_steps": hold}
    return Schedule(total_steps=total, warmup_steps=warmup, decay=shape, minimum=low, **span)


def optimizer_of(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@settings(max_examples=1000, deadline=None)
@given(numbers(), st.booleans())
def test_factors_are_the_closed_forms_at_every_update(drawn: dict[str, Any], by_decay: bool) -> None:
    schedule = schedule_of(**drawn, by_decay=by_decay)
    for step in range(1, drawn["total"] + 3):
        assert schedule(step) == pytest.approx(closed_form(step, **drawn), rel=1e-12, abs=1e-12)
    assert schedule(1) > 0 or drawn["total"] == 1
    if drawn["warmup"] + drawn["hold"] < drawn["total"]:
        assert schedule(drawn["total"]) == drawn["low"]


def test_wsd_by_hand() -> None:
    schedule = Schedule(total_steps=10, warmup_steps=2, decay_steps=4, decay="linear", minimum=0.2)
    factors = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [schedule(step) for step in range(1, 12)] == pytest.approx(factors)


def test_sizes_beyond_32_bits_are_exact() -> None:
    total = 2**40
    schedule = Schedule(total_steps=total, warmup_steps=2**33, decay="linear", minimum=0.25)
    assert schedule(1) == 2.0**-33
    assert schedule(2**33) == 1.0
    assert schedule(total) == schedule(2 * total) == 0.25


@settings(max_examples=100, deadline=None)
@given(numbers(), st.data())
def test_resuming_at_any_update_gives_the_same_rates(drawn: dict[str, Any], data: Any) -> None:
    schedule, rates = schedule_of(**drawn), (3e-4, 0.02)
    stop = data.draw(st.integers(0, drawn["total"]))
    first = ScheduleLR(optimizer_of(*rates), schedule)
    for _ in range(stop):
        first.optimizer.step()
        first.step()
    again = ScheduleLR(optimizer_of(*rates), schedule)
    again.load_state_dict(first.state_dict())
    for step in range(stop + 1, drawn["total"] + 2):
        expected = [rate * schedule(step) for rate in rates]
        assert rates_of(first.optimizer) == rates_of(again.optimizer) == expected
        for one in (first, again):
            one.optimizer.step()
            one.step()


def test_every_group_keeps_its_own_base_rate() -> None:
    optimizer = optimizer_of(1.0, 0.5, 0.0)
    scheduler = ScheduleLR(optimizer, Schedule(total_steps=4, warmup_steps=2, decay="linear"))
    seen = []
    for _ in range(4):
        seen.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    assert seen == [[0.5, 0.25, 0.0], [1.0, 0.5, 0.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]]


def test_rates_that_are_tensors_are_filled() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = ScheduleLR(optimizer, Schedule(total_steps=4, warmup_steps=2, decay="linear"))
    state = scheduler.state_dict()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
    scheduler.load_state_dict({**state, "last_epoch": 2})
    assert float(rate) == pytest.approx(0.05)
    assert scheduler.base_lrs == [pytest.approx(0.1)]


def changed() -> tuple[dict[str, Any], Schedule]:
    """Return what a run over 10 updates saved after 4, and the schedule of one over 20."""
    old = ScheduleLR(optimizer_of(1.0), Schedule(total_steps=10, decay="linear"))
    for _ in range(4):
        old.optimizer.step()
        old.step()
    return old.state_dict(), Schedule(total_steps=20, decay="linear")


def test_another_number_of_updates_is_refused_until_one_says_which_holds() -> None:
    state, schedule = changed()
    with pytest.raises(ValueError, match=r"total_steps was 10 and is 20.*on_change='new'"):
        ScheduleLR(optimizer_of(1.0), schedule).load_state_dict(state)
    new = ScheduleLR(optimizer_of(1.0), schedule, on_change="new")
    new.load_state_dict(state)
    assert rates_of(new.optimizer) == [schedule(5)]
    saved = ScheduleLR(optimizer_of(1.0), schedule, on_change="saved")
    saved.load_state_dict(state)
    assert rates_of(saved.optimizer) == [0.5]
    assert saved.get_last_lr() == [0.5]


def test_another_base_rate_is_refused_until_one_says_which_holds() -> None:
    state, _ = changed()
    schedule = Schedule(total_steps=10, decay="linear")
    with pytest.raises(ValueError, match="base rates"):
        ScheduleLR(optimizer_of(2.0), schedule).load_state_dict(state)
    for choice, expected in (("new", 1.0), ("saved", 0.5)):
        scheduler = ScheduleLR(optimizer_of(2.0), schedule, on_change=choice)  # type: ignore[arg-type]
        scheduler.load_state_dict(state)
        assert rates_of(scheduler.optimizer) == [expected]


def test_other_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2 parameter groups"):
        ScheduleLR(optimizer_of(1.0, 1.0), Schedule(total_steps=10), on_change="saved").load_state_dict(changed()[0])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 2.5}, "total_steps"),
        ({"total_steps": True}, "total_steps"),
        ({"warmup_steps": 11}, "warmup_steps=11 is more than total_steps=10"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": None}, "warmup_steps=None"),
        ({"warmup_steps": 10}, "no update to decay"),
        ({"warmup_steps": 5, "hold_steps": 5}, "no update to decay"),
        ({"warmup_steps": 5, "hold_steps": 6}, "leaves 5"),
        ({"decay_steps": 11}, "leaves 10"),
        ({"decay_steps": 0}, "no update to decay"),
        ({"hold_steps": 2, "decay_steps": 2}, "Set one of them"),
        ({"minimum": 1.5}, "minimum=1.5"),
        ({"minimum": -0.1}, "minimum=-0.1"),
        ({"minimum": float("nan")}, "minimum=nan"),
        ({"decay": "wsd"}, "'linear', 'cosine', '1-sqrt'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(**{"total_steps": 10, **wrong})


def test_updates_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        Schedule(total_steps=3)(0)


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler_config(optimizer, Schedule(total_steps=6, warmup_steps=2))}


def test_lightning_moves_it_with_every_update_and_not_with_every_batch() -> None:
    module = Line()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([torch.ones(2)] * 6, batch_size=None))
    schedule = Schedule(total_steps=6, warmup_steps=2)
    assert module.rates == [0.5 * schedule(step) for step in range(1, 7)]
    assert module.rates[-1] == 0.0
