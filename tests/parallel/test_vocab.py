"""User code on vocabulary-parallel logits gives what it gives on the whole logits of a single process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity
from transformers.loss.loss_utils import ForCausalLMLoss

from kenotron.parallel import vocab
from kenotron.parallel.collectives import copy_to, gather_from
from kenotron.parallel.vocab import VocabParallelLogits, vocab_parallel_embedding

B, S, H, V = 3, 5, 8, 24
SIZES = [2, 4]


class Batch:
    """Inputs, labels and weights, the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(B, S, H, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = (torch.randn(V, H, generator=generator, dtype=torch.float64) * scale).to(dtype)
        self.y = torch.randint(0, V, (B, S), generator=generator)
        self.y[:, 0] = torch.tensor([0, V // 2, V - 1])  # the first and the last of the ranks' slices
        self.gaps = self.y.clone()
        self.gaps[1] = -100  # a row without any target
        self.gaps[0, 2] = -100
        self.mask = torch.rand(B, S, generator=generator) > 0.4
        self.temperature = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        self.per_token = (torch.rand(B, S, 1, generator=generator, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()
        self.bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.probabilities = torch.rand(B * S, V, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)


class Through(torch.autograd.Function):
    """A user's autograd.Function, which knows plain tensors only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return 2 * logits * grad


class Clone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


def _ce(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), **options)


def _in_place_masking(x: Tensor, b: Batch) -> Tensor:
    x[..., 3] = -30.0
    return _ce(x, b.y)


def _in_place_on_a_view(x: Tensor, b: Batch) -> Tensor:
    flat = x.view(-1, V)
    _ = x.topk(2)  # the gathered logits are kept, and must not be used after this
    flat[2:4] = 0.0
    flat.mul_(2.0)
    return _ce(x, b.y) + x.topk(2).values.sum()


def _in_place_then_custom_function(x: Tensor, b: Batch) -> Tensor:
    x /= 2.0
    x.masked_fill_(b.mask.unsqueeze(-1), 0.5)
    return Through.apply(x)


def _metric_before_the_loss(x: Tensor, b: Batch) -> Tensor:
    with torch.no_grad():
        x.topk(3)
    return x.topk(3).values.sum() + _ce(x, b.y)


def _hooked(x: Tensor, b: Batch) -> Tensor:
    x.register_hook(lambda grad: grad * 2)
    x.register_hook(lambda grad: grad.clamp(-0.05, 0.02).full_tensor() if hasattr(grad, "full_tensor") else grad.clamp(-0.05, 0.02))
    return _ce(x, b.y)


def _grad_of_logits(x: Tensor, b: Batch) -> Tensor:
    x.retain_grad()
    loss = _ce(x, b.y)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert grad.shape == x.shape
    return loss * grad.detach().square().sum()


def _own_log_softmax(x: Tensor, b: Batch) -> Tensor:
    return -F.log_softmax(x, dim=-1).gather(-1, b.y.unsqueeze(-1)).squeeze(-1).mul(b.mask).sum() / b.mask.sum()


def _entropy(x: Tensor, b: Batch) -> Tensor:
    p, logp = x.softmax(-1), x.log_softmax(-1)
    return -(p * logp).sum(-1).mean()


def _chunked(x: Tensor, b: Batch) -> Tensor:
    chunks = zip(x.split(2, dim=1), b.gaps.split(2, dim=1), strict=True)
    return sum(_ce(c, t, reduction="sum") for c, t in chunks) / (b.gaps != -100).sum()


def _distillation(x: Tensor, b: Batch) -> Tensor:
    teacher = F.softmax(x.detach() * 0.5, dim=-1)
    return F.kl_div(F.log_softmax(x, -1), teacher, reduction="batchmean")


# The user's code, from logits [B, S, V] to a loss. These communicate numbers per token only ...
PARALLEL: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "transformers": lambda x, b: ForCausalLMLoss(x, b.gaps, V),
    "transformers-num-items": lambda x, b: ForCausalLMLoss(x, b.gaps, V, num_items_in_batch=torch.tensor(9)),
    "transformers-shift-labels": lambda x, b: ForCausalLMLoss(x, None, V, shift_labels=b.gaps),
    "flat": lambda x, b: F.cross_entropy(x.flatten(0, 1).float(), b.y.flatten()).to(x.dtype),
    "view": lambda x, b: F.cross_entropy(x.view(-1, x.size(-1)), b.y.view(-1)),
    "reshape-shape": lambda x, b: F.cross_entropy(x.reshape(-1, x.shape[-1]), b.y.reshape(-1)),
    "shifted": lambda x, b: _ce(x[..., :-1, :].contiguous(), b.y[..., 1:]),
    "transposed": lambda x, b: F.cross_entropy(x.transpose(1, 2), b.y),
    "permuted": lambda x, b: F.cross_entropy(torch.permute(x, (0, 2, 1)), b.y),
    "movedim-images": lambda x, b: F.cross_entropy(x.unflatten(1, (S, 1)).movedim(-1, 1), b.y.unsqueeze(-1)),
    "one-row": lambda x, b: F.cross_entropy(x[1, 2], b.y[1, 2]),
    "mT-squeeze": lambda x, b: F.cross_entropy(x.unsqueeze(0).mT.squeeze(0), b.y),
    "module": lambda x, b: nn.CrossEntropyLoss(ignore_index=-100)(x.view(-1, V), b.gaps.view(-1)),
    "keywords": lambda x, b: F.cross_entropy(input=x.view(-1, V), target=b.gaps.view(-1), reduction="sum"),
    "ignore-inside-vocabulary": lambda x, b: _ce(x, b.y, ignore_index=int(b.y[0, 1])),
    "smoothing": lambda x, b: _ce(x, b.gaps, label_smoothing=0.1),
    "smoothing-none": lambda x, b: (_ce(x, b.gaps, label_smoothing=0.3, reduction="none") ** 2).sum(),
    "masked-mean": lambda x, b: (F.cross_entropy(x.transpose(1, 2), b.y, reduction="none") * b.mask).sum() / b.mask.sum(),
    "rows-by-mask": lambda x, b: F.cross_entropy(x[b.gaps != -100], b.gaps[b.gaps != -100]),
    "rows-by-index": lambda x, b: _ce(x[:, torch.tensor([0, 2])], b.y[:, [0, 2]]),
    "chunked": _chunked,
    "rows-iterated": lambda x, b: sum(F.cross_entropy(row, t) for row, t in zip(x, b.gaps[:1].expand(B, S), strict=True)),
    "soft-capping": lambda x, b: _ce(torch.tanh(x / 3.0) * 3.0, b.y),
    "learned-temperature": lambda x, b: _ce(x / b.temperature, b.y),
    "temperature-per-token": lambda x, b: _ce(b.per_token * x, b.y),
    "learned-bias": lambda x, b: _ce(x + b.bias, b.y),
    "masked-vocabulary": lambda x, b: _ce(x.masked_fill(torch.arange(V) >= 20, -1e9), b.y.clamp(max=19)),
    "where": lambda x, b: _ce(torch.where(b.mask.unsqueeze(-1), x, x.detach() * 0.5), b.y),
    "infinite-slice": lambda x, b: _ce(x.masked_fill(torch.arange(V) >= V // 4, float("-inf")), b.y.clamp(max=V // 4 - 1)),
    "z-loss": lambda x, b: _ce(x, b.y) + 1e-2 * torch.logsumexp(x, dim=-1).square().mean(),
    "logsumexp-keepdim": lambda x, b: (x - x.logsumexp(-1, keepdim=True)).square().mean(),
    "own-log-softmax": _own_log_softmax,
    "entropy": _entropy,
    "softmax-method": lambda x, b: x.softmax(dim=-1).square().sum(dim=-1).mean(),
    "softmax-kwargs": lambda x, b: torch.softmax(input=x, dim=2, dtype=torch.float64).pow(3).sum().to(x.dtype),
    "max": lambda x, b: (x.max(dim=-1).values - x.logsumexp(-1)).mean() + x.max(-1, keepdim=True)[0].sum(),
    "means": lambda x, b: x.mean(dim=1).square().sum() + x.square().mean() + x.mean(-1, keepdim=True).square().sum(),
    "two-logits": lambda x, b: _ce(1.5 * x - 0.5 * x.detach(), b.y),
    "in-place": lambda x, b: _ce(x.mul_(b.temperature), b.y) + F.relu(x, True).mean(),
    "in-place-then-custom-function-free": lambda x, b: _ce(x.float().double().to(x.dtype).clamp_(-1, 1), b.y),
    "retained-and-functional-gradients": _grad_of_logits,
}  # fmt: skip
# ... and these gather the logits, because they are about more than that.
GATHERED: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "class-weights": lambda x, b: _ce(x, b.gaps, weight=b.bias.detach().abs()),
    "probability-targets": lambda x, b: F.cross_entropy(x.view(-1, V), b.probabilities),
    "bmm": lambda x, b: (x @ x.mT).tanh().mean(),
    "topk": lambda x, b: x.topk(3, dim=-1).values.square().sum(),
    "one-logit": lambda x, b: x[..., 5].square().sum() + x[:, :, 2:7].sum(),
    "vocabulary-by-mask": lambda x, b: x[:, :, torch.arange(V) % 3 == 0].square().mean(),
    "cat": lambda x, b: _ce(torch.cat([x, x.flip(1)], dim=0), torch.cat([b.y, b.y.flip(1)])),
    "kl-div": _distillation,
    "nll-loss": lambda x, b: F.nll_loss(F.log_softmax(x, -1).flatten(0, 1), b.gaps.flatten()),
    "reshape-through-the-vocabulary": lambda x, b: (x.view(B, -1, 2).square()[..., 0] * 3).sum(),
    "softmax-over-tokens": lambda x, b: F.softmax(x, dim=1).square().sum(),
    "linear": lambda x, b: F.linear(x, b.weight.detach().t()).square().mean(),
    "dropout": lambda x, b: _ce(F.dropout(x, 0.0), b.y) + x.norm(),
    "in-place-masking": _in_place_masking,
    "in-place-on-a-view": _in_place_on_a_view,
    "in-place-then-custom-function": _in_place_then_custom_function,
    "custom-function": lambda x, b: Through.apply(x) + _ce(x, b.y),
    "custom-function-returns-logits": lambda x, b: _ce(Clone.apply(x), b.y),
    "custom-function-returns-its-input": lambda x, b: _ce(Identity.apply(x), b.y),
    "metric-before-the-loss": _metric_before_the_loss,
    "hooks": _hooked,
    "backward-of-logits": lambda x, b: torch.stack([x, x.detach()]).sum(),
}  # fmt: skip
TAILS = PARALLEL | GATHERED


def _run(b: Batch, tail: Callable[[Tensor, Batch], Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Return the loss and the gradients of x, the whole weight, and what else is learned."""
    parts, part = (1, 0) if group is None else (group.size(), group.rank())
    x, weight = b.x.clone().requires_grad_(), b.weight.chunk(parts)[part].clone().requires_grad_()
    leaves = [x, b.temperature, b.per_token, b.bias]
    logits = VocabParallelLogits.from_local(F.linear(copy_to(x, group), weight), group)
    loss = tail(logits, b)
    assert type(loss) is Tensor
    loss.backward()
    grads = [leaf.grad if leaf.grad is not None else torch.zeros(()) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    assert weight.grad is not None
    return [loss.detach(), gather_from(weight.grad, 0, group, grad="slice"), *grads]


def tails_agree(group: ProcessGroup, names: list[str], dtype: torch.dtype, rtol: float, atol: float) -> None:
    whole_gathers = 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal whole_gathers
        whole_gathers += 1
        return gather_from(*args, **kwargs)

    vocab.gather_from = counted  # type: ignore[assignment]
    try:
        failures = []
        for name in names:
            whole_gathers = 0
            try:
                expected, actual = (_run(Batch(dtype), TAILS[name], g) for g in (None, group))
                for want, got in zip(expected, actual, strict=True):
                    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
                assert (whole_gathers > 0) == (name in GATHERED), f"gathered {whole_gathers} times"
            except Exception as error:
                import traceback

                failures.append(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}")
        assert not failures, f"{len(failures)} of {len(names)}:\n" + "\n".join(failures)
    finally:
        vocab.gather_from = gather_from
