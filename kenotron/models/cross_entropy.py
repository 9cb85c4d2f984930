"""The cross-entropy of a linear head, without the logits of all tokens.

A chunk is as many tokens as have ``max_logits`` logits. For each chunk the forward pass

1. multiplies its hidden states by the head's matrix, and goes on in float32 (float64 for float64);
2. finds each token's largest logit, sum of exponentials and label's logit, and puts together what the ranks found where they
   share the vocabulary: one collective of three numbers per token and rank;
3. turns the logits into their gradient, in place;
4. multiplies that by the matrix and by the hidden states: the chunk's own gradient, and its share of the matrix's.

The backward pass is left to multiply by the gradient of the loss, in place. Until then two gradients are kept, one as large as
the hidden states, and one as large as the matrix in float32: so whoever runs several microbatches forward before the first one
backward holds several of them.

Shapes: N tokens, H hidden, V words of this rank's vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kenotron.models.autocast import compute_dtype, is_autocasting
from kenotron.parallel.collectives import Group, all_gather_stack, group_rank, group_size, reduce_from
from kenotron.parallel.vocab import wide
from kenotron.parallel.vocab_weight import VocabularyWeight


class LinearCrossEntropy(NamedTuple):
    """Sums over the tokens that have a label, each 0-dimensional; divided by ``num_tokens`` they are means."""

    loss_sum: Tensor  #: negative log-likelihood + ``z_loss`` · logsumexp(logits)², in float32 (float64 for float64)
    z_sum: Tensor  #: logsumexp(logits)² alone, of the same type and without a gradient
    num_tokens: Tensor  #: int64


@torch.compiler.disable  # traced, each chunk would be 75 nodes of the graph
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    group: Group = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    max_logits: int = 2**24,
) -> LinearCrossEntropy:
    """Return the summed cross-entropy of ``softcap · tanh(scale · (hidden @ weight.T + bias) / softcap)``.

    Under autocast products run in its type, as those of ``nn.Linear`` do. A second backward pass through a retained graph
    computes everything again; there is no gradient of the gradient.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, of the type of ``hidden`` except under autocast. With ``group`` this rank's rows: as many on each
            rank, in the order of the ranks.
        labels: ``[...]``, int64: words of the whole vocabulary, or ``ignore_index``.
        bias: ``[V]``, cut as ``weight`` is.
        group: the ranks that share the vocabulary. All give the same ``hidden`` and ``labels``, and get the same sums and the
            whole gradient of ``hidden``.
        z_loss: weight of logsumexp(logits)² (PaLM, arXiv:2204.02311, section 5).
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118, section 2); ``None``: there is none, and no tanh.
        scale: multiplies the logits.
        max_logits: how many of a rank's logits exist at once, though never fewer than one token's; the default is 64 MiB in
            float32. Products are slow where this makes chunks of fewer than a few hundred tokens.

    Raises:
        ValueError: ``labels`` are not one per hidden state, ``softcap`` is not positive, or a label is outside the vocabulary
            (on CUDA: a device-side assert, as in torch).
    """
    if isinstance(weight, VocabularyWeight):  # a head's, under tensor parallelism
        group = weight.group
        weight = weight.own
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for hidden states of shape {tuple(hidden.shape)}: each hidden state needs "
            f"one. Pass labels of shape {tuple(hidden.shape[:-1])}."
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: it must be positive. Set softcap=None to leave the logits as they are.")
    label_N = labels.reshape(-1)
    ignored_N = label_N == ignore_index
    label_N = label_N.masked_fill(ignored_N, 0)
    _check_labels(label_N, weight.shape[0] * group_size(group), ignore_index)
    # ctx.needs_input_grad would not tell of no_grad, and within a Function gradients are always off.
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    how = _How(wanted, compute_dtype(hidden) if is_autocasting(hidden) else None, group, z_loss, softcap, scale, max_logits)
    loss, z = _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, label_N, ignored_N, how)
    return LinearCrossEntropy(loss, z, ignored_N.logical_not().sum())


class _How(NamedTuple):
    wanted: list[bool]  #: whether hidden states, weight and bias need a gradient
    autocast: torch.dtype | None  #: the type of the products, if it isn't that of the tensors
    group: Group
    z_loss: float
    softcap: float | None
    scale: float
    max_logits: int


def _check_labels(label_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for a label outside [0, vocabulary), without the host waiting for a device."""
    try:
        # Looked up in one element that stands for all: a CPU raises, CUDA's kernel asserts, and mere shapes pass.
        label_N.new_zeros(1).expand(vocabulary).index_select(0, label_N)
    except IndexError:
        wrong = int(label_N[(label_N < 0) | (label_N >= vocabulary)][0])
        raise ValueError(
            f"label {wrong} in a vocabulary of {vocabulary}. Allowed are 0 to {vocabulary - 1}, and for tokens "
            f"that don't count ignore_index={ignore_index}."
        ) from None


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.how = inputs
        ctx.save_for_backward(*tensors)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        loss, z, ctx.gradients = _sums_and_gradients(*tensors, how=ctx.how)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # They are changed in place and given away, so a second pass through a retained graph finds none.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _sums_and_gradients(*ctx.saved_tensors, how=ctx.how)[-1]
        own = zip(gradients, ctx.dtypes, strict=True)
        return *(None if x is None else x.mul_(grad).to(dtype) for x, dtype in own), None, None, None


def _sums_and_gradients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, label_N: Tensor, ignored_N: Tensor, *, how: _How
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the loss, z, and the gradients of the loss by the first three tensors, those that are wanted."""
    if how.autocast is not None:
        hidden_NH, weight_VH = hidden_NH.to(how.autocast), weight_VH.to(how.autocast)
        bias_V = None if bias_V is None else bias_V.to(how.autocast)
    tokens, vocabulary, exact = hidden_NH.shape[0], weight_VH.shape[0], wide(hidden_NH)
    grad_hidden = torch.empty_like(hidden_NH) if how.wanted[0] else None
    grad_weight = torch.zeros_like(weight_VH, dtype=exact) if how.wanted[1] else None
    grad_bias = hidden_NH.new_zeros(vocabulary, dtype=exact) if how.wanted[2] else None
    column_N = label_N - group_rank(how.group) * vocabulary
    elsewhere_N = (column_N < 0) | (column_N >= vocabulary)
    column_N.masked_fill_(elsewhere_N, 0)
    nll_N, lse_N = hidden_NH.new_empty(2, tokens, dtype=exact)

    step = max(1, how.max_logits // vocabulary)
    step -= step % 128 if step > 128 else 0  # whole tiles of a matrix product
    memory = hidden_NH.new_empty(min(step, tokens), vocabulary)
    for rows in (slice(start, min(start + step, tokens)) for start in range(0, tokens, step)):
        hidden, product = hidden_NH[rows], memory[: rows.stop - rows.start]
        column, elsewhere, ignored = column_N[rows, None], elsewhere_N[rows], ignored_N[rows]
        x, tanh = _logits(hidden, weight_VH, bias_V, product, how)
        picked = x.gather(1, column).squeeze(1).masked_fill_(elsewhere, 0.0)
        nll_N[rows], lse_N[rows], log_share = _exponentiate(x, picked, how.group)
        if not any(how.wanted):
            continue
        # softmax · (1 + 2 · z_loss · logsumexp) - onehot, and nothing for a token without a label
        factor = log_share.exp_().mul_(1 + 2 * how.z_loss * lse_N[rows]).masked_fill_(ignored, 0.0)
        onehot = (elsewhere | ignored).logical_not().to(exact)
        x.mul_(factor.unsqueeze(1)).scatter_add_(1, column, -onehot.unsqueeze(1))
        if tanh is not None:
            x.addcmul_(x, tanh.square_(), value=-1.0)  # the derivative of tanh is 1 - tanh²
        if grad_bias is not None:
            grad_bias.add_(x.sum(0), alpha=how.scale)
        product = x if x.dtype == product.dtype else product.copy_(x)
        if grad_hidden is not None:
            grad_hidden[rows].addmm_(product, weight_VH, beta=0, alpha=how.scale)
        if grad_weight is not None and grad_weight.dtype == product.dtype:
            grad_weight.addmm_(product.t(), hidden, alpha=how.scale)
        elif grad_weight is not None:
            grad_weight.add_(product.t() @ hidden, alpha=how.scale)

    z = lse_N.masked_fill_(ignored_N, 0.0).square_().sum()
    loss = nll_N.masked_fill_(ignored_N, 0.0).sum() + how.z_loss * z
    return loss, z, [None if grad_hidden is None else reduce_from(grad_hidden, how.group), grad_weight, grad_bias]


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out_NV: Tensor, how: _How
) -> tuple[Tensor, Tensor | None]:
    """Return the logits in float32 at least, in the memory of ``out`` if they can be, and the tanh of capped ones."""
    added, beta = (out_NV, 0.0) if bias_V is None else (bias_V, how.scale)
    torch.addmm(added, hidden_NH, weight_VH.t(), beta=beta, alpha=how.scale, out=out_NV)
    x = out_NV.to(wide(out_NV))
    if how.softcap is None:
        return x, None
    tanh = x.div_(how.softcap).tanh_()
    return tanh * how.softcap, tanh


def _exponentiate(x_NV: Tensor, picked_N: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exp(logit - peak) in place; return nll, logsumexp, and log of what makes a softmax of the former.

    Args:
        picked_N: the label's logit, 0 where another rank has it.
    """
    # Where a bias masks all of a rank's words with -inf, the difference to their peak must not be nan.
    peak = x_NV.amax(1).clamp_(min=torch.finfo(x_NV.dtype).min)
    total = x_NV.sub_(peak.unsqueeze(1)).exp_().sum(1)
    peaks, totals, picks = all_gather_stack(torch.stack([peak, total, picked_N]), group).unbind(1)
    top = peaks.amax(0)
    log_sum = (totals * (peaks - top).exp()).sum(0).log()
    # The peaks are subtracted from each other: added to log_sum, a large one would take its digits.
    return log_sum - (picks.sum(0) - top), top + log_sum, peak - top - log_sum
