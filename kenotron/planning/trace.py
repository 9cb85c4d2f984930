"""What one block of each kind keeps, computes and sends: a thin model run forward and backward on tensors without data.

1. `ModelSpec.prototype` is copied with parameters that have shapes and no memory, cut by the very code that cuts it in training
   (tensor and sequence parallelism, recompute), and its experts are given an even load.
2. It runs under a meter: every storage that an operator returns lives until it is freed, every matrix product counts its
   operations, every collective its bytes. Hooks on blocks say which part they belong to.
3. With one sample and with two: what a part keeps is a constant and a share for each sample. Of long sequences the first 1024
   tokens run: all but attention goes with the number of tokens, and that with its square.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from kenotron.parallel import sequence
from kenotron.parallel._torch import FakeTensorMode, SilentGroup
from kenotron.parallel.expert import call_of, check_experts, find_experts
from kenotron.parallel.plan import ParallelPlan, transformers_models
from kenotron.parallel.recompute import Recompute
from kenotron.parallel.shards import Shards
from kenotron.parallel.tensor import TensorParallel
from kenotron.planning.meter import Meter, Tally
from kenotron.planning.model import ModelSpec, Skipped

#: precision -> bytes of a parameter, of its gradient, and the type of products under autocast
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.bfloat16),  # on tensors without data both halves are alike
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "64-true": (torch.float64, None),
}


#: Tokens of a traced sample, at most.
_LENGTH = 1024

_IMPLEMENTATION = "kenotron_planning"  # of attention, as transformers knows it


class Line(NamedTuple):
    """A quantity that is ``fixed + each × samples``."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, samples: float) -> float:
        return self.fixed + self.each * samples


_NOTHING = Line()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a trace depends on.

    Args:
        tp, ep: sizes. sequence_parallel, recompute: as for the strategy. precision: Lightning's name. seq: tokens of a sample.
    """

    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    precision: str = "32-true"
    seq: int = 2048


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one pass through one part, by what bounds them.

    Args:
        gemm_flops, attention_flops: operations of products and of attention, all pairs of positions counted.
        gemm_bytes, other_bytes: read and written by products, and by everything else. num_operators: launched.
        sent: name of a collective over tp -> bytes. num_collectives: of those.
    """

    gemm_flops: Line = _NOTHING
    attention_flops: Line = _NOTHING
    gemm_bytes: Line = _NOTHING
    other_bytes: Line = _NOTHING
    num_operators: float = 0.0
    num_collectives: float = 0.0
    sent: dict[str, Line] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One block, or what comes before or after all blocks. Sizes in bytes.

    Args:
        elements, expert_elements: of parameters on one tp and ep rank, those of experts apart. largest: of one parameter.
        kept: between forward and backward. cast: copies of weights that autocast keeps until the forward pass of everything
            is over.
        in_forward: beyond what was there before the part, at most.
        in_backward: beyond what was there after its forward pass, at most, when gradients are added to others.
        first_backward: the same where they are the first ones, which stay: without those of other parts.
        forward, backward: costs; backward with what is computed again. output: of a block, what goes to the next.
    """

    elements: int
    expert_elements: int
    largest: int
    kept: Line
    cast: Line
    in_forward: Line
    in_backward: Line
    first_backward: Line
    forward: Costs
    backward: Costs
    output: Line = _NOTHING


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the parts of a model need under one `Cut`.

    Args:
        before, after: what comes before and after the blocks (embedding; last norm, head and loss). kinds: one block of each.
        elements: bytes of one parameter.
    """

    cut: Cut
    before: Part
    kinds: tuple[Part, ...]
    after: Part
    param_bytes: int
    buffer_bytes: int


def trace(model: ModelSpec, cut: Cut) -> Trace:
    """Run a thin copy of ``model`` and return what its parts need.

    Raises:
        ValueError: the model can't be cut so; the text is that of the strategy.
    """
    length = _LENGTH if cut.seq % _LENGTH == 0 else cut.seq
    one, two = _run(model, cut, 1, length), _run(model, cut, 2, length)
    parts = {name: _part(one, two, name, cut.seq // length) for name in one.names}
    return Trace(
        cut=cut,
        before=parts["before"],
        kinds=tuple(parts[str(index)] for index in model.representatives),
        after=parts["after"],
        param_bytes=PRECISIONS[cut.precision][0].itemsize,
        buffer_bytes=one.buffer_bytes,
    )


def _part(one: Meter, two: Meter, name: str, longer: int) -> Part:
    """Return what a part needs; samples are so many times longer than those that ran."""
    a, b = one.parts[name], two.parts[name]

    def _line(one: float, two: float) -> Line:
        return Line(2 * one - two, (two - one) * longer)

    return Part(
        elements=a.elements,
        expert_elements=a.expert_elements,
        largest=a.largest,
        kept=_line(a.kept, b.kept),
        cast=_line(a.cast, b.cast),
        in_forward=_line(a.in_forward, b.in_forward),
        in_backward=_line(a.in_backward, b.in_backward),
        first_backward=_line(a.first_backward, b.first_backward),
        forward=_costs(a.forward, b.forward, longer),
        backward=_costs(a.backward, b.backward, longer),
        output=_line(a.output, b.output),
    )


def _costs(a: Tally, b: Tally, longer: int) -> Costs:
    def _line(one: float, two: float) -> Line:
        return Line(2 * one - two, (two - one) * longer)

    pairs = (b.attention_flops - a.attention_flops) * longer**2
    return Costs(
        gemm_flops=_line(a.gemm_flops, b.gemm_flops),
        attention_flops=Line(0.0, pairs),
        gemm_bytes=_line(a.gemm_bytes, b.gemm_bytes),
        other_bytes=_line(a.other_bytes, b.other_bytes),
        num_operators=a.num_operators,
        num_collectives=a.num_collectives,
        sent={kind: _line(size, b.sent.get(kind, 0)) for kind, size in a.sent.items()},
    )


# ---------------------------------------------------------------------------------------------------------------- a run


def _run(model: ModelSpec, cut: Cut, samples: int, length: int) -> Meter:
    names = [f"{model.blocks}.{key}" for key, _ in model.prototype.get_submodule(model.blocks).named_children()]
    chosen = [names[index] for index in model.representatives]
    meter = Meter([str(index) for index in model.representatives])
    dtype, autocast = PRECISIONS[cut.precision]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        root = copy.deepcopy(model.prototype, _without_data(model.prototype, dtype)).train()
        _without_masks(root)
        _cut(root, model, cut, chosen, meter)
        blocks = [root.get_submodule(name) for name in chosen]
        cut.recompute.__class__(**{**cut.recompute.__dict__, "every": 1, "budget": None, "offload": False}).apply(blocks)
        _weigh(root, meter, chosen)
        skipped = [module.__dict__["_like"] for module in root.modules() if isinstance(module, Skipped)]
        for name, block in zip(meter.names[1:-1], blocks, strict=True):
            _watch(block, name, meter, skipped[:1])  # the first of a kind shows all others what a block returns
        for param in root.parameters():
            param.register_post_accumulate_grad_hook(meter.take_gradient)
        ids = torch.zeros(samples, length, dtype=torch.long)
        meter.ignore(iter([*root.parameters(), *root.buffers(), ids]))
        meter.buffer_bytes = sum(b.numel() * b.element_size() for b in root.buffers())
        context = torch.autocast("cpu", autocast) if autocast is not None else contextlib.nullcontext()
        with meter:
            with context:
                loss = compute_loss(root, ids)
                meter.end_forward()
            meter.begin_backward()
            loss.backward()
            meter.leave_backward()
    return meter


def compute_loss(root: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of a language model on ``ids [B, S]``: its own, or the cross-entropy of its logits."""
    parameters = inspect.signature(root.forward).parameters
    if "labels" in parameters:
        options = {"use_cache": False} if "use_cache" in parameters or "num_items_in_batch" in parameters else {}
        loss: Tensor = root(input_ids=ids, labels=ids, **options).loss
        return loss
    out = root(ids)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError(
            f"{type(root).__name__} is called with ids of shape [batch, length] and must return logits [batch, length, "
            f"vocabulary], or an object with a loss where it takes labels. It returned {type(out).__name__}."
        )
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _without_data(module: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    memo: dict[int, Any] = {}
    for param in module.parameters():
        kind = dtype if param.is_floating_point() else param.dtype
        memo[id(param)] = nn.Parameter(torch.empty(param.shape, dtype=kind), requires_grad=param.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return memo


def _cut(root: nn.Module, model: ModelSpec, cut: Cut, blocks: list[str], meter: Meter) -> None:
    """Do to the thin model what the strategy does: experts, then tensor and sequence parallelism."""
    experts = find_experts(root)
    if cut.ep > 1:
        check_experts(root, experts, cut.ep)
    for module in experts.values():
        _even_load(module, cut.ep)
    if cut.tp == 1:
        return
    if model.plan is None or not model.plan.tensor:
        raise ValueError(f"tp={cut.tp}, but no plan says how {type(root).__name__} is split. Set tp=1.")
    # Patterns that name layers which are skipped here find nothing.
    styles = _resolve(model, root)
    group: Any = SilentGroup(cut.tp, meter.tell)
    shards = Shards(tp=cut.tp)
    split = TensorParallel(group=group, rank=0, size=cut.tp, shards=shards, device=torch.device("cpu"))
    regions: dict[str, Any] = {}
    if cut.sequence_parallel:
        regions = {name: sequence.regions_of(root.get_submodule(name), name, styles) for name in blocks}
    split.apply(root, styles, [name for found in regions.values() for name in found.split])
    sequence.apply_sequence_parallel(root, regions, [blocks] if regions else [], split)


def _resolve(model: ModelSpec, root: nn.Module) -> dict[str, str]:
    assert model.plan is not None
    styles: dict[str, str] = {}
    for pattern, style in model.plan.tensor.items():
        try:
            styles |= ParallelPlan(tensor={pattern: style}).resolve(root)
        except ValueError:
            continue
    return styles


def _even_load(experts: nn.Module, ep: int) -> None:
    """Let each expert take as many tokens as any other: where they go would depend on data, what they cost then does not."""
    for key, param in list(experts._parameters.items()):
        if param is not None:
            experts._parameters[key] = nn.Parameter(param[: param.shape[0] // ep].detach().clone())
    call = call_of(experts).arguments
    transposed = bool(getattr(experts, "is_transposed", False))

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(call, args, strict=False)), **kwargs}
        x_TH, index_TK, weight_TK = (given[name] for name in call)
        stacks = [p for p in experts.parameters(recurse=False) if p.ndim == 3]
        count, (tokens, top_k), hidden = stacks[0].shape[0], index_TK.shape, x_TH.shape[-1]
        rows = -(-tokens * top_k // count)  # of each expert
        x = x_TH.repeat_interleave(top_k, 0)
        x = F.pad(x, (0, 0, 0, rows * count - tokens * top_k)).view(count, rows, hidden)
        *ups, down = stacks
        projected = [torch.bmm(x, up if transposed else up.transpose(1, 2)) for up in ups]
        halves = projected[0].chunk(2, -1) if len(ups) == 1 else projected
        inner = (down if transposed else down.transpose(1, 2)).shape[1]
        x = projected[0] if projected[0].shape[-1] == inner else F.silu(halves[0]) * halves[1]
        x = torch.bmm(x, down if transposed else down.transpose(1, 2))
        x = x.reshape(count * rows, hidden)[: tokens * top_k] * weight_TK.reshape(-1, 1).to(x.dtype)
        return x.view(tokens, top_k, hidden).sum(1).to(x_TH.dtype)

    experts.forward = forward


def _planned_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attend as torch's SDPA does, without a mask: transformers would make one of S × S for tensors without data."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def _without_masks(root: nn.Module) -> None:
    """Let transformers' models attend without masks, where they let their attention be chosen."""
    models = [model for _, model in transformers_models(root)]
    if not models:
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_IMPLEMENTATION, _planned_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **options: None)
    for model in models:
        if model._supports_sdpa and model.config._attn_implementation != "eager":
            model.set_attn_implementation(_IMPLEMENTATION)


def _weigh(root: nn.Module, meter: Meter, blocks: list[str]) -> None:
    """Note the parameters of each part; those of skipped blocks are not there."""
    experts = {id(p) for module in find_experts(root).values() for p in module.parameters(recurse=False)}
    # Their forward pass is another one by now, and by it they are not found: by the shapes of their parameters they are.
    experts |= {id(p) for m in root.modules() if hasattr(m, "num_experts") for p in m.parameters(recurse=False) if p.ndim == 3}
    first = root.get_submodule(blocks[0])
    seen_block = False
    owner: dict[int, str] = {}
    for name, param in root.named_parameters():
        block = next((i for i, b in enumerate(blocks) if name.startswith(b + ".")), None)
        seen_block = seen_block or block is not None or param in set(first.parameters())
        owner[id(param)] = meter.names[1 + block] if block is not None else "after" if seen_block else "before"
        part = meter.parts[owner[id(param)]]
        if id(param) in experts:
            part.expert_elements += param.numel()
        else:
            part.elements += param.numel()
        part.largest = max(part.largest, param.numel())


def _watch(block: nn.Module, name: str, meter: Meter, skipped: list[dict[str, Any]]) -> None:
    """Let hooks on a block tell the meter where the run is."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        meter.enter(name)
        hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
        if hidden is not None and hidden.requires_grad:
            before = meter.names[meter.names.index(name) - 1]
            hidden.register_hook(lambda grad: meter.enter_backward(before))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        first = next(x for x in tree_iter(out) if isinstance(x, Tensor))
        meter.parts[name].output = first.numel() * first.element_size()
        for like in skipped:
            like["output"] = out
        if name == meter.names[-2]:
            meter.enter("after")
        if first.requires_grad:
            first.register_hook(lambda grad: meter.enter_backward(name))

    block.register_forward_pre_hook(enter, with_kwargs=True)
    # Before what gathers a sequence that was cut: that happens once, after all blocks.
    block.register_forward_hook(leave, prepend=True)
