"""Initial weights and rates are the formulae of the papers, on any layout; sizes and best rates then hold over widths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import SIZES, Run, decoder, experts, train
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, MambaConfig, MixtralConfig, MixtralForCausalLM

import kenotron
from kenotron.models import Decoder, Mamba
from kenotron.optim import (
    Schedule,
    ScheduleLR,
    coordinate_check,
    growth,
    muon_groups,
    parameter_groups,
    parametrise,
    spectral_lr_scale,
    spectral_std,
)
from kenotron.optim.weights import find_weights
from kenotron.testing import RankPool

WIDE: dict[str, Any] = {
    **SIZES,
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}


def std(fan_in: int, fan_out: int) -> float:
    return 1 / math.sqrt(fan_in) * min(1.0, math.sqrt(fan_out / fan_in))


def rates(module: nn.Module) -> dict[str, float]:
    names = {id(weight.param): weight.name for weight in find_weights(module)}
    return {names[id(p)]: group["lr"] for group in parameter_groups(module, lr=1.0) for p in group["params"]}


def spread(tensor: Tensor) -> float:
    return float(tensor.detach().double().std())


def test_formulae() -> None:
    assert spectral_std(100, 400) == pytest.approx(0.1)
    assert spectral_std(400, 100) == pytest.approx(0.05 * 0.5)
    assert spectral_lr_scale(512, 128, "adam", 256) == 0.5
    assert spectral_lr_scale(512, 128, "sgd") == 0.25


def test_a_decoders_weights_and_rates() -> None:
    model = Decoder(LlamaConfig(**WIDE))
    found = parametrise(model, base_width=64)
    layer = model.model.layers[0]
    # (weights of one layer, inputs, outputs); 2 KV heads of 16
    q, k, v = layer.self_attn.qkv_proj.weight.split([128, 32, 32])
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    for weight, fan_in, fan_out in [
        (q, 128, 128), (k, 128, 32), (v, 128, 32), (layer.self_attn.o_proj.weight, 128, 128), (gate, 128, 320),
        (up, 128, 320), (layer.mlp.down_proj.weight, 320, 128), (model.lm_head.weight, 128, 256),
    ]:  # fmt: skip
        assert spread(weight) == pytest.approx(std(fan_in, fan_out), rel=0.05)
    assert spread(model.model.embed_tokens.weight) == pytest.approx(1.0, rel=0.05)
    assert torch.equal(layer.mlp_norm.weight, torch.ones(128))
    expected = {
        name: 64 / 320 if "down_proj" in name else 64 / 128 if "proj" in name or "lm_head" in name else 1.0
        for name, _ in model.named_parameters()
    }
    assert rates(model) == pytest.approx(expected)
    assert {name: one.lr_scale for name, one in found.items()} == pytest.approx(expected)
    assert found["model.layers.1.self_attn.qkv_proj.weight"].stds == pytest.approx((std(128, 128), std(128, 32), std(128, 32)))


def test_sgd_moves_a_matrix_by_outputs_over_inputs() -> None:
    model = LlamaForCausalLM(LlamaConfig(**WIDE))
    parametrise(model, optimizer="sgd", base_width=64)
    found = rates(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert found == pytest.approx(
        {
            name: shape[0] / shape[1] if len(shape) == 2 and "embed" not in name else shape[-1] / 64
            for name, shape in shapes.items()
        }
    )
    with pytest.raises(ValueError, match=r"layers of 128, 32, 32 outputs in one.*optimizer='adam'"):
        parametrise(Decoder(LlamaConfig(**WIDE)), optimizer="sgd")


@pytest.mark.parametrize("make", [Decoder, MixtralForCausalLM])
def test_every_expert_is_a_matrix_of_its_own_and_the_router_another(make: Any) -> None:
    model = make(MixtralConfig(**WIDE, num_local_experts=4))
    parametrise(model, base_width=64)
    mlp = model.model.layers[0].mlp
    router = mlp.gate if hasattr(mlp, "gate") else mlp.router
    for expert in range(4):
        assert spread(mlp.experts.gate_up_proj[expert]) == pytest.approx(std(128, 320), rel=0.05)
        assert spread(mlp.experts.down_proj[expert]) == pytest.approx(std(320, 128), rel=0.05)
    assert spread(router.weight) == pytest.approx(std(128, 4), rel=0.15)
    assert rates(model)["model.layers.0.mlp.experts.down_proj"] == 64 / 320


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=64, state_size=4, num_hidden_layers=2, tie_word_embeddings=False, use_bias=True),
        Mamba2Config(
            vocab_size=64, hidden_size=64, state_size=8, num_heads=8, head_dim=16, n_groups=2, num_hidden_layers=2,
            tie_word_embeddings=False,
        ),
    ],
)  # fmt: skip
def test_a_mambas_matrices_follow_and_its_state_space_stays(config: Any) -> None:
    before, model = Mamba(config), Mamba(config)
    parametrise(model, base_width=32)
    mixer, own = model.backbone.layers[0].mixer, before.backbone.layers[0].mixer
    assert spread(mixer.out_proj.weight) == pytest.approx(std(128, 64), rel=0.05)
    assert spread(mixer.in_proj.weight[:128]) == pytest.approx(std(64, 128), rel=0.05)
    assert torch.equal(mixer.A_log, own.A_log)
    assert torch.equal(mixer.D, own.D)
    found = rates(model)
    assert found["backbone.layers.0.mixer.A_log"] == found["backbone.layers.0.mixer.conv1d.weight"] == 1.0
    assert found["backbone.layers.0.mixer.out_proj.weight"] == 32 / 128
    if config.model_type == "mamba":
        assert not mixer.in_proj.bias.any()
        assert float(nn.functional.softplus(mixer.dt_proj.bias.detach()).min()) < 0.2  # time steps, not zeros


@pytest.mark.parametrize("make", [Decoder, LlamaForCausalLM])
def test_depth_scaling_divides_what_writes_to_the_residual_stream(make: Any) -> None:
    config = LlamaConfig(**{**WIDE, "num_hidden_layers": 3}, initializer_range=0.02)
    model = make(config)
    found = parametrise(model, "standard", depth_scaling=True)
    scaled = {name for name, one in found.items() if one.scale != 1.0}
    assert scaled == {f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert {found[name].scale for name in scaled} == {6**-0.5}
    params = dict(model.named_parameters())
    for name, param in params.items():
        if name.endswith("proj.weight"):
            assert spread(param) == pytest.approx(0.02 * (6**-0.5 if name in scaled else 1), rel=0.05)
    assert set(rates(model).values()) == {1.0}
    both = make(config)
    found = parametrise(both, depth_scaling=True)
    assert spread(both.model.layers[2].mlp.down_proj.weight) == pytest.approx(std(320, 128) / math.sqrt(6), rel=0.05)
    assert spread(both.lm_head.weight) == pytest.approx(std(128, 256), rel=0.05)


def test_depth_scaling_counts_a_mixture_as_one_branch_and_a_mixer_as_one() -> None:
    mixture = parametrise(experts(), "standard", depth_scaling=True)
    assert mixture["model.layers.0.mlp.experts.down_proj"].scale == 4**-0.5
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=3, tie_word_embeddings=False)
    assert (
        parametrise(Mamba(config), "standard", depth_scaling=True)["backbone.layers.0.mixer.out_proj.weight"].scale == 3**-0.5
    )
    config.rescale_prenorm_residual = True
    with pytest.raises(ValueError, match="rescale_prenorm_residual"):
        parametrise(Mamba(config), "standard", depth_scaling=True)


def test_the_row_of_padding_stays_zero_and_muon_ignores_adams_rates() -> None:
    model = decoder(pad_token_id=3)
    parametrise(model, base_width=8)
    assert not model.get_parameter("model.embed_tokens.weight")[3].any()
    groups = muon_groups(model, lr=0.5, adamw_lr=0.25)
    assert {group["lr"] for group in groups if group["algorithm"] == "muon"} == {0.5}
    assert {group["lr"] for group in groups if group["algorithm"] == "adamw"} == {0.25, 0.25 * 8 / 16}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scheme": "mup"}, "'standard' or 'spectral_mup'"),
        ({"optimizer": "adamw"}, "optimizer='adamw'"),
        ({"base_width": 0}, "base_width=0"),
        ({"depth_scaling": True, "residual": "nothing"}, "no weight's name matches"),
        ({"depth_scaling": True, "residual": "("}, "no regular expression"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parametrise(decoder(), **settings)


def test_tied_embeddings_and_second_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        parametrise(decoder(tie_word_embeddings=True))
    model = decoder()
    parametrise(model)
    with pytest.raises(ValueError, match="parametrised before"):
        parametrise(model)


# ---- On any layout ----------------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    model = decoder()
    parametrise(model, base_width=8, depth_scaling=True)
    return model


def adamw(module: nn.Module) -> Any:
    groups = parameter_groups(module, lr=0.05)
    return torch.optim.AdamW(groups, lr=0.05, eps=1e-6)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, {"tp": 2, "pp": 2}),
        pytest.param(2, {"zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 4}, marks=pytest.mark.slow),
    ],
)
def test_weights_and_training_do_not_depend_on_the_layout(
    optim_pool: RankPool, tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    paths = [str(tmp_path / name) for name in ("one", "start", "one-end", "end")]
    optim_pool.run(train, 1, Run(on_meta, adamw, {}, steps=0, path=paths[0]))
    optim_pool.run(train, ranks, Run(on_meta, adamw, layout, steps=0, path=paths[1]))
    one, many = (kenotron.load_state_dict(path) for path in paths[:2])
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert spread(one["model.model.embed_tokens.weight"]) == pytest.approx(1.0, rel=0.15)
    assert spread(one["model.model.layers.0.mlp.down_proj.weight"]) == pytest.approx(std(24, 16) / 2, rel=0.15)
    (expected,) = optim_pool.run(train, 1, Run(on_meta, adamw, {}, steps=4, path=paths[2]))
    for found in optim_pool.run(train, ranks, Run(on_meta, adamw, layout, steps=4, path=paths[3])):
        assert found == pytest.approx(expected, rel=1e-5)


# ---- Over widths ------------------------------------------------------------------------------------------------------

WORDS, POSITIONS = 64, 24


def model_of(width: int, scheme: str) -> nn.Module:
    sizes: dict[str, Any] = {
        **SIZES, "vocab_size": WORDS, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False,
        "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
    }  # fmt: skip
    model = Decoder(LlamaConfig(**sizes), attention="sdpa")
    parametrise(model, scheme, base_width=32)  # type: ignore[arg-type]
    return model


def text(rows: int, seed: int) -> Tensor:
    """Return ``[rows, POSITIONS]`` tokens, each drawn by the one before."""
    odds = torch.softmax(2.0 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0)), -1)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, WORDS, (rows,), generator=generator)]
    for _ in range(POSITIONS - 1):
        tokens.append(torch.multinomial(odds[tokens[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(tokens, 1)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch, return_logits=True).loss
    return loss


def test_sizes_of_activations_hold_over_widths_where_standards_grow() -> None:
    batches = [text(8, seed) for seed in range(4)]

    def slopes(scheme: str, rate: float, step: int) -> dict[str, float]:
        found = coordinate_check(
            lambda width: model_of(width, scheme), (32, 64, 128, 256), batches, loss=loss_of,
            optimizer=lambda model: torch.optim.AdamW(parameter_groups(model, lr=rate), lr=rate),
            modules=r"layers\.\d\.(self_attn|mlp)$|lm_head",
        )  # fmt: skip
        assert {(one.width, one.step) for one in found} == {(w, s) for w in (32, 64, 128, 256) for s in range(5)}
        return growth(found, step)

    ours, standard = slopes("spectral_mup", 0.02, 4), slopes("standard", 0.02, 4)
    mlps = [name for name in ours if name.endswith("mlp")]
    assert mlps
    assert max(abs(ours[name]) for name in mlps) < 0.3 < 0.6 < min(standard[name] for name in mlps)


def test_slopes_are_powers_of_the_width() -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.flat, self.grows = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x).sum() + self.grows(x * self.width).sum()

    found = coordinate_check(
        Wide, (2, 4, 8), [torch.ones(1, 1)], optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0), loss=lambda m, x: m(x)
    )
    assert growth(found, 1) == pytest.approx({"flat": 0.0, "grows": 1.0}, abs=1e-6)
    with pytest.raises(ValueError, match="two different widths"):
        coordinate_check(Wide, (2,), [torch.ones(1, 1)], optimizer=adamw, loss=loss_of)
    with pytest.raises(ValueError, match="matches no module"):
        coordinate_check(Wide, (2, 4), [torch.ones(1, 1)], optimizer=adamw, loss=lambda m, x: m(x), modules="nothing")


def final_loss(width: int, scheme: str, rate: float, steps: int = 32) -> float:
    torch.manual_seed(1)
    model = model_of(width, scheme)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=rate, weight_decay=0.0), lr=rate, betas=(0.9, 0.95))
    scheduler = ScheduleLR(optimizer, Schedule(total_steps=steps, warmup_steps=5, decay="linear"))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, text(16, step)).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float(loss_of(model, text(128, 9999)))


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    """A CPU is many times slower on the tiny gradients of models that diverge."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("flush_denormal")
def test_the_best_rate_of_a_narrow_model_serves_one_four_times_as_wide_where_standards_does_not() -> None:
    exponents = range(2, 9)

    def regret(scheme: str) -> tuple[int, float]:
        """Return by how many powers of two the best rate moves, and what it costs to keep the narrow model's."""
        narrow, wide = ([final_loss(width, scheme, 2.0**-e) for e in exponents] for width in (32, 128))
        best, kept = min(wide), narrow.index(min(narrow))
        return abs(wide.index(best) - kept), wide[kept] - best

    moved, cost = regret("spectral_mup")
    assert moved <= 1
    assert cost < 0.02
    moved, cost = regret("standard")
    assert moved >= 1
    assert cost > 0.05
