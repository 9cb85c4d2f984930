"""Parameter groups by rule: what decays, at which rate, by Muon or AdamW; few groups, the same on every rank of any layout.

Rules see names and kinds of weights (``weights.find_weights``), which are those of the whole module on every rank: weights of
other pipeline stages are there, empty, and a tied weight counts once, under its first name. Checkpoints store groups by index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kenotron.optim.weights import Weight, find_weights

#: Kinds that do not decay: what scales, shifts or stands for a token has no reason to be small.
NO_DECAY = frozenset({"embedding", "norm", "bias"})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings for the weights whose names match. Of several that match, the last one that says something decides.

    Args:
        pattern: regular expression, found anywhere in a name such as ``model.layers.3.mlp.down_proj.weight``.
        lr_scale: multiplies the rate (beside what `parametrise` does). weight_decay: in place of the usual one.
        betas: of Adam.

    Raises:
        ValueError: no regular expression, a number that can't be, or nothing set.
    """

    pattern: str
    lr_scale: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _compiled(self.pattern)
        if self.lr_scale is None and self.weight_decay is None and self.betas is None:
            raise ValueError(f"Rule(pattern={self.pattern!r}) sets nothing. Set lr_scale, weight_decay or betas.")
        for name in ("lr_scale", "weight_decay"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value)
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas={self.betas!r}: set two numbers from 0 to below 1.")


def parameter_groups(
    module: nn.Module, *, lr: float, weight_decay: float = 0.1, rules: Sequence[Rule] = ()
) -> list[dict[str, Any]]:
    """Return groups for AdamW, SGD or another optimizer that knows ``lr`` and ``weight_decay``.

    Norms, biases, embeddings, and all else with fewer than two dimensions do not decay. Frozen parameters are in as well:
    without a gradient optimizers pass them over, until they are unfrozen.

    Args:
        module: the LightningModule, in ``configure_optimizers``: ``AdamW(parameter_groups(self, lr=3e-4))``.
        lr: the base rate. weight_decay: of what decays. rules: exceptions.

    Raises:
        ValueError: a rule that no name matches, or a part of a module that is split into pipeline stages.
    """
    _check_number("lr", lr)
    _check_number("weight_decay", weight_decay)
    weights = find_weights(module)
    _check_rules(rules, weights)
    return _merged((weight, _settings(weight, lr, weight_decay, rules)) for weight in weights)


def muon_groups(
    module: nn.Module,
    *,
    lr: float = 0.02,
    adamw_lr: float = 3e-4,
    weight_decay: float = 0.1,
    rules: Sequence[Rule] = (),
    adamw: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return groups for `Muon`: matrices and experts by Muon; embeddings, heads, norms, biases and the rest by AdamW.

    Args:
        module: the LightningModule, in ``configure_optimizers``: ``Muon(muon_groups(self))``.
        lr: of Muon. adamw_lr: of AdamW. weight_decay, rules: as in `parameter_groups`; ``betas`` matter to AdamW alone.
        adamw: regular expressions for names of further matrices that AdamW is to take.

    Raises:
        ValueError: as `parameter_groups`; a pattern that no matrix matches.
    """
    for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay)):
        _check_number(name, value)
    weights = find_weights(module)
    _check_rules(rules, weights)
    patterns = {text: _compiled(text) for text in adamw}
    matrices = [weight for weight in weights if weight.kind in ("matrix", "experts")]
    for text, pattern in patterns.items():
        if not any(pattern.search(weight.name) for weight in matrices):
            raise ValueError(f"adamw={text!r} matches no matrix. Matrices are {_some(weight.name for weight in matrices)}.")
    by_muon = {w.name for w in matrices if not any(pattern.search(w.name) for pattern in patterns.values())}
    found = []
    for weight in weights:
        if weight.name in by_muon:
            # Muon's updates are of one size whatever the width: its own adjustment stands in place of Adam's factor.
            settings = _settings(replace(weight, lr_scale=1.0), lr, weight_decay, rules)
            settings.pop("betas", None)
            settings |= {"algorithm": "muon", "parts": weight.parts, "transposed": weight.transposed}
        else:
            settings = _settings(weight, adamw_lr, weight_decay, rules) | {"algorithm": "adamw"}
        found.append((weight, settings))
    return _merged(found)


def _settings(weight: Weight, lr: float, weight_decay: float, rules: Sequence[Rule]) -> dict[str, Any]:
    decays = weight.kind not in NO_DECAY and len(weight.shape) >= 2 and weight.uses[0][1] != "A_log"
    settings = {"lr": lr * weight.lr_scale, "weight_decay": weight_decay if decays else 0.0}
    matching = [rule for rule in rules if re.search(rule.pattern, weight.name)]
    scales = [rule.lr_scale for rule in matching if rule.lr_scale is not None]
    if scales:
        settings["lr"] *= scales[-1]
    for name in ("weight_decay", "betas"):
        values = [getattr(rule, name) for rule in matching if getattr(rule, name) is not None]
        if values:
            settings[name] = values[-1]
    return settings


def _merged(found: Iterable[tuple[Weight, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one group for all weights with the same settings, in the order in which the module has the first of each."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for weight, settings in found:
        group = groups.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})
        group["params"].append(weight.param)
    return list(groups.values())


def _check_rules(rules: Sequence[Rule], weights: Sequence[Weight]) -> None:
    for rule in rules:
        if not any(re.search(rule.pattern, weight.name) for weight in weights):
            raise ValueError(f"Rule(pattern={rule.pattern!r}) matches no weight. Names are {_some(w.name for w in weights)}.")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}. A literal dot is \\., any text .*") from None


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: set a number of 0 or more.")


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:8]) + (f", … ({len(every)} in all)" if len(every) > 8 else "")
