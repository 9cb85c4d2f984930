"""The time model against published figures: predictions of them, and the constants that fit one half of them (`published`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kenotron.models.own import Implementation
from kenotron.parallel.init import meta_device
from kenotron.planning.layouts import Choice, Job, choices
from kenotron.planning.memory import fullest, shortage
from kenotron.planning.model import ModelSpec, build_model
from kenotron.planning.planner import Tracer
from kenotron.planning.published import MODELS, Figure
from kenotron.planning.time import Clock, Rates
from kenotron.planning.trace import Trace

#: Within these a constant still means what its name says.
BOUNDS: dict[str, tuple[float, float]] = {
    "gemm": (0.45, 0.85), "gemm_fp8": (0.3, 0.75), "attention": (0.25, 0.65), "memory": (0.4, 0.9), "fused": (0.2, 0.8),
    "link": (0.3, 0.9), "network": (0.2, 0.9), "hidden": (0.3, 1.0), "hidden_tp": (0.0, 0.9), "launch": (3e-6, 2e-5),
    "launch_compiled": (1e-6, 1e-5), "latency": (3e-6, 5e-5), "spread": (0.0, 0.03),
}  # fmt: skip


def fit(ratios: Callable[[Rates], Sequence[float]], start: Rates, rounds: int = 6, steps: int = 9) -> Rates:
    """Return the rates that make ``ratios`` (predicted over published) closest to 1, one constant after the other.

    What is made small is the mean of |log ratio|: single figures that nothing explains shall not pull the others.
    """

    def loss(rates: Rates) -> float:
        found = [abs(math.log(ratio)) for ratio in ratios(rates)]
        return sum(found) / len(found)

    best, least = start, loss(start)
    for round_ in range(rounds):
        for name, (low, high) in BOUNDS.items():
            now, width = getattr(best, name), (high - low) / 2 ** (round_ + 1)
            for step in range(steps):
                value = min(high, max(low, now - width + 2 * width * step / (steps - 1)))
                tried = best.changed(**{name: value})
                if (found := loss(tried)) < least:
                    best, least = tried, found
    return best


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A figure's choices with their traces; several where it does not tell its microbatch."""

    clock: Clock
    candidates: list[tuple[Choice, Trace]]


class Predictor:
    """Predicts published figures. Models are built and traced once."""

    def __init__(self) -> None:
        self._models: dict[str, ModelSpec] = {}
        self._traces: dict[Any, Tracer] = {}
        self._prepared: dict[str, _Prepared] = {}

    def ratio(self, figure: Figure, rates: Rates) -> float:
        """Return predicted over published speed."""
        prepared = self._prepared.get(figure.name) or self._prepare(figure)
        clock = prepared.clock.at(rates)
        best = min((clock.step(made, choice) for choice, made in prepared.candidates), key=lambda time: time.step)
        return (best.mfu if figure.is_mfu else best.tokens_per_second / figure.devices) / figure.value

    def _prepare(self, figure: Figure) -> _Prepared:
        model = self._models.setdefault(figure.model, self._models.get(figure.model) or build(figure.model, "transformers"))
        job = Job(
            # Both cast weights once an update, not in every forward pass as autocast does: nearer to weights in bf16.
            devices=figure.devices, device=figure.device, seq=figure.seq, batch=figure.batch, compile=figure.compile,
            precision="bf16-true", fixed=figure.job_settings,
        )  # fmt: skip
        key = (figure.model, figure.seq)
        traces = self._traces.setdefault(key, Tracer(model, job))
        found = []
        for choice in choices(model, job, Counter()):
            made = traces(choice)
            # A figure that was measured did fit; only where we choose ourselves it must do so by our count.
            if "microbatch" in figure.settings or shortage(fullest(model, made, choice, job), job) <= 0:
                found.append((choice, made))
        if not found:
            smallest = min(choices(model, job, Counter()), key=lambda choice: choice.microbatch)
            found = [(smallest, traces(smallest))]
        self._prepared[figure.name] = _Prepared(
            clock=Clock(model, job, Rates(), traces.base, figure.software), candidates=found
        )
        return self._prepared[figure.name]


def build(name: str, implementation: Implementation) -> ModelSpec:
    """Return one of `published.MODELS`. Those who published have whole logits, as transformers' models do."""
    from transformers import AutoConfig

    values = dict(MODELS[name])
    with meta_device(torch.float32):
        return ModelSpec.of(build_model(AutoConfig.for_model(values.pop("model_type"), **values), implementation), name)
