"""The scans against the recurrence written out, in float64: values, gradients, documents, states to begin with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, softplus

from kenotron.models import scan
from kenotron.models.scan import causal_conv, chunk_scan, selective_scan


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def recurrence(decay: Tensor, taken: Tensor, read: Callable[[Tensor, int], Tensor], state: Tensor, starts: Tensor | None):
    """Walk through time. ``decay`` and ``taken``: [B, S, …], of the state's shape after the first two."""
    found = []
    for t in range(taken.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t].view(-1, *[1] * (state.ndim - 1)), 0.0, state)
        state = decay[:, t] * state + taken[:, t]
        found.append(read(state, t))
    return torch.stack(found, 1), state


def check(ours, expected, inputs: list[Tensor]) -> None:
    weights = [torch.randn_like(value) for value in expected]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(list(values), inputs, weights, retain_graph=True) for values in (ours, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


STARTS = {
    "one document": None,
    "documents": torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]]),
}


@pytest.mark.usefixtures("one_seed_and_one_thread")
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize("positions_at_a_time", [1, 4, 100])
def test_the_scan_of_mamba_is_its_recurrence(monkeypatch, documents, positions_at_a_time):
    batch, length, channels, states = 2, 11, 5, 3
    monkeypatch.setattr(scan, "_CHUNK_BYTES", positions_at_a_time * batch * channels * states * 8)
    starts = STARTS[documents] if STARTS[documents] is None else STARTS[documents].bool()
    x, step, rate = leaf(batch, length, channels), leaf(batch, length, channels), leaf(channels, states)
    B, C, state = leaf(batch, length, states), leaf(batch, length, states), leaf(batch, channels, states)
    dt, A = softplus(step), -rate.exp()
    ours = selective_scan(x, dt, A, B, C, initial_BIN=state, starts_BS=starts)
    decay, taken = torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)
    expected = recurrence(decay, taken, lambda h, t: (h * C[:, t].unsqueeze(1)).sum(-1), state, starts)
    check(ours, expected, [x, step, rate, B, C, state])


@pytest.mark.usefixtures("one_seed_and_one_thread")
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_scan_of_mamba_2_is_its_recurrence(documents, chunk):
    batch, length, heads, size, groups, states = 2, 11, 4, 3, 2, 5
    starts = STARTS[documents] if STARTS[documents] is None else STARTS[documents].bool()
    x, step, rate = leaf(batch, length, heads, size), leaf(batch, length, heads), leaf(heads)
    B, C, state = leaf(batch, length, groups, states), leaf(batch, length, groups, states), leaf(batch, heads, size, states)
    dt, A = softplus(step), -rate.exp()
    ours = chunk_scan(x, dt, A, B, C, initial_BHPN=state, starts_BS=starts, chunk=chunk)
    B_, C_ = (t.repeat_interleave(heads // groups, 2) for t in (B, C))
    decay = torch.exp(dt * A)[..., None, None].expand(batch, length, heads, size, states)
    taken = (dt.unsqueeze(-1) * x).unsqueeze(-1) * B_.unsqueeze(3)
    expected = recurrence(decay, taken, lambda h, t: (h * C_[:, t].unsqueeze(2)).sum(-1), state, starts)
    check(ours, expected, [x, step, rate, B, C, state])


@pytest.mark.usefixtures("one_seed_and_one_thread")
def test_fast_decays_lose_no_digits():
    """Differences of long sums would: 64 steps of -100 leave nothing of a neighbour's -0.001 in float32."""
    steps = torch.full((1, 64, 1), 0.001)
    steps[0, :32] = 100.0
    x, B, C = torch.randn(1, 64, 1, 4), torch.randn(1, 64, 1, 3), torch.randn(1, 64, 1, 3)
    single, _ = chunk_scan(x, steps, torch.tensor([-1.0]), B, C)
    double, _ = chunk_scan(x.double(), steps.double(), torch.tensor([-1.0]).double(), B.double(), C.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_seed_and_one_thread")
def test_the_convolution_sees_what_is_before_and_nothing_of_other_documents():
    x, weight, bias, before = leaf(2, 9, 3), leaf(3, 1, 4), leaf(3), leaf(2, 3, 3)
    whole = conv1d(torch.cat([before, x], 1).transpose(1, 2), weight, bias, groups=3).transpose(1, 2)
    check([causal_conv(x, weight, bias, before)], [whole], [x, weight, bias, before])
    zeros = conv1d(pad(x.transpose(1, 2), (3, 0)), weight, bias, groups=3).transpose(1, 2)
    check([causal_conv(x, weight, bias)], [zeros], [x, weight, bias])
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, [2, 3, 7]] = True
    parts = [
        causal_conv(x[:, :2], weight, bias, before),
        *(causal_conv(part, weight, bias) for part in x[:, 2:].split([1, 4, 2], 1)),
    ]
    check([causal_conv(x, weight, bias, before, starts)], [torch.cat(parts, 1)], [x, weight, bias, before])
