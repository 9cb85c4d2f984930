"""User code on vocabulary-parallel logits gives what it gives on the whole logits of a single process."""

from __future__ import annotations

import copy
import io
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kenotron.parallel import logits as logits_module
from kenotron.parallel import vocab
from kenotron.parallel.collectives import Group, copy_to, gather_from
from kenotron.parallel.logits import VocabParallelLogits
from kenotron.parallel.vocab import vocab_parallel_embedding

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
        self.per_token = (torch.rand(B, S, 1, generator=generator) + 0.5).to(dtype).requires_grad_()
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


def _hf(logits: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss  # here, so that only the ranks of these cases import it

    return ForCausalLMLoss(logits, labels, V, **options)


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


def _in_place_on_a_part(x: Tensor, b: Batch) -> Tensor:
    x[..., 3:6].mul_(b.temperature)
    with torch.no_grad():
        x.argmax(-1)
    return _ce(x, b.y)


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
    x.register_hook(lambda grad: torch.cumsum(grad, -1))
    return _ce(x, b.y)


def _hooked_module(x: Tensor) -> Tensor:
    module = nn.Identity()
    module.register_full_backward_hook(lambda _, grad_in, grad_out: (grad_out[0] * 2,))
    return module(x)


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
    "transformers": lambda x, b: _hf(x, b.gaps),
    "transformers-num-items": lambda x, b: _hf(x, b.gaps, num_items_in_batch=torch.tensor(9)),
    "transformers-shift-labels": lambda x, b: _hf(x, None, shift_labels=b.gaps),
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
    "masked-mean": lambda x, b: (F.cross_entropy(x.mT, b.y, reduction="none") * b.mask).sum() / b.mask.sum(),
    "rows-by-mask": lambda x, b: F.cross_entropy(x[b.gaps != -100], b.gaps[b.gaps != -100]),
    "rows-by-index": lambda x, b: _ce(x[:, torch.tensor([0, 2])], b.y[:, [0, 2]]),
    "chunked": _chunked,
    "rows-iterated": lambda x, b: sum(F.cross_entropy(row, t) for row, t in zip(x, b.y, strict=True)),
    "soft-capping": lambda x, b: _ce(torch.tanh(x / 3.0) * 3.0, b.y),
    "learned-temperature": lambda x, b: _ce(x / b.temperature, b.y),
    "temperature-per-token": lambda x, b: _ce(b.per_token * x, b.y),
    "learned-bias": lambda x, b: _ce(x + b.bias, b.y),
    "masked-vocabulary": lambda x, b: _ce(x.masked_fill(torch.arange(V) >= 20, -1e9), b.y.clamp(max=19)),
    "where": lambda x, b: _ce(torch.where(b.mask.unsqueeze(-1), x, x.detach() * 0.5), b.y),
    "infinite-slice": lambda x, b: _ce(x.masked_fill(torch.arange(V) >= 6, -torch.inf), b.y.clamp(max=5)),
    "z-loss": lambda x, b: _ce(x, b.y) + 1e-2 * torch.logsumexp(x, dim=-1).square().mean(),
    "logsumexp-keepdim": lambda x, b: (x - x.logsumexp(-1, keepdim=True)).square().mean(),
    "own-log-softmax": _own_log_softmax,
    "entropy": _entropy,
    "softmax-method": lambda x, b: x.softmax(dim=-1).square().sum(dim=-1).mean(),
    "softmax-kwargs": lambda x, b: torch.softmax(input=x, dim=2, dtype=torch.float64).pow(3).sum().to(x.dtype),
    "max": lambda x, b: (x.max(dim=-1).values - x.logsumexp(-1)).mean() + x.max(-1, keepdim=True)[0].sum(),
    "means": lambda x, b: x.mean(dim=1).square().sum() + x.square().mean() + x.mean(-1, keepdim=True).square().sum(),
    "two-logits": lambda x, b: _ce(1.5 * x - 0.5 * x.detach(), b.y),
    "in-place": lambda x, b: _ce(F.relu(x.mul_(b.temperature).clamp_(-3, 3), inplace=True), b.y),
    "in-place-on-a-copy": lambda x, b: _ce(x.clone().div_(2.0) + x, b.y),
    "gradients-of-logits": _grad_of_logits,
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
    "in-place-on-a-part": _in_place_on_a_part,
    "in-place-then-custom-function": _in_place_then_custom_function,
    "custom-function": lambda x, b: Through.apply(x) + _ce(x, b.y),
    "custom-function-returns-logits": lambda x, b: _ce(Clone.apply(x), b.y),
    "custom-function-returns-its-input": lambda x, b: _ce(Identity.apply(x), b.y),
    "metric-before-the-loss": _metric_before_the_loss,
    "backward-hooks": lambda x, b: _ce(_hooked_module(x), b.y),
    "hooks": _hooked,
    "backward-of-logits": lambda x, b: torch.stack([x, x.detach()]).sum(),
}  # fmt: skip
TAILS = PARALLEL | GATHERED


@contextmanager
def whole_gathers() -> Iterator[list[int]]:
    """Count how often the whole logits are gathered."""
    count = [0]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        return gather_from(*args, **kwargs)

    logits_module.gather_from = counted  # type: ignore[assignment]
    try:
        yield count
    finally:
        logits_module.gather_from = gather_from


def _logits(b: Batch, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return the head's input, its local weight and the logits."""
    parts, part = (1, 0) if group is None else (group.size(), group.rank())
    x, weight = b.x.clone().requires_grad_(), b.weight.chunk(parts)[part].clone().requires_grad_()
    return x, weight, VocabParallelLogits.from_local(F.linear(copy_to(x, group), weight), group)


def _run(b: Batch, tail: Callable[[Tensor, Batch], Tensor], group: Group) -> list[Tensor]:
    """Return the loss and the gradients of the whole weight, of x, and of what else is learned."""
    x, weight, logits = _logits(b, group)
    loss = tail(logits, b)
    assert type(loss) is Tensor
    loss.backward()
    assert weight.grad is not None
    leaves = (x, b.temperature, b.per_token, b.bias)
    grads = [leaf.grad if leaf.grad is not None else torch.zeros(()) for leaf in leaves]
    return [loss.detach(), gather_from(weight.grad, 0, group, grad="slice"), *grads]


def tails_agree(group: ProcessGroup, names: list[str], dtype: torch.dtype, rtol: float, atol: float) -> None:
    """Run all tails, so that one that fails does not hide the others."""
    failures = []
    for name in names:
        try:
            expected = _run(Batch(dtype), TAILS[name], None)
            with whole_gathers() as count:
                actual = _run(Batch(dtype), TAILS[name], group)
            for want, got in zip(expected, actual, strict=True):
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
            assert (count[0] > 0) == (name in GATHERED), f"the logits were gathered {count[0]} times"
        except Exception:
            failures.append(f"{name}: {traceback.format_exc()}")
    assert not failures, f"{len(failures)} of {len(names)}:\n" + "\n".join(failures)


def all_ignored(group: ProcessGroup) -> None:
    """Without any target the mean is nan and the sum is 0, as in torch, and the gradients are 0."""
    b = Batch()
    none = torch.full_like(b.y, -100)
    x, _, logits = _logits(b, group)
    assert _ce(logits, none).isnan()
    assert _ce(logits[:, :0], none[:, :0]).isnan()  # nor without any token
    _ce(logits, none, reduction="sum").backward()
    assert x.grad is not None
    assert x.grad.eq(0).all()


def rows_without_any_logit(group: ProcessGroup) -> None:
    b, found = Batch(), []
    for g in (None, group):
        x, _, logits = _logits(b, g)
        logits = logits.masked_fill(b.mask.unsqueeze(-1), -torch.inf)
        lse = logits.logsumexp(-1)
        lse.masked_fill(b.mask, 0.0).sum().backward()
        found.append((lse.detach(), x.grad, _ce(logits, b.y, reduction="none").isnan()))
    torch.testing.assert_close(found[1], found[0])


def large_logits_and_nan(group: ProcessGroup) -> None:
    b = Batch(torch.float32, scale=3e3)
    for tail in ("flat", "own-log-softmax", "smoothing"):
        for want, got in zip(_run(b, TAILS[tail], None), _run(b, TAILS[tail], group), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    b.weight[V - 1, 0] = float("nan")
    _, _, logits = _logits(b, group)
    assert _ce(logits, b.y).isnan()
    assert logits.argmax(-1).eq(V - 1).all()


def low_precision(group: ProcessGroup, autocast: bool) -> None:
    """bfloat16 logits: dtypes are torch's, and the loss is nearer to that in float64 than torch's own."""
    b = Batch(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (_, _, whole), (x, _, logits) = _logits(b, None), _logits(b, group)
        assert whole.dtype == logits.dtype == torch.bfloat16
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}):
            want, got = _ce(whole, b.gaps, **options), _ce(logits, b.gaps, **options)
            exact = _ce(whole.double(), b.gaps, **options)
            assert got.dtype == want.dtype
            assert (got - exact).abs().max() <= (want - exact).abs().max() + 1e-6 * exact.abs().max()
        for function in (F.softmax, F.log_softmax, torch.softmax, torch.logsumexp, torch.sum, torch.mean):
            want, got = function(whole, dim=-1), function(logits, dim=-1)
            exact = function(whole.double(), dim=-1)
            assert got.dtype == want.dtype
            assert (_plain(got) - exact).abs().max() <= (want - exact).abs().max() + 1e-6 * exact.abs().max()
        loss = _hf(logits, b.gaps)
    loss.backward()
    assert x.grad is not None
    expected = torch.autograd.grad(_hf(whole, b.gaps), whole)[0].double() @ b.weight.double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=4e-2, atol=2e-3)  # the shares are summed in bfloat16


def _plain(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, VocabParallelLogits) else x


def _answers(x: Tensor, b: Batch) -> dict[str, Any]:
    """What a user may ask of logits when there is nothing to learn."""
    from torchmetrics.classification import MulticlassAccuracy
    from torchmetrics.text import Perplexity

    written, viewed, capped = x.clone(), x.clone(), x.clone()
    written[:, 0] = 0
    written /= 2
    viewed.view(-1, V)[0] = 7
    F.relu(capped, inplace=True)
    accuracy, perplexity = MulticlassAccuracy(V, sync_on_compute=False), Perplexity(ignore_index=-100, sync_on_compute=False)
    accuracy.update(x.view(-1, V), b.y.view(-1))
    perplexity.update(x.float(), b.gaps)
    stored = io.BytesIO()
    torch.save(x.detach(), stored)
    stored.seek(0)
    rows = torch.tensor([0, 2])
    return {
        "shape": (x.shape, x.size(-1), len(x), x.ndim, x.numel(), x.dtype, x.device, x.is_floating_point()),
        "argmax": (x.argmax(dim=-1), torch.argmax(x, 2, keepdim=True), x.argmax(axis=-1), x.transpose(1, 2).argmax(1)),
        "max": tuple(x.max(-1)) + tuple(torch.max(x, dim=-1, keepdim=True)),
        "metrics": (accuracy.compute(), perplexity.compute()),
        "comparisons": (x > 0.3, ~(x > 0.3), (x > 0).sum(-1), torch.isnan(x).any(), torch.equal(x, x), x == x),
        "arithmetic": (1 - x, 1 / (x + 100), 2 ** x.clamp(max=1), x // 2, x % 2, torch.tensor(2.0) * x),
        "casts": (x.half(), x.to(torch.float64), x.type_as(rows), x.double().to(x), x.cpu()),
        "new": (torch.zeros_like(x), x.new_zeros(3), x.new_full((2,), 3.0)),
        "basic indices": (x[:, -1], x[0], x[None, ..., :], x[0, 0, 0], x[..., :V], x[..., : V // 2], x[..., None]),
        "tensor indices": (x[b.mask], x[b.mask, :], x[b.mask[:, 0], ...], x[rows, :, :], x[[0, 1]], x[..., rows, :],
                           x[rows, rows], x[rows, :, rows], x.mT[rows], x[True], x[torch.tensor(1)], x[:, None, rows]),
        "shapes": (x.unflatten(-1, (2, -1)), x.view(-1), x[:1].squeeze(0), x[:1].squeeze(), x.unsqueeze(-1), x[0].T,
                   x[:1].expand(4, -1, -1), x.repeat(2, 1, 1), x.view_as(x), x.transpose(0, 2)),
        "reductions": (x.std(-1), x.mean(1), x.sum((0, 2)), x.sum(-1, keepdim=True), x.sum(), x.amax(-1), x.norm()),
        "picked": (x.gather(-1, b.y[..., None]), x.take_along_dim(b.y[..., None], -1), x.topk(3).indices),
        "parts": (torch.stack([row.logsumexp(-1) for row in x]), torch.cat([c.argmax(-1) for c in x.split(2, 1)], 1)),
        "written": (written, viewed, capped),
        "out": (x.detach().numpy().shape, x[0, 0].detach().round().tolist(), x[0, 0, 0].item()),
        "copies": (torch.load(stored), pickle.loads(pickle.dumps(x.detach())), copy.deepcopy(x.detach())),
    }  # fmt: skip


def answers_agree(group: ProcessGroup, mode: str) -> None:
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[mode]
    b = Batch(torch.float32)
    with context():
        (_, _, whole), (_, _, logits) = _logits(b, None), _logits(b, group)
        expected, actual = _answers(whole, b), _answers(logits, b)
        for topic, wants in expected.items():
            for index, (want, got) in enumerate(zip(wants, actual[topic], strict=True)):
                if isinstance(want, Tensor):
                    message = f"{topic} {index}: {got} is not {want}"
                    torch.testing.assert_close(_plain(got), want, rtol=1e-5, atol=1e-6, msg=message)
                else:
                    assert type(got) is type(want), (topic, index)
                    assert got == pytest.approx(want) if isinstance(want, float) else got == want, (topic, index)


def nothing_is_gathered_for_a_question(group: ProcessGroup) -> None:
    _, _, logits = _logits(Batch(), group)
    with whole_gathers() as count:
        shown = [repr(logits), str(logits), f"{logits}"]
        assert all("shape=(3, 5, 24)" in s for s in shown)
        assert isinstance(logits, Tensor)
        assert (logits.requires_grad, logits.grad, logits.is_leaf) == (True, None, False)
        assert logits.float().dtype == torch.float32
        assert "sum" in dir(logits)
        assert len({logits: 1}) == 1
        assert logits.grad_fn is not None
        assert not logits.detach().requires_grad
        assert logits.double() is logits  # as in torch, when there is nothing to do
    assert count[0] == 0


def what_cannot_be_is_refused(group: ProcessGroup) -> None:
    b = Batch()
    _, _, logits = _logits(b, group)
    with pytest.raises(IndexError):
        _ce(logits, b.y.masked_fill(b.mask, V))
    with pytest.raises(IndexError):
        _ce(logits, b.y.masked_fill(b.mask, -1))
    with pytest.raises(IndexError):
        logits.gather(-1, b.y[..., None] + V)
    with pytest.raises(NotImplementedError, match="full_tensor"):
        logits.requires_grad_()
    with pytest.raises(NotImplementedError, match="full_tensor"):
        logits.data = torch.zeros(3, 5, 24)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        F.cross_entropy(logits.flatten(0, 1), b.y[0])  # torch's own error for torch's own rule


class Head(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, len(weight), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.body.weight.copy_(torch.eye(H))
            self.body.bias.zero_()

    def split(self, group: ProcessGroup) -> Head:
        self.head.register_forward_pre_hook(lambda _, args: (copy_to(args[0], group),))
        self.head.register_forward_hook(lambda _, args, out: VocabParallelLogits.from_local(out, group))
        return self

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x).tanh())
        return _ce(logits, labels), logits


def compiled_model(group: ProcessGroup) -> None:
    b = Batch(torch.float32)
    whole, split = Head(b.weight), Head(b.weight.chunk(group.size())[group.rank()]).split(group)
    (want, _), (got, _) = whole(b.x, b.gaps), torch.compile(split, backend="aot_eager")(b.x, b.gaps)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(split.body.weight.grad, whole.body.weight.grad)


def checkpointed_model(group: ProcessGroup, reentrant: bool, loss_inside: bool) -> None:
    b, grads = Batch(torch.float32), []
    for parts, part in ((1, 0), (group.size(), group.rank())):
        model = Head(b.weight.chunk(parts)[part])
        model = model if parts == 1 else model.split(group)
        hidden = model.body(b.x)
        if loss_inside:
            loss = checkpoint(lambda h, m=model: _ce(m.head(h), b.y), hidden, use_reentrant=reentrant)
        else:
            loss = _ce(checkpoint(model.head, hidden, use_reentrant=reentrant), b.y)
        loss.backward()
        grads.append(model.body.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


def fully_sharded_model(group: ProcessGroup) -> None:
    """FSDP hooks the outputs of every module; 2 × 2 ranks, all with the same batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, b = mesh["tp"].get_group(), Batch(torch.float32)
    whole, split = Head(b.weight), Head(b.weight.chunk(2)[tp.rank()]).split(tp)
    for module in (split.head, split):
        fully_shard(module, mesh=mesh["dp"])
    with whole_gathers() as count:
        want, (got, logits) = whole(b.x, b.gaps)[0], split(b.x, b.gaps)
        got = got + _ce(logits, b.y)
        want = want + _ce(whole(b.x, b.gaps)[1], b.y)
        want.backward()
        got.backward()
    assert count[0] == 0
    torch.testing.assert_close(got, want)
    grad = split.body.weight.grad
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), whole.body.weight.grad)


def embeddings_agree(group: ProcessGroup, dtype: torch.dtype, padding_idx: int | None, options: dict[str, Any]) -> None:
    b = Batch()
    width = V // group.size()
    ids = torch.cat([b.y, b.y[:, :1], torch.full((B, 2), 5)], 1).to(dtype)  # some tokens more than once
    whole = b.weight.clone().requires_grad_()
    local = b.weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    want = F.embedding(ids, whole, padding_idx, **options)
    got = vocab_parallel_embedding(ids, local, group.rank() * width, group, padding_idx=padding_idx, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    factor = torch.rand(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    (want * factor).sum().backward()
    (got * factor).sum().backward()
    assert local.grad is not None
    assert whole.grad is not None
    if options.get("sparse"):
        asked = whole.grad.coalesce().indices().flatten()
        mine = asked[asked // width == group.rank()] % width
        assert local.grad.coalesce().indices().flatten().equal(mine)  # and no row that stands in for others
    expected = whole.grad.to_dense().chunk(group.size())[group.rank()]
    torch.testing.assert_close(local.grad.to_dense(), expected, rtol=1e-12, atol=1e-12)


def ids_outside_the_vocabulary(group: ProcessGroup) -> None:
    weight = Batch().weight.chunk(group.size())[group.rank()]
    for bad in (V, -1):
        with pytest.raises(IndexError):
            vocab_parallel_embedding(torch.tensor([0, bad]), weight, group.rank() * len(weight), group)


def test_user_code_gives_the_loss_and_gradients_of_one_process_in_float64(ranks):
    names = [name for name in TAILS if not name.startswith("transformers") and name != "flat"]  # these cast to float32
    ranks(tails_agree, names, torch.float64, 1e-10, 1e-12)


def test_user_code_gives_the_loss_and_gradients_of_one_process_in_float32(ranks):
    ranks(tails_agree, list(TAILS), torch.float32, 3e-6, 3e-6)


def test_user_code_gives_the_same_on_four_ranks(ranks):
    names = "view shifted transposed masked-mean smoothing soft-capping learned-temperature learned-bias infinite-slice"
    names += " own-log-softmax entropy max means topk class-weights in-place-masking custom-function hooks"
    ranks(tails_agree, names.split(), torch.float64, 1e-10, 1e-12, size=4)


def test_rows_worked_through_in_pieces_give_the_same(ranks):
    ranks(in_pieces)


def in_pieces(group: ProcessGroup) -> None:
    before, vocab.PIECE = vocab.PIECE, 4 * V // group.size()
    try:
        tails_agree(group, ["view", "smoothing", "transposed", "one-row"], torch.float64, 1e-10, 1e-12)
    finally:
        vocab.PIECE = before


def test_no_target_at_all_gives_what_torch_gives(ranks):
    ranks(all_ignored)


def test_rows_that_are_all_masked_give_what_torch_gives(ranks):
    ranks(rows_without_any_logit)


def test_large_logits_lose_no_digits_and_nan_shows(ranks):
    ranks(large_logits_and_nan)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_low_precision_logits_give_torchs_dtypes_and_a_loss_in_float32(ranks, autocast):
    ranks(low_precision, autocast)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_metrics_indices_copies_and_writes_agree(ranks, mode):
    ranks(answers_agree, mode)


def test_questions_do_not_communicate(ranks):
    ranks(nothing_is_gathered_for_a_question)


def test_bad_targets_and_changes_of_what_logits_are_raise(ranks):
    ranks(what_cannot_be_is_refused)


def test_a_compiled_model_may_compute_its_loss_from_split_logits(ranks):
    ranks(compiled_model)


@pytest.mark.parametrize("loss_inside", [False, True], ids=["head", "head-and-loss"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_head_gives_the_same_gradients(ranks, reentrant, loss_inside):
    ranks(checkpointed_model, reentrant, loss_inside)


def test_fully_shard_does_not_gather_logits(ranks):
    ranks(fully_sharded_model, size=4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding_idx", [None, 0, V // 2, V - 1, -1])
def test_embedding_gives_the_rows_and_gradients_of_one_process(ranks, size, padding_idx):
    ranks(embeddings_agree, torch.int64, padding_idx, {}, size=size)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=lambda o: next(iter(o)))
def test_embedding_options_see_only_the_tokens_that_were_asked_for(ranks, options):
    ranks(embeddings_agree, torch.int32, 5, options)


def test_embedding_raises_for_ids_outside_the_vocabulary(ranks):
    ranks(ids_outside_the_vocabulary)


def test_embedding_refuses_max_norm():
    with pytest.raises(ValueError, match="max_norm=None"):
        vocab_parallel_embedding(torch.tensor([0]), torch.zeros(2, 2), 0, None, max_norm=1.0)


def test_one_process_keeps_its_plain_tensor():
    local = torch.ones(2, 3)
    assert VocabParallelLogits.from_local(local, None) is local
