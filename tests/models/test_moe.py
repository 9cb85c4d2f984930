"""The MoE layer computes what transformers' do, by any of its paths, and its balancing counts each forward pass once."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kenotron.models.experts import ACTIVATIONS, Experts, grouped_linear, grouped_mm_serves
from kenotron.models.moe import (
    MoE,
    MoESettings,
    Router,
    Routing,
    attach_loss,
    balance_loss,
    set_loss_weight,
    update_expert_bias,
    z_loss,
)

T, H, I, E, K = 37, 16, 24, 8, 3  # noqa: E741
SIZES: dict[str, Any] = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": K}
#: every part that a layer can have
EVERYTHING: dict[str, Any] = {
    **SIZES, "bias": True, "router_bias": True, "score": "sigmoid", "num_groups": 4, "top_k_groups": 2, "bias_rate": 0.001,
    "shared_intermediate": 40, "shared_gate": True, "balance_coefficient": 0.01, "z_coefficient": 0.001,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_seed_and_one_thread")


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30))


def random_choice(num_tokens: int = T, experts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return ``index [T, K]`` without repeats in a row, among ``experts``, and weights."""
    chosen = torch.tensor(list(range(E)) if experts is None else experts)
    index = chosen[torch.rand(num_tokens, len(chosen)).topk(K, dim=-1).indices]
    return index, torch.rand(num_tokens, K)


def outputs_and_gradients(run: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the floating-point inputs and of the parameters."""
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    out = run(*inputs)
    wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, wanted, grad)]


# ---- Against transformers -------------------------------------------------------------------------------------------


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    return MixtralSparseMoeBlock(config), {}


def qwen3(norm_topk_prob: bool) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm_topk_prob
    )
    return Qwen3MoeSparseMoeBlock(config), {"renormalise": norm_topk_prob}


def qwen2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, shared_expert_intermediate_size=20
    )
    return Qwen2MoeSparseMoeBlock(config), {"renormalise": False, "shared_intermediate": 20, "shared_gate": True}


def deepseek_v3(groups: int, top_k_groups: int) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_shared_experts=2,
        n_group=groups, topk_group=top_k_groups, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    return DeepseekV3MoE(config), {
        "score": "sigmoid", "scale": 2.5, "shared_intermediate": 2 * I, "num_groups": groups, "top_k_groups": top_k_groups,
    }  # fmt: skip


#: names in transformers' modules -> ours
NAMES = {
    "gate.e_score_correction_bias": "router.expert_bias",
    "gate.": "router.",
    "shared_expert.": "shared_experts.",
    "shared_expert_gate.": "shared_gate.",
}


def our_name(theirs: str) -> str:
    for old, new in NAMES.items():
        if theirs.startswith(old):
            return new + theirs.removeprefix(old)
    return theirs


@pytest.mark.parametrize(
    "build",
    [
        mixtral,
        lambda: qwen3(True),
        lambda: qwen3(False),
        qwen2,
        lambda: deepseek_v3(1, 1),
        lambda: deepseek_v3(4, 2),
    ],
    ids=["mixtral", "qwen3_norm", "qwen3", "qwen2_shared_gate", "deepseek_v3", "deepseek_v3_groups"],
)
def test_transformers_layer_is_reproduced_with_its_gradients(build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    theirs, settings = build()
    for name, tensor in theirs.state_dict().items():
        tensor.uniform_(-0.3, 0.3) if "correction" in name else tensor.normal_(std=0.5)
    ours = MoE(MoESettings(**SIZES, **settings))
    loaded = ours.load_state_dict({our_name(k): v for k, v in theirs.state_dict().items()}, strict=False)
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys in ([], ["router.expert_bias"])

    x = torch.randn(2, T, H)
    expected = outputs_and_gradients(theirs, theirs, x)
    found = outputs_and_gradients(ours, ours, x)
    order = [our_name(name) for name, _ in theirs.named_parameters()]
    by_name = dict(zip([name for name, _ in ours.named_parameters()], found[2:], strict=True))
    assert sorted(order) == sorted(by_name)
    for a, b in zip([*found[:2], *(by_name[name] for name in order)], expected, strict=True):
        assert difference(a, b) < 1e-6


def test_router_with_bias_chooses_and_weights_like_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    theirs = GptOssTopKRouter(GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K))
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = Router(H, E, K, bias=True)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(T, H)
    logits, weights, index = theirs(x)
    routing = ours(x)
    assert difference(routing.logits, logits) < 1e-6
    dense = torch.zeros(T, E).scatter(1, index, weights)
    assert difference(torch.zeros(T, E).scatter(1, routing.index, routing.weights), dense) < 1e-6


# ---- Experts --------------------------------------------------------------------------------------------------------


def one_by_one(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what the experts make of each token, one pair after the other."""
    p = dict(experts.named_parameters())
    name = "gate_up_proj" if experts.gated else "up_proj"
    act = ACTIVATIONS[experts.activation].forward
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            inner = F.linear(x[t], p[name][e], p[f"{name}_bias"][e] if f"{name}_bias" in p else None)
            inner = act(inner[: inner.shape[0] // 2]) * inner[inner.shape[0] // 2 :] if experts.gated else act(inner)
            row = row + w * F.linear(inner, p["down_proj"][e], p["down_proj_bias"][e] if "down_proj_bias" in p else None)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"), [("silu", True), ("gelu", True), ("gelu_pytorch_tanh", False), ("relu", True), ("relu2", False)]
)
def test_experts_equal_a_loop_over_tokens(activation: str, gated: bool, bias: bool) -> None:
    experts = Experts(H, I, E, activation=activation, gated=gated, bias=bias).double()
    inputs = torch.randn(T, H).double(), *(x.double() if x.is_floating_point() else x for x in random_choice())
    found = outputs_and_gradients(experts, experts, *inputs)
    expected = outputs_and_gradients(lambda *args: one_by_one(experts, *args), experts, *inputs)
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts_used", [None, [1, 4, 6]], ids=["all_used", "some_unused"])
def test_grouped_product_and_loop_give_the_same(dtype: torch.dtype, experts_used: list[int] | None) -> None:
    grouped = Experts(H, I, E, bias=True, implementation="grouped", dtype=dtype)
    loop = Experts(H, I, E, bias=True, implementation="loop", dtype=dtype)
    loop.load_state_dict(grouped.state_dict())
    inputs = torch.randn(T, H, dtype=dtype), *random_choice(experts=experts_used)
    for a, b in zip(outputs_and_gradients(grouped, grouped, *inputs), outputs_and_gradients(loop, loop, *inputs), strict=True):
        assert a.dtype == b.dtype
        assert difference(a.float(), b.float()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("implementation", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("top_k", [1, K])
def test_no_tokens_give_no_output_and_zero_gradients(implementation: Any, top_k: int) -> None:
    experts = Experts(H, I, E, bias=True, implementation=implementation)
    nothing = torch.zeros(0, H), torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k)
    out, *gradients = outputs_and_gradients(experts, experts, *nothing)
    assert out.shape == (0, H)
    assert all(g is not None and not g.any() for g in gradients)
    assert [g.shape for g in gradients[2:]] == [p.shape for p in experts.parameters()]


def test_parts_of_the_experts_sum_to_all_of_them() -> None:
    """Expert parallelism: ranks hold slices, set ``num_experts``, and see pairs one by one, or none at all."""
    experts = Experts(H, I, E)
    x, (index, weights) = torch.randn(T, H), random_choice(experts=[0, 1, 2, 3, 4, 5])
    total = torch.zeros(T, H)
    for part in range(4):  # the last has no tokens
        local = copy.deepcopy(experts)
        for name, param in local.named_parameters():
            setattr(local, name, nn.Parameter(param.detach()[2 * part : 2 * part + 2].clone()))
        local.num_experts = 2
        token, choice = (index // 2 == part).nonzero(as_tuple=True)
        pairs = local(x[token], index[token, choice, None] - 2 * part, weights[token, choice, None])
        total.index_add_(0, token, pairs)
    assert difference(total, experts(x, index, weights)) < 1e-6


def test_grouped_product_is_chosen_where_torch_has_it() -> None:
    x, weight = torch.randn(T, H), torch.randn(E, I, H)
    assert grouped_mm_serves(x, weight)
    assert grouped_mm_serves(x.bfloat16(), weight.bfloat16())
    assert not grouped_mm_serves(x.double(), weight.double())
    assert not grouped_mm_serves(x, weight.bfloat16())
    assert not grouped_mm_serves(x[:, :15], weight[..., :15])
    assert not grouped_mm_serves(x, weight[:, :23])
    assert not grouped_mm_serves(x[:0], weight)
    ends = torch.arange(1, E + 1, dtype=torch.int32) * T // E
    assert "GroupedMm" in type(grouped_linear(x, weight.requires_grad_(), ends).grad_fn).__name__
    assert "Loop" in type(grouped_linear(x, weight, ends, "loop").grad_fn).__name__
    assert grouped_linear(x[:, :15], weight[..., :15], ends).shape == (T, I)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_can_be_found_without_values(dtype: torch.dtype) -> None:
    """On the meta device, where in bfloat16 all that runs is what CUDA runs: an ``item()`` anywhere in it would raise."""
    moe = MoE(MoESettings(**EVERYTHING), device="meta", dtype=dtype).train()
    x = torch.empty(2, T, H, device="meta", dtype=dtype, requires_grad=True)
    moe(x).sum().backward()
    update_expert_bias(moe)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in moe.parameters())


# ---- Losses ---------------------------------------------------------------------------------------------------------


def test_balance_loss_is_one_when_even_and_counts_experts_when_not() -> None:
    even = torch.arange(4 * E)[:, None] % E
    assert balance_loss(torch.full((4 * E, E), 1 / E), even, E).item() == pytest.approx(1)
    assert balance_loss(torch.full((4 * E, E), 0.7), even, E).item() == pytest.approx(1)  # sigmoid scores
    one = torch.zeros(T, 1, dtype=torch.int64)
    assert balance_loss(F.one_hot(one[:, 0], E).float(), one, E).item() == pytest.approx(E)
    assert balance_loss(torch.zeros(0, E), one[:0], E).item() == 0


def test_balance_loss_is_that_of_transformers_per_choice() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(T, E)
    theirs = load_balancing_loss_func((logits,), E, K)
    scores = logits.softmax(-1)
    assert balance_loss(scores, scores.topk(K).indices, E).item() == pytest.approx(float(theirs) / K, rel=1e-6)


def test_z_loss_is_the_mean_square_of_the_log_normaliser() -> None:
    assert z_loss(torch.zeros(T, E)).item() == pytest.approx(math.log(E) ** 2)
    logits = torch.randn(T, E)
    assert z_loss(logits).item() == pytest.approx(sum(x.exp().sum().log().item() ** 2 for x in logits) / T, rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_attached_loss_reaches_the_gradient_once(weight: float | Tensor, recompute: bool) -> None:
    p = torch.randn(5, requires_grad=True)
    weight = weight.clone() if isinstance(weight, Tensor) else weight

    def block(x: Tensor) -> Tensor:
        return attach_loss((x * p).sin(), p.square().sum(), weight)

    x = torch.randn(5, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    assert torch.equal(out, (x * p).sin())
    if isinstance(weight, Tensor):
        weight.zero_()  # another microbatch's, before this one's backward pass
    found = torch.autograd.grad(out.sum(), [x, p])
    expected = torch.autograd.grad((x * p).sin().sum() + 0.5 * p.square().sum(), [x, p])
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-6


def test_attached_loss_does_nothing_without_a_gradient() -> None:
    p = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        out = p * 2
        assert attach_loss(out, p.sum(), 1.0) is out


@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_layer_adds_its_losses_to_the_gradient(score: Any, is_sum: bool) -> None:
    moe = MoE(MoESettings(**SIZES, score=score, balance_coefficient=0.3, z_coefficient=0.07))
    set_loss_weight(nn.Sequential(nn.Linear(1, 1), moe), 0.25, is_sum=is_sum)
    x = torch.randn(2, T, H)
    found = outputs_and_gradients(moe.train(), moe, x)
    plain = outputs_and_gradients(moe.eval(), moe, x)
    assert torch.equal(found[0], plain[0])

    x.requires_grad_()
    routing: Routing = moe.router(x.view(-1, H))
    balance, z = balance_loss(routing.scores, routing.index, E), z_loss(routing.logits)
    weight = 0.25 * (2 * T if is_sum else 1)
    grad_x, grad_router = torch.autograd.grad(weight * (0.3 * balance + 0.07 * z), [x, moe.router.weight])
    expected = [plain[1] + grad_x, plain[2] + grad_router, *plain[3:]]
    for a, b in zip(found[1:], expected, strict=True):
        assert difference(a, b) < 1e-6
    assert difference(found[2], plain[2]) > 1e-3
    assert moe.balance is not None
    assert moe.z is not None
    assert (moe.balance.item(), moe.z.item()) == pytest.approx((balance.item(), z.item()))
    assert not moe.balance.requires_grad
    assert not moe.z.requires_grad


# ---- Balancing without a loss ---------------------------------------------------------------------------------------


def test_bias_evens_out_a_skewed_router_and_leaves_its_scores() -> None:
    moe = MoE(MoESettings(**SIZES, score="sigmoid", router_bias=True, bias_rate=0.02)).train()
    assert moe.router.bias is not None
    moe.router.bias.data.copy_(torch.linspace(-2, 2, E))
    x = torch.randn(400, H)
    before = moe.router(x)
    loads = []
    for _ in range(60):
        moe(x)
        assert moe.tokens_per_expert.sum() == 400 * K
        loads.append((moe.tokens_per_expert.max() / moe.tokens_per_expert.mean()).item())
        update_expert_bias(moe)
        assert not moe.tokens_per_expert.any()
    assert loads[0] > 1.8
    assert loads[-1] < 1.15
    after = moe.router(x)
    assert torch.equal(after.scores, before.scores)
    chosen = after.scores.gather(1, after.index)
    assert difference(after.weights, chosen / chosen.sum(-1, keepdim=True)) < 1e-6


def test_bias_moves_by_the_counts_of_all_ranks() -> None:
    moe = MoE(MoESettings(hidden=H, intermediate=I, num_experts=4, top_k=1, bias_rate=0.5))
    unbiased = MoE(MoESettings(hidden=H, intermediate=I, num_experts=4, top_k=1))
    moe.tokens_per_expert.copy_(torch.tensor([8.0, 0, 2, 2]))
    unbiased.tokens_per_expert.fill_(1)
    seen = []

    def add_the_other_rank(counts: Tensor) -> None:
        seen.append(counts.tolist())
        counts += torch.tensor([0.0, 9, 0, 3])

    update_expert_bias(nn.ModuleList([moe, unbiased]), add_the_other_rank)
    assert seen == [[8, 0, 2, 2]]  # one call, of the layer that has a rate
    assert moe.router.expert_bias.tolist() == [-0.5, -0.5, 0.5, 0.5]  # of 8, 9, 2, 5 and their mean 6
    assert not unbiased.router.expert_bias.any()
    assert not unbiased.tokens_per_expert.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_counts_tokens_and_losses_once(use_reentrant: bool) -> None:
    plain = MoE(MoESettings(**SIZES, balance_coefficient=0.3, z_coefficient=0.07, bias_rate=0.1)).train()
    recomputed = copy.deepcopy(plain)
    x = torch.randn(T, H)
    expected = outputs_and_gradients(plain, plain, x)
    leaf = x.clone().requires_grad_()
    out = checkpoint(recomputed, leaf, use_reentrant=use_reentrant)
    if not use_reentrant:
        set_loss_weight(recomputed, 100.0)  # for the next microbatch
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    found = [out, leaf.grad, *(p.grad for p in recomputed.parameters())]
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert difference(a, b) < 1e-6
    assert plain.tokens_per_expert.sum() == T * K
    assert torch.equal(recomputed.tokens_per_expert, plain.tokens_per_expert)


def test_evaluation_leaves_no_trace() -> None:
    moe = MoE(MoESettings(**SIZES, balance_coefficient=0.3, bias_rate=0.1)).eval()
    moe(torch.randn(T, H))
    assert not moe.tokens_per_expert.any()
    assert moe.balance is None


# ---- Life of a module -----------------------------------------------------------------------------------------------


def test_meta_build_is_materialised_as_if_built_in_place() -> None:
    torch.manual_seed(5)
    expected = MoE(MoESettings(**EVERYTHING))
    moe = MoE(MoESettings(**EVERYTHING), device="meta")
    assert all(t.is_meta for t in [*moe.parameters(), *moe.buffers()])
    moe.to_empty(device="cpu")
    for tensor in [*moe.parameters(), *moe.buffers()]:
        tensor.data.fill_(torch.nan)
    torch.manual_seed(5)
    for module in moe.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for (name, a), b in zip(moe.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not moe.tokens_per_expert.any()


def test_initial_weights_are_those_of_linear_layers() -> None:
    experts = Experts(64, 100, E, bias=True)
    for weight, bias, inputs in [
        (experts.get_parameter("gate_up_proj"), experts.get_parameter("gate_up_proj_bias"), 64),
        (experts.down_proj, experts.get_parameter("down_proj_bias"), 100),
    ]:
        for tensor in (weight, bias):
            assert 0.95 < tensor.abs().max().item() * inputs**0.5 <= 1
        assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.02)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    moe = MoE(MoESettings(**EVERYTHING))
    x = torch.randn(*leading, H)
    out = moe(x)
    assert out.shape == x.shape
    assert difference(out.view(-1, H), moe(x.view(-1, H))) < 1e-6


def test_no_tokens_in_the_whole_layer() -> None:
    moe = MoE(MoESettings(**EVERYTHING)).train()
    out = moe(torch.zeros(3, 0, H, requires_grad=True))
    out.sum().backward()
    assert out.shape == (3, 0, H)
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_bfloat16_keeps_routing_counts_and_bias_in_float32() -> None:
    exact = MoE(MoESettings(**EVERYTHING)).train()
    moe = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(moe.state_dict())  # the rounded weights
    moe.router.expert_bias.fill_(0.123456789)
    assert moe.half().bfloat16().router.expert_bias[0].item() == pytest.approx(0.123456789, rel=1e-7)
    moe.load_state_dict(exact.state_dict())
    moe.to(torch.bfloat16)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    x = torch.randn(T, H).bfloat16()
    routing = moe.router(x)
    assert {routing.weights.dtype, routing.logits.dtype, routing.scores.dtype} == {torch.float32}
    assert torch.equal(routing.index, exact.router(x.float()).index)
    found = outputs_and_gradients(moe, moe, x)
    expected = outputs_and_gradients(exact, exact, x.float())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert difference(a.float(), b) < 2e-2
    assert moe.tokens_per_expert.dtype == moe.router.expert_bias.dtype == torch.float32


def test_autocast_runs_products_in_bfloat16_and_routing_in_float32() -> None:
    moe = MoE(MoESettings(**EVERYTHING)).train()
    x = torch.randn(T, H)
    exact = moe.router(x).logits
    expected = outputs_and_gradients(moe, moe, x)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = moe(x)
            assert torch.equal(moe.router(x).logits, exact)
        return out

    found = outputs_and_gradients(run, moe, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < difference(a, b) < 2e-2


def test_copies_and_state_dicts_hold_everything_but_counts() -> None:
    moe = MoE(MoESettings(**EVERYTHING)).train()
    x = torch.randn(T, H)
    moe(x)
    update_expert_bias(moe)
    moe(x)
    assert "router.expert_bias" in moe.state_dict()
    assert "tokens_per_expert" not in moe.state_dict()
    other = MoE(MoESettings(**EVERYTHING))
    other.load_state_dict(moe.state_dict())
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), other):
        assert torch.equal(twin.eval()(x), moe.eval()(x))
    assert torch.equal(copy.deepcopy(moe).tokens_per_expert, moe.tokens_per_expert)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k=9, but there are 8 experts"),
        ({"top_k": 0}, "top_k=0: set it to 1 or more"),
        ({"num_groups": 4, "top_k_groups": 1}, "top_k=3, but there are 2 experts"),
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=8"),
        ({"num_groups": 2, "top_k_groups": 3}, "top_k_groups=3 of num_groups=2"),
        ({"score": "tanh"}, 'score=\'tanh\' is not known. Set "softmax" or "sigmoid"'),
        ({"activation": "swish"}, "activation='swish' is not known. Set one of 'silu'"),
        ({"shared_gate": True}, "Set shared_intermediate"),
        ({"shared_intermediate": -1}, "shared_intermediate=-1"),
        ({"balance_coefficient": -0.1}, "balance_coefficient=-0.1"),
        ({"bias_rate": -1.0}, "bias_rate=-1.0"),
    ],
)
def test_bad_settings_say_what_to_set(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoESettings(**{**SIZES, **changes})
    with pytest.raises(ValueError, match="implementation='fast'"):
        Experts(H, I, E, implementation="fast")  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_layer_trains_alike() -> None:
    moe = MoE(MoESettings(**EVERYTHING)).train()
    x = torch.randn(T, H)
    expected = outputs_and_gradients(moe, moe, x)
    counts = moe.tokens_per_expert.clone()
    moe.tokens_per_expert.zero_()
    compiled = torch.compile(moe, backend="aot_eager")
    found = outputs_and_gradients(lambda x: checkpoint(compiled, x, use_reentrant=False), moe, x)
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-6
    assert torch.equal(moe.tokens_per_expert, counts)
