"""Blocks of attention against a dense softmax, in every kernel that runs here, and the private torch ops behind them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kenotron.parallel import attention as A
from kenotron.parallel.attention import Mask, attend, attend_backward, choose_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SCALE = 0.3


@pytest.fixture(autouse=True)
def one_thread():
    """What is computed here is small; handing it to several threads costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(length: int, *ends: int) -> Tensor:
    """Return [2, length]: documents that end at ``ends`` and then padding; in the second row they end one earlier."""
    rows = [[sum(i >= end - row for end in ends) for i in range(length)] for row in (0, 1)]
    return torch.tensor(rows).masked_fill_(torch.tensor(rows) == len(ends), -1)


MASKS = {
    "none": Mask(),
    "causal": Mask(causal=True),
    "causal, later queries": Mask(causal=True, offset=17),
    "causal, later keys": Mask(causal=True, offset=-20),
    "window": Mask(causal=True, window=7),
    "window, later queries": Mask(causal=True, window=40, offset=30),
    "documents": Mask(documents=(documents(70, 20, 33, 60), documents(70, 20, 33, 60))),
    "all": Mask(causal=True, window=9, offset=3, documents=(documents(70, 20, 33, 60), documents(70, 23, 36, 63))),
    "all padding": Mask(causal=True, documents=(documents(70), documents(70))),
}


def inputs(dim_v: int = 16, heads: int = 6, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, 70, 16), (2, 2, 70, 16), (2, 2, 70, dim_v), (2, heads, 70, dim_v)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, computed with the whole matrix of scores."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, 1)) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = mask.offset + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if mask.causal:
        hidden |= distance < 0
    if mask.window is not None:
        hidden |= distance >= mask.window
    if mask.documents is not None:
        mine, theirs = mask.documents[0][:, None, :, None], mask.documents[1][:, None, None, :]
        hidden |= (mine != theirs) | (theirs < 0)
    e = torch.exp(scores).masked_fill(hidden, 0.0)
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhij,bhjd->bhid", p, v.repeat_interleave(groups, 1)), total.squeeze(-1).log()


def dense_gradients(dout: Tensor, *qkv: Tensor, mask: Mask, softcap: float | None = None) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    return torch.autograd.grad(dense(*leaves, mask, softcap)[0], leaves, dout)  # type: ignore[arg-type]


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("max_scores", [500, 5000, A.MAX_SCORES], ids=["tiny-tiles", "small-tiles", "one-tile"])
@pytest.mark.parametrize(("backend", "softcap", "dim_v"), [("flash_cpu", None, 16), ("math", None, 8), ("math", 4.0, 24)])
@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients_are_those_of_a_dense_softmax(name, backend, softcap, dim_v, max_scores):
    q, k, v, dout = inputs(dim_v)
    how = {"mask": MASKS[name], "scale": SCALE, "softcap": softcap, "backend": backend, "max_scores": max_scores}
    out, lse = attend(q, k, v, **how)
    close((out, lse), dense(q, k, v, MASKS[name], softcap))
    gradients = attend_backward(dout, q, k, v, out, lse, **how)
    close(gradients, dense_gradients(dout, q, k, v, mask=MASKS[name], softcap=softcap))


@pytest.mark.parametrize("backend", ["flash_cpu", "math"])
@pytest.mark.parametrize("name", ["none", "causal", "all"])
def test_blocks_of_keys_add_up_with_the_output_and_lse_over_all_keys(name, backend):
    q, k, v, dout = inputs()
    mask, result, gradients = MASKS[name], A.empty_result(q, v), tuple(torch.zeros_like(x) for x in (q, k, v))
    blocks = []
    for start, stop in ((0, 11), (11, 50), (50, 70)):
        own = None if mask.documents is None else (mask.documents[0], mask.documents[1][:, start:stop])
        part = Mask(offset=mask.offset - start, causal=mask.causal, window=mask.window, documents=own)
        blocks.append((slice(start, stop), {"mask": part, "scale": SCALE, "backend": backend}))
    for cols, how in blocks:
        attend(q, k[:, :, cols], v[:, :, cols], **how, into=result)
    close(result, dense(q, k, v, mask))
    for cols, how in blocks:
        into = gradients[0], gradients[1][:, :, cols], gradients[2][:, :, cols]
        attend_backward(dout, q, k[:, :, cols], v[:, :, cols], *result, **how, into=into)
    close(gradients, dense_gradients(dout, q, k, v, mask=mask))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
@pytest.mark.parametrize("backend", ["flash_cpu", "math"])
def test_half_precision_is_computed_in_fp32(backend, dtype, tolerance):
    q, k, v, dout = inputs(dtype=dtype)
    how = {"mask": MASKS["causal"], "scale": SCALE, "backend": backend}
    out, lse = attend(q, k, v, **how)
    assert out.dtype == lse.dtype == torch.float32
    q64, k64, v64, dout64 = (x.double() for x in (q, k, v, dout))
    close((out, lse), dense(q64, k64, v64, MASKS["causal"]), tolerance)
    gradients = attend_backward(dout, q, k, v, out, lse, **how)
    close(gradients, dense_gradients(dout64, q64, k64, v64, mask=MASKS["causal"]), tolerance)


@pytest.mark.parametrize("backend", ["flash_cpu", "math"])
def test_any_strides_will_do(backend):
    q, k, v, dout = inputs()
    how = {"mask": MASKS["causal"], "scale": SCALE, "backend": backend}
    expected = attend(q, k, v, **how)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]  # the rows' elements lie apart
    close(attend(*odd, **how), expected)
    same = dout[:, :, :1, :1].expand_as(dout)  # as the gradient of a sum comes
    close(attend_backward(same, *odd, *expected, **how), attend_backward(same.contiguous(), q, k, v, *expected, **how))


def test_sight_is_what_the_mask_shows():
    """For every rectangle of a block, and for documents that do and do not keep within it."""
    says = set()
    spans = [slice(a, b) for a, b in itertools.combinations((0, 1, 20, 32, 33, 60, 70), 2)]
    for mask, rows, cols in itertools.product(MASKS.values(), spans, spans):
        seen = mask.seen(rows, cols, torch.device("cpu"))
        sight = mask.sight(rows, cols)
        says.add(sight)
        assert seen.any() or sight in ("nothing", "something")
        assert sight != "nothing" or not seen.any()
        assert sight != "everything" or seen.all()
        assert sight != "causal" or seen.eq(torch.ones(seen.shape[2:], dtype=torch.bool).tril()).all()
    assert says == {"nothing", "everything", "causal", "something"}
    everything = slice(0, 70)
    assert [MASKS[name].sight(everything, everything) for name in ("none", "causal", "window", "documents", "all padding")] == [
        "everything", "causal", "something", "something", "nothing",
    ]  # fmt: skip


def test_no_mask_is_made_for_a_causal_diagonal_and_no_large_one_for_a_window():
    q, k, v, _ = (x[:, :, :64] for x in inputs())
    for window, most in ((None, 0), (20, 64)):
        mask = Mask(causal=True, window=window)
        sizes = [t.seen.numel() for _, _, _, t in A._tiles(q, k, v, mask, SCALE, None, None, 128) if t.seen is not None]
        assert max(sizes, default=0) <= most


def test_what_a_window_or_documents_hide_is_hardly_computed():
    """Of 8192 positions. A window of 1024 shows 23 % of what lies below the diagonal, documents of 1000 show 12 %."""
    numbers = torch.arange(8192)[None] // 1000
    for mask in (Mask(causal=True, window=1024), Mask(causal=True, documents=(numbers, numbers))):
        rectangles = A._halve(mask, slice(0, 8192), slice(0, 8192), A.MAX_SCORES, A.FINE, True)
        computed = sum(
            (rows.stop - rows.start) * (cols.stop - cols.start) / (2 if sight == "causal" else 1)
            for rows, cols, sight in rectangles
        )
        assert computed < 0.3 * 8192**2 / 2


def test_the_fastest_kernel_is_chosen():
    q, k, v, _ = inputs()
    assert choose_backend(q, k, v) == choose_backend(q, k, v, masked=True) == "flash_cpu"
    assert choose_backend(q, k, v, softcap=3.0) == "math"
    assert choose_backend(q, k, inputs(dim_v=8)[2]) == "math"
    assert choose_backend(*(x.to("meta") for x in (q, k, v))) == "math"


def test_a_kernel_that_cannot_cap_scores_says_so():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="only 'math' and 'flash_attn' cap scores"):
        attend(q, k, v, mask=Mask(), scale=SCALE, softcap=3.0, backend="flash_cpu")


# ---- The seam: private torch ops ------------------------------------------------------------------------------------

SCHEMAS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "query, key, value, dropout_p, is_causal, *attn_mask, *scale", "output, logsumexp",
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *attn_mask, *scale",
        "grad_query, grad_key, grad_value",
    ),
    "_scaled_dot_product_flash_attention": (
        "query, key, value, dropout_p, is_causal, return_debug_mask, *scale",
        "output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask",
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,"
        " philox_offset, *scale", "grad_query, grad_key, grad_value",
    ),
    "_scaled_dot_product_efficient_attention": (
        "query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, *scale",
        "output, log_sumexp, philox_seed, philox_offset",
    ),
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,"
        " is_causal, *scale", ", , , ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_private_ops_take_and_return_what_they_did(name):
    schema = getattr(torch.ops.aten, name).default._schema
    arguments = ", ".join(f"{'*' if a.kwarg_only else ''}{a.name}" for a in schema.arguments)
    assert (arguments, ", ".join(r.name for r in schema.returns)) == SCHEMAS[name]


@pytest.mark.parametrize(("backend", "name"), [
    ("flash_cuda", "none"), ("flash_cuda", "causal"), ("efficient_cuda", "causal"), ("efficient_cuda", "window"),
])  # fmt: skip
def test_kernels_of_gpus_are_called_with_arguments_that_they_take(backend, name):
    """On tensors without data, where torch checks shapes and types but computes nothing."""
    q, k, v, dout = inputs(dtype=torch.bfloat16, device="meta")
    tiles = list(A._tiles(q, k, v, MASKS[name], SCALE, None, backend, A.MAX_SCORES))
    assert [kernel for _, _, kernel, _ in tiles] == [backend]
    out, lse = A._KERNELS[backend][0](tiles[0][3])
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    gradients = A._KERNELS[backend][1](tiles[0][3], dout, out.float(), lse)
    assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]


def test_the_question_which_kernels_a_gpu_has_can_be_asked():
    q, k, v, _ = inputs(dtype=torch.bfloat16)
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True)
    assert torch.backends.cuda.can_use_flash_attention(parameters) in (True, False)
    assert torch.backends.cuda.can_use_efficient_attention(parameters) in (True, False)


class FlashAttn:
    """Stands in for the ops of flash-attn 2.8, with their arguments and layouts, computed densely."""

    calls = 0

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, window_size_left, window_size_right, alibi_slopes) == (0.0, SCALE, -1, -1, None)
        assert {x.shape[1] for x in (q, k, v)} == {q.shape[1]} or not causal
        self.calls += 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = dense(q, k, v, Mask(causal=causal), softcap or None)
        return out.transpose(1, 2), lse.float(), None, None

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert softmax_lse.is_contiguous()
        self.calls += 1
        grads = dense_gradients(dout.transpose(1, 2), *(x.transpose(1, 2) for x in (q, k, v)), mask=Mask(causal=causal),
                                softcap=softcap or None)  # fmt: skip
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad.transpose(1, 2))


@pytest.mark.parametrize("name", ["none", "causal"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch, name, softcap):
    ops = FlashAttn()
    monkeypatch.setattr(A, "_flash_ops", lambda: ops)
    q, k, v, dout = inputs()
    options = {"mask": MASKS[name], "scale": SCALE, "softcap": softcap, "backend": "flash_attn"}
    out, lse = attend(q, k, v, **options)
    close((out, lse), dense(q, k, v, MASKS[name], softcap), 1e-6)
    gradients = attend_backward(dout, q, k, v, out, lse, **options)
    close(gradients, dense_gradients(dout, q, k, v, mask=MASKS[name], softcap=softcap), 1e-6)
    assert ops.calls == 2


@needs_gpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_output_and_gradients_are_those_of_a_dense_softmax(name, dtype, tolerance):
    mask = MASKS[name]
    there = mask.documents and (mask.documents[0].cuda(), mask.documents[1].cuda())
    on_gpu = Mask(offset=mask.offset, causal=mask.causal, window=mask.window, documents=there)
    q, k, v, dout = inputs(dtype=dtype, device="cuda")
    assert choose_backend(q, k, v) == ("flash_cuda" if dtype == torch.bfloat16 else "efficient_cuda")
    assert choose_backend(q, k, v, masked=True) == "efficient_cuda"
    q64, k64, v64, dout64 = (x.double().cpu() for x in (q, k, v, dout))
    for max_scores in (3000, A.MAX_SCORES):
        out, lse = attend(q, k, v, mask=on_gpu, scale=SCALE, max_scores=max_scores)
        close((out.cpu(), lse.cpu()), dense(q64, k64, v64, mask), tolerance)
        gradients = attend_backward(dout, q, k, v, out, lse, mask=on_gpu, scale=SCALE, max_scores=max_scores)
        close(tuple(g.cpu() for g in gradients), dense_gradients(dout64, q64, k64, v64, mask=mask), tolerance)
