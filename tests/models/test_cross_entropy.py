"""The chunked cross-entropy of a head is that of the whole logits, in value and gradient, and never holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kenotron.models.cross_entropy import linear_cross_entropy

N, H, V = 37, 8, 50

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
    "bias": {"bias": True},
    "ignored word": {"ignore_index": 7},
    "everything": {"z_loss": 0.1, "softcap": 2.0, "scale": 1.7, "bias": True},
}


pytestmark = pytest.mark.usefixtures("one_seed_and_one_thread")


def make_inputs(tokens: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, bias and labels, of which some tokens have none."""
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((tokens, H), (V, H), (V,)))
    labels = torch.randint(0, V, (tokens,))
    labels[1::5] = -100
    labels[2::9] = 7
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels


def whole_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the whole logits, by torch's functions alone."""
    logits = scale * F.linear(hidden, weight, bias).reshape(-1, weight.shape[0])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = labels.flatten() != ignore_index
    z = logits.logsumexp(-1)[counts].square().sum()
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return nll + z_loss * z, z, counts.sum()


def close(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class Recorder(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returned, and how many products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_chunk", [1, 7, N, 1000])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sums_and_gradients_are_those_of_the_whole_logits(options: dict[str, Any], tokens_per_chunk: int) -> None:
    hidden, weight, bias, labels = make_inputs()
    labels[labels == -100] = options.get("ignore_index", -100)
    inputs = [hidden, weight, bias] if "bias" in options else [hidden, weight]
    options = {**options, "bias": bias if "bias" in options else None}
    want = whole_cross_entropy(hidden, weight, labels, **options)
    got = linear_cross_entropy(hidden, weight, labels, max_logits=tokens_per_chunk * V + 3, **options)
    close(tuple(got), tuple(want))
    assert got.num_tokens.dtype == torch.int64
    assert not got.z_sum.requires_grad
    close(torch.autograd.grad(0.7 * got.loss_sum, inputs), torch.autograd.grad(0.7 * want[0], inputs))


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 1, 5)], ids=str)
def test_any_leading_shape_and_stride_is_taken(shape: tuple[int, ...]) -> None:
    _, weight, _, _ = make_inputs()
    hidden = torch.randn(H, *shape, dtype=torch.float64).movedim(0, -1).requires_grad_()
    labels = torch.randint(0, V, shape)
    got, want = (f(hidden, weight, labels) for f in (linear_cross_entropy, whole_cross_entropy))
    close(tuple(got), tuple(want))
    close(torch.autograd.grad(got[0], [hidden, weight]), torch.autograd.grad(want[0], [hidden, weight]))


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (7, 2), (7,)))
    labels = torch.tensor([5, -100, 0])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, z_loss=0.1, softcap=3.0, scale=0.7, max_logits=2 * 7
        ).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_large_logits_lose_no_digits() -> None:
    hidden, weight, _, labels = make_inputs(dtype=torch.float32)
    with torch.no_grad():
        hidden[:, 0] = 2.0**14  # the same large number on each logit of a token, and exact
        weight[:, 0] = 1.0
        weight[:, 1:] = weight[:, 1:].mul(64).round()
        hidden[:, 1:] = hidden[:, 1:].mul(8).round() / 512
    got = linear_cross_entropy(hidden, weight, labels)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = whole_cross_entropy(*exact, labels)
    close(got.loss_sum.double(), want[0], 1e-6)
    close(got.z_sum.double(), want[1], 1e-6)
    grads, exact_grads = torch.autograd.grad(got[0], [hidden, weight]), torch.autograd.grad(want[0], exact)
    close([x[:, 1:].double() for x in grads], [x[:, 1:] for x in exact_grads], 1e-5)


def test_words_masked_by_the_bias_get_no_gradient() -> None:
    hidden, weight, bias, labels = make_inputs()
    with torch.no_grad():
        bias[40:] = -torch.inf
    labels = labels.clamp(max=39)
    got, want = (f(hidden, weight, labels, bias=bias, z_loss=0.1) for f in (linear_cross_entropy, whole_cross_entropy))
    close(tuple(got), tuple(want))
    grads = torch.autograd.grad(got[0], [hidden, weight])
    close(grads, torch.autograd.grad(want[0], [hidden, weight]))
    assert grads[1][40:].count_nonzero() == 0


# ---- Tokens without a label, and wrong labels -----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, N])
def test_no_label_at_all_gives_zero_and_no_nan(tokens: int) -> None:
    hidden, weight, bias, labels = make_inputs(tokens)
    got = linear_cross_entropy(hidden, weight, labels.fill_(-100), bias=bias, z_loss=0.1)
    assert [x.item() for x in got] == [0, 0, 0]
    for x, grad in zip((hidden, weight, bias), torch.autograd.grad(got.loss_sum, (hidden, weight, bias)), strict=True):
        assert grad.shape == x.shape
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("wrong", [-1, V, V + 3])
def test_a_label_outside_the_vocabulary_raises(wrong: int) -> None:
    hidden, weight, _, labels = make_inputs()
    labels[4] = wrong
    with pytest.raises(ValueError, match=rf"label {wrong} in a vocabulary of {V}\. Allowed are 0 to {V - 1}, .*=-100"):
        linear_cross_entropy(hidden, weight, labels)
    labels[labels == -100] = wrong
    assert linear_cross_entropy(hidden, weight, labels, ignore_index=wrong).num_tokens == (labels != wrong).sum()


def test_labels_and_options_that_make_no_sense_raise() -> None:
    hidden, weight, _, labels = make_inputs()
    with pytest.raises(ValueError, match=r"Pass labels of shape \(37,\)"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="Set softcap=None"):
        linear_cross_entropy(hidden, weight, labels, softcap=0.0)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own, and no silent cast
        linear_cross_entropy(hidden, weight.float(), labels)


# ---- Types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_lose_no_more_in_many_chunks_than_torch_does_in_one(dtype: torch.dtype) -> None:
    hidden, weight, _, labels = make_inputs(512, dtype)
    inputs = [hidden, weight]
    torchs = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    got = linear_cross_entropy(hidden, weight, labels, max_logits=4 * V)
    assert got.loss_sum.dtype == got.z_sum.dtype == torch.float32
    close(got.loss_sum, torchs, 1e-6)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_grads = torch.autograd.grad(whole_cross_entropy(*exact_inputs, labels)[0], exact_inputs)
    own, theirs = (torch.autograd.grad(loss, inputs) for loss in (got.loss_sum, torchs))
    for x, y, z in zip(own, theirs, exact_grads, strict=True):
        assert x.dtype == dtype
        assert (x - z).norm() <= 1.2 * (y - z).norm()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_runs_the_products_in_its_type_as_those_of_linear(weight_dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make_inputs(dtype=torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    inputs = [hidden, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight, bias)
        got = linear_cross_entropy(hidden, weight, labels, bias=bias, max_logits=7 * V)
    assert got.loss_sum.dtype == torch.float32
    want = F.cross_entropy(logits.float(), labels, reduction="sum")
    close(got.loss_sum, want, 1e-6)
    got_grads, want_grads = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (got.loss_sum, want))
    again = torch.autograd.grad(got.loss_sum, inputs)  # computed once more, and with autocast off by now
    for x, x_again, y, tensor in zip(got_grads, again, want_grads, inputs, strict=True):
        assert x.dtype == tensor.dtype
        close(x, y, 2e-2)
        close(x, x_again, 0.0)


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, _, labels = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels)
    close(tuple(got), tuple(whole_cross_entropy(hidden, weight, labels)))


# ---- What is computed and held --------------------------------------------------------------------------------------


def test_nothing_as_large_as_all_logits_is_ever_made() -> None:
    tokens, words, max_logits = 300, 400, 20_000
    hidden, weight = torch.randn(tokens, H, requires_grad=True), torch.randn(words, H, requires_grad=True)
    bias, labels = torch.randn(words, requires_grad=True), torch.randint(0, words, (tokens,))
    with Recorder() as recorder:
        out = linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1, softcap=5.0, max_logits=max_logits)
        (out.loss_sum / out.num_tokens).backward()
    assert recorder.largest == max_logits
    with Recorder() as recorder:
        whole_cross_entropy(hidden, weight, labels)
    assert recorder.largest == tokens * words  # so it would have been seen


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_only_what_needs_a_gradient_is_computed(wanted: tuple[int, ...]) -> None:
    *inputs, labels = make_inputs()
    for index, x in enumerate(inputs):
        x.requires_grad_(index in wanted)
    with Recorder() as recorder:
        hidden, weight, bias = inputs
        got = linear_cross_entropy(hidden, weight, labels, bias=bias)
    assert recorder.products == 1 + (0 in wanted) + (1 in wanted)
    want = whole_cross_entropy(hidden, weight, labels, bias=bias)
    close(tuple(got), tuple(want))
    assert got.loss_sum.requires_grad == bool(wanted)
    if wanted:
        needing = [inputs[index] for index in wanted]
        close(torch.autograd.grad(got.loss_sum, needing), torch.autograd.grad(want[0], needing))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_loss_is_computed(mode: Any) -> None:
    hidden, weight, _, labels = make_inputs()
    with mode(), Recorder() as recorder:
        got = linear_cross_entropy(hidden, weight, labels)
    assert recorder.products == 1
    assert not got.loss_sum.requires_grad
    close(tuple(got), tuple(whole_cross_entropy(hidden, weight, labels)))


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_can_be_probed_without_values(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        hidden, weight = torch.empty(2, 5, H, requires_grad=True), torch.empty(V, H, requires_grad=True)
        labels = torch.empty(2, 5, dtype=torch.int64)
        got = linear_cross_entropy(hidden, weight, labels, z_loss=0.1, softcap=2.0, max_logits=3 * V)
        got.loss_sum.backward()
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels)
    assert [x.shape for x in got] == [torch.Size()] * 3
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


# ---- In other people's graphs ---------------------------------------------------------------------------------------


def test_a_retained_graph_may_run_backward_again() -> None:
    hidden, weight, bias, labels = make_inputs()
    inputs = [hidden, weight, bias]
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1).loss_sum
    want = torch.autograd.grad(whole_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1)[0], inputs)
    results = [torch.autograd.grad(factor * loss, inputs, retain_graph=True) for factor in (0.0, 2.0, 3.0)]
    for factor, grads in zip((0.0, 2.0, 3.0), results, strict=True):  # nor has a later pass changed an earlier one's
        close(grads, tuple(factor * x for x in want))


def test_a_weight_changed_before_the_second_backward_raises() -> None:
    hidden, weight, _, labels = make_inputs()
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    loss.backward(retain_graph=True)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_tied_to_the_embedding_gets_both_gradients() -> None:
    _, weight, _, labels = make_inputs()
    ids = torch.randint(0, V, labels.shape)
    grads = []
    for cross_entropy in (linear_cross_entropy, whole_cross_entropy):
        weight.grad = None
        for _ in range(2):  # and adds to those of the first microbatch
            hidden = F.embedding(ids, weight).tanh()
            (cross_entropy(hidden, weight, labels)[0] + cross_entropy(hidden * 2, weight, labels)[0]).backward()
        grads.append(weight.grad)
    close(grads[0], grads[1])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_it_may_be_checkpointed(reentrant: bool) -> None:
    hidden, weight, _, labels = make_inputs()

    def loss(hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_cross_entropy(hidden.tanh(), weight, labels, z_loss=0.1, max_logits=7 * V))

    got = checkpoint(loss, hidden, use_reentrant=reentrant)
    want = loss(hidden)
    close(got, want)
    want_grads = torch.autograd.grad(want[0], [hidden, weight])
    got[0].backward()
    close((hidden.grad, weight.grad), want_grads)


def test_a_compiled_caller_gives_the_same() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(H, H, dtype=torch.float64), nn.Linear(H, V, dtype=torch.float64)
    hidden, _, _, labels = make_inputs()

    def loss(hidden: Tensor) -> Tensor:
        out = linear_cross_entropy(body(hidden).tanh(), head.weight, labels, bias=head.bias, max_logits=7 * V)
        return out.loss_sum / out.num_tokens

    parameters = [*body.parameters(), *head.parameters()]
    got, want = torch.compile(loss, backend="eager")(hidden), loss(hidden)
    close(got, want)
    close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))
