"""Muon trains on every layout as on one process, where it is torch's; state goes to any other layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import SIZES, Run, decoder, experts, token_rows, train
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kenotron
from kenotron.optim import Muon, exchange, muon_groups
from kenotron.optim.exchange import Exchange, blocks_of
from kenotron.optim.muon import orthogonalise
from kenotron.testing import RankPool

SLOW = pytest.mark.slow  # repeats on a further layout what another case tries
DOUBLE = {"precision": "64-true"}


def precise(module: nn.Module) -> Muon:
    """In float64: in bfloat16 the last digit of a gradient, which differs between layouts, moves an update by up to 1e-2."""
    return Muon(muon_groups(module, lr=0.02, adamw_lr=0.01, weight_decay=0.05), ns_dtype=torch.float64)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False}))


def plain_loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
    losses = []
    for batch in token_rows(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(path: str) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in kenotron.load_state_dict(path).items()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def torch_muon(start: dict[str, Tensor], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train a Llama with torch's Muon and AdamW in this process, in float64 throughout."""
    model = llama().double()
    model.load_state_dict(start)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    heads, norms = [model.lm_head.weight], [p for p in model.parameters() if p.ndim == 1]
    adamw: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95)}
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(heads, weight_decay=0.05, **adamw),
        torch.optim.AdamW(embeddings + norms, weight_decay=0.0, **adamw),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", Tensor.clone)
        losses = plain_loop(model, optimizers, steps)
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def torch_reference(optim_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    path = str(tmp_path_factory.mktemp("muon") / "start")
    optim_pool.run(train, 1, Run(llama, precise, {}, steps=0, path=path, trainer=DOUBLE))
    return torch_muon(whole(path), 4)


LAYOUTS = [
    (1, {}),
    (2, {"tp": 2}),
    pytest.param(2, {"zero_stage": 0}, marks=SLOW),
    pytest.param(2, {"zero_stage": 1}, marks=SLOW),
    pytest.param(2, {"zero_stage": 2}, marks=SLOW),
    (2, {"zero_stage": 3}),
    (4, {"tp": 2, "zero_stage": 3}),
    pytest.param(4, {"tp": 4}, marks=SLOW),
    (2, {"pp": 2}),
    pytest.param(4, {"dp_replicate": 2, "zero_stage": 3}, marks=SLOW),
    pytest.param(4, {"tp": 2, "pp": 2}, marks=SLOW),
    pytest.param(2, {"cp": 2}, marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_muon_on_every_layout_is_torchs_on_one_process(
    optim_pool: RankPool,
    tmp_path: Path,
    torch_reference: tuple[list[float], dict[str, Tensor]],
    ranks: int,
    layout: dict[str, Any],
) -> None:
    path = str(tmp_path / "end")
    for losses in optim_pool.run(train, ranks, Run(llama, precise, layout, path=path, trainer=DOUBLE)):
        assert losses == pytest.approx(torch_reference[0], rel=1e-6)  # loggers keep float32
    assert furthest(whole(path), torch_reference[1]) < 1e-6


# ---- Fused matrices and experts -------------------------------------------------------------------------------------


def iterate(x: Tensor) -> Tensor:
    """Newton-Schulz as Jordan writes it down, for one matrix."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def matrices_of(name: str, whole: Tensor) -> list[Tensor]:
    """Return the matrices in a parameter of our decoder, as views."""
    stack = list(whole) if whole.ndim == 3 else [whole]
    sizes = {"qkv_proj": (16, 8, 8), "gate_up_proj": (24, 24)}
    parts = next((sizes[key] for key in sizes if key in name), None)
    return [part for matrix in stack for part in (matrix.split(parts) if parts else (matrix,))]


def plain_muon(model: nn.Module, steps: int) -> list[float]:
    """Train with Muon written out, and torch's AdamW for what is no matrix inside of a layer."""
    hidden = {n: p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n}
    others = [(n, p) for n, p in model.named_parameters() if n not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in others if "lm_head" in n], "weight_decay": 0.05},
            {"params": [p for n, p in others if "lm_head" not in n], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    momenta = {n: torch.zeros_like(p) for n, p in hidden.items()}

    def step() -> None:
        adamw.step()
        for name, param in hidden.items():
            assert param.grad is not None
            momenta[name] = 0.95 * momenta[name] + 0.05 * param.grad
            nesterov = 0.05 * param.grad + 0.95 * momenta[name]
            with torch.no_grad():
                param.mul_(1 - 0.02 * 0.05)
                for part, update in zip(matrices_of(name, param.data), matrices_of(name, nesterov.double()), strict=True):
                    part.sub_(0.02 * max(1, part.shape[0] / part.shape[1]) ** 0.5 * iterate(update))

    losses = []
    for batch in token_rows(steps):
        model.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        step()
        losses.append(float(loss.detach()))
    return losses


FUSED = [
    pytest.param(decoder, 2, {"tp": 2, "zero_stage": 3}, marks=SLOW),
    (decoder, 4, {"tp": 4}),  # over 2 KV heads: ranks share rows
    pytest.param(experts, 2, {"zero_stage": 3}, marks=SLOW),
    pytest.param(experts, 2, {"ep": 2}, marks=SLOW),
    (experts, 4, {"ep": 2, "tp": 2}),
    pytest.param(experts, 4, {"ep": 2, "zero_stage": 2}, marks=SLOW),
]


@pytest.mark.parametrize(("make", "ranks", "layout"), FUSED)
def test_layers_in_one_matrix_and_experts_are_orthogonalised_one_by_one(
    optim_pool: RankPool, tmp_path: Path, make: Callable[..., nn.Module], ranks: int, layout: dict[str, Any]
) -> None:
    start, end = str(tmp_path / "start"), str(tmp_path / "end")
    optim_pool.run(train, 1, Run(make, precise, {}, steps=0, path=start))
    model = make()
    model.load_state_dict(whole(start))
    expected = plain_muon(model, 3)
    found = optim_pool.run(train, ranks, Run(make, precise, layout, steps=3, path=end))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert furthest(whole(end), {name: p.detach() for name, p in model.state_dict().items()}) < 1e-5


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (decoder, (2, {"tp": 2}), (2, {"zero_stage": 3})),
        pytest.param(decoder, (1, {}), (4, {"tp": 2, "pp": 2}), marks=SLOW),
        pytest.param(experts, (2, {"ep": 2}), (1, {}), marks=SLOW),
    ],
)
def test_momentum_goes_on_on_another_layout(
    optim_pool: RankPool,
    tmp_path: Path,
    make: Callable[..., nn.Module],
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
) -> None:
    straight, halfway, end = (str(tmp_path / name) for name in ("straight", "halfway", "end"))
    (expected,) = optim_pool.run(train, 1, Run(make, precise, {}, steps=4, path=straight))
    optim_pool.run(train, before[0], Run(make, precise, before[1], steps=2, path=halfway))
    run = Run(make, precise, after[1], steps=4, path=end, resume=halfway, skip=2)
    found = optim_pool.run(train, after[0], run)[0]
    assert found == pytest.approx(expected[2:], rel=1e-5)
    assert furthest(whole(end), whole(straight)) < 1e-5


# ---- One process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_on_one_process_it_is_torchs_muon_bit_for_bit(adjust: Any, nesterov: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 40, bias=False), nn.Linear(40, 8, bias=False))
    theirs = copy.deepcopy(ours)
    pairs: list[tuple[nn.Module, torch.optim.Optimizer]] = [
        (ours, Muon(list(ours.parameters()), lr=0.05, nesterov=nesterov, adjust=adjust)),
        (theirs, torch.optim.Muon(theirs.parameters(), lr=0.05, nesterov=nesterov, adjust_lr_fn=adjust)),
    ]
    for _ in range(8):
        x = torch.randn(16, 24)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_spectral_adjustment_moves_each_matrix_by_the_root_of_outputs_over_inputs() -> None:
    param = nn.Parameter(torch.zeros(4, 36, dtype=torch.float64))
    optimizer = Muon([param], lr=0.5, weight_decay=0.0, adjust="spectral", ns_dtype=torch.float64)
    param.grad = torch.randn(4, 36, dtype=torch.float64)
    update = iterate(param.grad)
    optimizer.step()
    assert torch.allclose(param.detach(), -0.5 * (4 / 36) ** 0.5 * update, atol=1e-12)


def test_transposed_matrices_are_treated_as_their_transposes() -> None:
    torch.manual_seed(0)
    plain, turned = nn.Parameter(torch.zeros(12, 4).double()), nn.Parameter(torch.zeros(4, 12).double())
    settings: dict[str, Any] = {"ns_dtype": torch.float64, "lr": 0.1}
    optimizers = [
        Muon([{"params": [plain], "parts": (8, 4)}], **settings),
        Muon([{"params": [turned], "parts": (8, 4), "transposed": True}], **settings),
    ]
    plain.grad = torch.randn(12, 4).double()
    turned.grad = plain.grad.T.contiguous()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(plain, turned.T, atol=1e-12)


def test_singular_values_end_near_one_in_stacks_as_in_matrices() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 10, 20)
    coefficients = (3.4445, -4.7750, 2.0315)
    together = orthogonalise(stack, coefficients, 5, 1e-7)
    for one, matrix in zip(together, stack, strict=True):
        assert torch.allclose(one, orthogonalise(matrix, coefficients, 5, 1e-7), atol=1e-5)
        values = torch.linalg.svdvals(one)
        assert 0.6 < values.min() <= values.max() < 1.3


def test_a_gradient_of_zeros_changes_nothing_but_decay() -> None:
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([param], lr=0.1, weight_decay=0.5)
    param.grad = torch.zeros(3, 3)
    optimizer.step()
    assert torch.allclose(param.detach(), torch.full((3, 3), 0.95))


def test_parameters_without_gradients_are_passed_over() -> None:
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = Muon(params, lr=0.1)
    optimizer.step()
    params[1].grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(3, 3))
    assert params[0] not in optimizer.state
    assert not torch.equal(params[1].detach(), torch.ones(3, 3))


def test_groups_that_are_added_and_copies_go_on() -> None:
    model = decoder()
    optimizer = Muon(muon_groups(model))
    batch = token_rows(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    late = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())
    copied = again.param_groups[-1]["params"][0]
    late.grad, copied.grad = torch.eye(3), torch.eye(3)
    for one in (optimizer, again):
        one.step()
    assert not torch.equal(late.detach(), torch.ones(3, 3))
    assert torch.equal(copied.detach(), late.detach())


@pytest.mark.parametrize(
    ("groups", "settings", "match"),
    [
        ([{"params": [nn.Parameter(torch.ones(3))]}], {}, r"shape \(3,\) in a Muon group"),
        ([{"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]}], {}, "complex"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))], "algorithm": "adam"}], {}, "'muon' or 'adamw'"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))], "betas": (0.9, 0.9)}], {}, "betas in a parameter group"),
        ([{"params": [nn.Parameter(torch.ones(2))], "algorithm": "adamw", "betas": (0.9, 1)}], {}, "betas"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {"lr": -1}, "lr=-1"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {"momentum": 1.0}, "momentum=1.0"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {"adjust": "none"}, "adjust='none'"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {"ns_steps": 0}, "ns_steps=0"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {"ns_dtype": torch.int8}, "ns_dtype"),
    ],
)
def test_what_does_not_fit_is_refused(groups: list[dict[str, Any]], settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Muon(groups, **settings)


def test_parts_that_do_not_make_up_their_matrix_are_refused() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"4 outputs.*parts=\(3, 2\)"):
        Muon([{"params": [param], "parts": (3, 2)}]).step()


# ---- Who works on what ----------------------------------------------------------------------------------------------


def test_work_is_spread_over_the_ranks_that_hold_a_matrix() -> None:
    whole_matrix = (((0, 0), (0, 0), (8, 8)),)
    halves = [(((0, 0), (0, 0), (4, 8)),), (((0, 0), (4, 0), (4, 8)),)]
    held: dict[str, Any] = {f"m{i}": [whole_matrix, whole_matrix] for i in range(4)} | {f"h{i}": halves for i in range(4)}
    blocks = [block for name in held for block in blocks_of(name, (8, 8), 0, (), held[name])]
    jobs = exchange._jobs(blocks, held, 2)
    assert [job.owner for job in jobs].count(0) == 4
    for job in jobs:
        assert sum(part.numel for part in job.sent) == 64
        if job.block.name.startswith("m"):  # everyone has it: nothing travels to its rank
            assert [part.holder for part in job.sent] == [job.owner]


def test_rounds_bound_what_one_rank_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ROUND", 100)
    held: dict[str, Any] = {f"m{i}": [(((0, 0), (0, 0), (8, 8)),)] for i in range(6)}
    blocks = [block for name in held for block in blocks_of(name, (8, 8), 0, (), held[name])]
    run = Exchange(blocks, held, None)
    assert [len(jobs) for jobs in run._rounds] == [2, 2, 1, 1]
    given: dict[str, Tensor] = {}
    tensors = {name: torch.full((8, 8), float(index)) for index, name in enumerate(held)}
    run.run(tensors, lambda block, x: x + 1, lambda block, where, x: given.__setitem__(block.name, x.clone()))
    assert {name: float(x.mean()) for name, x in given.items()} == {f"m{i}": i + 1.0 for i in range(6)}


def test_stacks_of_experts_are_cut_where_ranks_are_and_so_that_all_work() -> None:
    everything = (((0, 0, 0), (0, 0, 0), (5, 4, 2)),)
    blocks = blocks_of("e", (5, 4, 2), 1, (3, 1), [everything] * 2)
    assert [(block.offset, block.shape) for block in blocks] == [
        ((0, 0, 0), (3, 3, 2)),
        ((0, 3, 0), (3, 1, 2)),
        ((3, 0, 0), (2, 3, 2)),
        ((3, 3, 0), (2, 1, 2)),
    ]
