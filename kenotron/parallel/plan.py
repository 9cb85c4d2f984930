"""Parallelism is data: what becomes of each module.

A plan comes from, in this order: the user (``KenotronStrategy(plan=...)`` or a method ``parallel_plan()`` of the
LightningModule), a method ``parallel_plan()`` of a model inside (Kénotron's own have one), the configuration of a transformers
model (``base_model_tp_plan``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kenotron.parallel.shards import canonical

#: What can become of a module, or of a parameter of an experts module.
STYLES = {
    "colwise": "rows of the weight are split; the output stays split",
    "rowwise": "columns of the weight are split; the input is split, the output is summed",
    "colwise_gather_output": "rows of the weight are split; the output is gathered",
    "rowwise_split_input": "columns of the weight are split; the whole input is cut first, the output is summed",
    "packed_colwise": "several layers in one (q, k and v; gate and up) are split each; the output stays split",
    "packed_rowwise": "columns of a fused pair are split half by half; the output is summed",
    "vocab_embedding": "rows of an nn.Embedding are split over the vocabulary",
    "vocab_head": "rows of the head are split over the vocabulary; logits and loss stay split",
    "replicated_with_grad_allreduce": "kept whole but works on split activations: its gradient is summed",
    "moe_tp_experts": "experts whose weights are split: inputs are shared, the output is summed",
    "split_norm": "a norm over split features; squares are summed",
    "split_rows": "a module or parameter for split channels: what lies along its first dimension is split, nothing is summed",
    "rowwise_to_split": "as rowwise, and the output goes to split channels: its gradient is summed",
    "mla_kv_a_proj": "kept whole; the rotary part of its output goes to split heads",
}


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """What becomes of each module under tensor, sequence and pipeline parallelism.

    Args:
        tensor: pattern of module names (``*`` stands for one part of a dotted name) -> one of ``STYLES``.
        blocks: name of the list of like layers.
        stages: names (or patterns) of the units of each pipeline stage, in the order in which they run.
        unreadable: why a model's own plan gives nothing to ``tensor``; tensor parallelism is refused with these words.

    Raises:
        ValueError: an unknown style.
    """

    tensor: Mapping[str, str] = field(default_factory=dict)
    blocks: str | None = None
    stages: Sequence[Sequence[str]] | None = None
    unreadable: str = ""

    def __post_init__(self) -> None:
        for pattern, style in self.tensor.items():
            if style not in STYLES:
                raise ValueError(
                    f"plan[{pattern!r}] = {style!r} is no style. Styles: "
                    + "; ".join(f"{k!r} ({v})" for k, v in STYLES.items())
                )

    @staticmethod
    def of(plan: ParallelPlan | Mapping[str, str] | None) -> ParallelPlan | None:
        """Return a plan from a plan or from a plain mapping of its ``tensor`` part."""
        if plan is None or isinstance(plan, ParallelPlan):
            return plan
        if isinstance(plan, Mapping):
            return ParallelPlan(tensor=dict(plan))
        raise ValueError(
            f"plan={plan!r} is a {type(plan).__name__}. Pass a mapping such as {{'model.layers.*.q_proj': 'colwise'}} or a "
            "kenotron.ParallelPlan."
        )

    def resolve(self, root: nn.Module) -> dict[str, str]:
        """Return the style of each module (or parameter) name of ``root`` that the plan names.

        Raises:
            ValueError: a pattern names nothing.
        """
        names = {canonical(name): name for name, _ in root.named_modules()}
        names |= {canonical(name): name for name, _ in root.named_parameters(remove_duplicate=False)}
        styles: dict[str, str] = {}
        for pattern, style in self.tensor.items():
            regex = _pattern(pattern)
            matches = [full for name, full in names.items() if regex.fullmatch(name)]
            if not matches:
                near = sorted(name for name in names if name.rpartition(".")[2] == pattern.rpartition(".")[2])[:4]
                raise ValueError(
                    f"plan names {pattern!r}, but no module of {type(root).__name__} is called that. "
                    + (f"Similar names: {', '.join(near)}. " if near else "")
                    + "Names start at the LightningModule ('model.layers.*.q_proj'); * stands for one part of a name."
                )
            styles.update(dict.fromkeys(matches, style))
        return styles


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))


def find_plan(root: nn.Module, user_plan: ParallelPlan | None) -> ParallelPlan | None:
    """Return the plan of ``root``: the user's, the module's own, or that of the transformers models inside of it."""
    own = getattr(root, "parallel_plan", None)
    if user_plan is None and callable(own):
        user_plan = ParallelPlan.of(own())
    if user_plan is not None and user_plan.tensor:
        return user_plan
    tensor: dict[str, str] = {}
    unreadable = ""
    for name, module in transformers_models(root):
        try:
            tensor.update(_model_plan(canonical(name), module))
        except _UnknownStyles as problem:
            unreadable = str(problem)
    if not tensor and not unreadable:
        return user_plan
    return ParallelPlan(
        tensor={} if unreadable else tensor,
        blocks=user_plan.blocks if user_plan else None,
        stages=user_plan.stages if user_plan else None,
        unreadable=unreadable,
    )


class _UnknownStyles(Exception):
    """A model's plan uses styles that are not known here: told where they matter, under tensor parallelism alone."""


def transformers_models(root: nn.Module) -> list[tuple[str, Any]]:
    """Return the outermost transformers models inside ``root``, without importing transformers."""
    found: list[tuple[str, Any]] = []
    for name, module in root.named_modules():
        inside = any(name.startswith(outer + ".") or outer == "" for outer, _ in found)
        if not inside and any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
            found.append((name, module))
    return found


def pipeline_hints(root: nn.Module) -> list[str]:
    """Return the block lists that transformers configurations name (``base_model_pp_plan``)."""
    hints = []
    for name, model in transformers_models(root):
        prefix = _join(name, "" if model.base_model is model else model.base_model_prefix)
        for key in getattr(model.config, "base_model_pp_plan", None) or {}:
            hints.append(_join(prefix, key))
    return hints


def _model_plan(name: str, model: Any) -> dict[str, str]:
    """Return the tp plan of one model with names from the root: its own, or what transformers says of it."""
    own = getattr(model, "parallel_plan", None)
    if callable(own):
        return {_join(name, key): style for key, style in own().tensor.items()}
    return _transformers_plan(name, model)


def _transformers_plan(name: str, model: Any) -> dict[str, str]:
    """Return the tp plan of one transformers model with names from the root; embedding and head go by vocabulary."""
    base_plan = getattr(model.config.get_text_config(decoder=True), "base_model_tp_plan", None)
    if not base_plan:
        return {}
    base_name = canonical(next((n for n, m in model.named_modules() if m is model.base_model), ""))
    styles = {_join(name, _join(base_name, key)): style for key, style in base_plan.items() if style in STYLES}
    unknown = {style for style in base_plan.values() if style not in STYLES}
    if unknown:
        raise _UnknownStyles(
            f"the tp plan of {type(model).__name__} uses {', '.join(sorted(unknown))}, which tensor parallelism here does not "
            f"know. Set tp=1, or write a plan with the styles {', '.join(STYLES)}."
        )
    known = {canonical(n) for n, _ in model.named_modules()} | {canonical(n) for n, _ in model.named_parameters()}
    local = {key[len(name) + 1 :] if name else key: key for key in styles}
    styles = {full: styles[full] for key, full in local.items() if any(_pattern(key).fullmatch(n) for n in known)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear):
        head_name = canonical(next(n for n, m in model.named_modules() if m is head))
        embedding_name = canonical(next(n for n, m in model.named_modules() if m is embedding))
        styles[_join(name, head_name)] = "vocab_head"
        if isinstance(embedding, nn.Embedding):
            styles[_join(name, embedding_name)] = "vocab_embedding"
    return styles


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
