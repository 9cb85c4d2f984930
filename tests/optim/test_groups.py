"""Groups follow rules that see the whole module on every rank: decay by kind, overrides by name, the same groups anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import SIZES, Run, decoder, experts, train
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
)

from kenotron.models import Mamba
from kenotron.optim import Rule, muon_groups, parameter_groups
from kenotron.optim.weights import find_weights
from kenotron.testing import RankPool, RanksFailedError

SMALL = {**SIZES, "pad_token_id": None}
HUGGING_FACE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "phi3": Phi3Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=2, head_dim=4),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8),
}


def names_by_decay(module: nn.Module) -> dict[bool, set[str]]:
    names = {id(weight.param): weight.name for weight in find_weights(module)}
    groups = parameter_groups(module, lr=1.0, weight_decay=0.5)
    return {
        decays: {names[id(p)] for group in groups for p in group["params"] if (group["weight_decay"] > 0) == decays}
        for decays in (True, False)
    }


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_norms_biases_and_embeddings_do_not_decay(name: str) -> None:
    model = AutoModelForCausalLM.from_config(HUGGING_FACE[name])
    found = names_by_decay(model)
    expected = {
        n
        for n, p in model.named_parameters()
        if p.ndim >= 2 and not n.endswith("bias") and not any(key in n for key in ("embed", "wte", "wpe"))
    }
    assert found[True] == expected
    assert found[True] | found[False] == {n for n, _ in model.named_parameters()}
    assert len(parameter_groups(model, lr=1.0)) == 2


def test_a_state_spaces_decays_do_not_decay() -> None:
    model = Mamba(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, tie_word_embeddings=False))
    still = names_by_decay(model)[False]
    assert all(f"backbone.layers.0.mixer.{name}" in still for name in ("A_log", "D", "dt_proj.bias", "conv1d.bias"))
    assert "backbone.layers.0.mixer.x_proj.weight" not in still


class Loose(nn.Module):
    """Parameters of the module itself, a scalar, a convolution, a bias that is a matrix, and one frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.ones(3))
        self.table = nn.Parameter(torch.ones(3, 3))
        self.position_bias = nn.Parameter(torch.ones(3, 3))
        self.conv = nn.Conv1d(3, 3, 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_loose_parameters_go_by_name_and_dimensions() -> None:
    assert names_by_decay(Loose())[True] == {"table", "conv.weight", "frozen.weight"}


def test_overrides_by_name_and_the_last_one_decides() -> None:
    rules = [
        Rule(pattern=r"layers\.0\.", lr_scale=0.5, weight_decay=0.2),
        Rule(pattern=r"embed_tokens", weight_decay=0.3, betas=(0.8, 0.9)),
        Rule(pattern=r"layers\.0\.mlp\.", lr_scale=0.25),
    ]
    model = decoder()
    names = {id(weight.param): weight.name for weight in find_weights(model)}
    groups = parameter_groups(model, lr=0.1, weight_decay=0.4, rules=rules)
    by_name = {names[id(p)]: group for group in groups for p in group["params"]}
    for name, group in by_name.items():
        first = name.startswith("model.layers.0.")
        is_matrix = name.endswith("proj.weight") or name.startswith("lm_head")
        assert group["lr"] == 0.1 * ((0.25 if ".mlp." in name else 0.5) if first else 1.0)
        assert group["weight_decay"] == (0.2 if first else 0.3 if "embed" in name else 0.4 if is_matrix else 0.0)
        assert group.get("betas") == ((0.8, 0.9) if "embed" in name else None)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert [g["betas"] for g in optimizer.param_groups].count((0.8, 0.9)) == 1
    assert len(groups) == 5  # equal settings are one group


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"pattern": "["}, "no regular expression"),
        ({"pattern": "x"}, "sets nothing"),
        ({"pattern": "x", "lr_scale": -1.0}, "lr_scale=-1.0"),
        ({"pattern": "x", "weight_decay": float("nan")}, "weight_decay=nan"),
        ({"pattern": "x", "betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_rules_that_say_nothing_are_refused(rule: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule(**rule)


def test_a_rule_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"matches no weight.*model\.embed_tokens"):
        parameter_groups(decoder(), lr=1.0, rules=[Rule(pattern="embbed", lr_scale=2.0)])
    with pytest.raises(ValueError, match="matches no matrix"):
        muon_groups(decoder(), adamw=["embed_tokens"])
    with pytest.raises(ValueError, match="lr=-1"):
        parameter_groups(decoder(), lr=-1)


def kinds(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {weight.name: (weight.kind, weight.parts, weight.transposed) for weight in find_weights(model)}


def test_matrices_and_their_parts_are_known() -> None:
    phi, mixtral = (kinds(AutoModelForCausalLM.from_config(HUGGING_FACE[name])) for name in ("phi3", "mixtral"))
    oss, gpt2 = (kinds(AutoModelForCausalLM.from_config(HUGGING_FACE[name])) for name in ("gpt_oss", "gpt2"))
    own, own_experts = kinds(decoder()), kinds(experts())
    assert phi["model.layers.0.self_attn.qkv_proj.weight"] == ("matrix", (16, 8, 8), False)
    assert phi["model.layers.0.mlp.gate_up_proj.weight"] == ("matrix", (24, 24), False)
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"] == ("experts", (24, 24), False)
    assert oss["model.layers.0.mlp.experts.gate_up_proj"] == ("experts", (), True)
    assert gpt2["transformer.h.0.mlp.c_fc.weight"] == ("matrix", (), True)
    assert own["model.layers.0.self_attn.qkv_proj.weight"] == ("matrix", (16, 8, 8), False)
    assert own["model.layers.0.self_attn.o_proj.weight"] == ("matrix", (), False)
    assert own_experts["model.layers.1.mlp.experts.gate_up_proj"] == ("experts", (24, 24), False)
    assert own_experts["model.layers.1.mlp.experts.down_proj"] == ("experts", (), False)
    assert own["lm_head.weight"][0] == "head"
    assert own["model.embed_tokens.weight"][0] == "embedding"


def test_a_tied_weight_counts_once_as_an_embedding() -> None:
    model = decoder(tie_word_embeddings=True)
    (weight,) = [w for w in find_weights(model) if w.name == "model.embed_tokens.weight"]
    assert (weight.kind, len(weight.uses)) == ("embedding", 2)
    groups = muon_groups(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def tied() -> nn.Module:
    return decoder(tie_word_embeddings=True)


RULES = (Rule(pattern=r"layers\.1\.", lr_scale=0.5), Rule(pattern="embed_tokens", lr_scale=0.1))


def ruled(module: nn.Module) -> Any:
    groups = parameter_groups(module, lr=0.01, rules=RULES)
    module.__dict__["seen"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    names = {id(w.param): w.name for w in find_weights(module)}
    module.__dict__["named"] = [[names[id(p)] for p in group["params"]] for group in groups]
    return torch.optim.AdamW(groups, lr=0.01)


def groups_on_this_rank(run: Run) -> Any:
    """Train, and return what the groups were, with the names in each."""
    seen: list[Any] = []

    def spy(module: nn.Module) -> Any:
        made = ruled(module)
        seen.append((module.__dict__["seen"], module.__dict__["named"]))
        return made

    train(Run(run.make, spy, run.strategy, steps=1))
    return seen[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, {"pp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3}, marks=pytest.mark.slow),
        (4, {"tp": 2, "pp": 2}),
    ],
)
def test_every_rank_of_any_layout_has_the_same_groups_of_the_same_names(
    optim_pool: RankPool, ranks: int, layout: dict[str, Any]
) -> None:
    (expected,) = optim_pool.run(groups_on_this_rank, 1, Run(tied, ruled, {}))
    for found in optim_pool.run(groups_on_this_rank, ranks, Run(tied, ruled, layout)):
        assert found == expected


def of_a_part(module: Any) -> Any:
    return torch.optim.AdamW(parameter_groups(module.model, lr=0.01))


def test_a_part_of_a_module_that_is_cut_into_stages_is_refused(optim_pool: RankPool) -> None:
    with pytest.raises(RanksFailedError, match=r"parameter_groups\(self"):
        optim_pool.run(train, 2, Run(tied, of_a_part, {"pp": 2}, steps=1))


def test_wrappers_of_compile_leave_names_and_kinds_alone() -> None:
    model = decoder()
    expected = kinds(model)
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        model.model.layers[index] = torch.compile(layer)  # type: ignore[union-attr, index, operator]
    assert kinds(model) == expected


def test_gradients_flow_into_all_groups() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, rules=[Rule(pattern="head", lr_scale=0.0)]), lr=0.01)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = torch.arange(8).view(1, 8)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"lm_head.weight"}
