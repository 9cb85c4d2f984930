"""Recorded tensors: what a replay computes is what would have been computed without a recording, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kenotron.parallel.deferred import Place, fingerprint, record_source, values
from kenotron.parallel.init import materialize, places_of
from kenotron.parallel.recording import recording
from kenotron.parallel.shards import Shards


def initialised() -> nn.Module:
    """A module with what people do to weights, by torch's initialisers and by hand."""
    m = nn.Module()
    m.linear, m.other = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.trunc_normal_(m.linear.weight, std=0.02)
    nn.init.orthogonal_(m.other.weight)
    m.old = nn.Parameter(torch.FloatTensor(5, 3))
    m.old.data.normal_()
    m.old.data[0] = 3
    m.old.data[1:3].mul_(2)
    m.other.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    m.drawn = nn.Parameter(torch.normal(0.0, 1.0, (20, 3)))
    m.transposed = nn.Parameter(m.linear.weight.detach().clone().t().contiguous() * 2)
    m.rows = nn.Parameter(m.drawn.data[:4].clone())
    m.copied = copy.deepcopy(m.linear)
    m.half = nn.Linear(4, 4).to("cpu", torch.bfloat16)
    m.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    m.lstm, m.normed = nn.LSTM(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    m.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    own = torch.Generator().manual_seed(3)
    m.noise = nn.Parameter(torch.eye(3).add_(torch.randn(3, 3, generator=own)))
    return m


def computed() -> nn.Module:
    """A module with values that depend on values, and buffers of numbers that are given."""
    m = nn.Module()
    steps = torch.arange(16)[:, None] / 10000 ** (torch.arange(8) / 8)
    m.register_buffer("positions", torch.sin(steps))
    m.register_buffer("table", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    m.register_buffer("given", torch.from_numpy(np.arange(4.0)))
    m.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)))
    m.register_buffer("where", m.mask.nonzero())
    m.register_buffer("order", torch.randperm(10))
    m.rates = [rate.item() for rate in torch.linspace(0, 0.3, 4)]
    m.listed = torch.rand(3).tolist()
    m.weight = nn.Parameter(torch.rand(3, 3))
    with torch.no_grad():
        m.weight[torch.tensor([True, False, True])] = 7.0
        if m.weight.sum() > 20:
            m.weight.mul_(0.5)
        m.new = nn.Parameter(m.weight.new_tensor([1.0, 2.0]))
        m.mixed = nn.Parameter(torch.tensor([m.weight[0, 0], 2.0]))
        m.total = nn.Parameter(torch.tensor(m.weight.numpy().sum()))
    return m


def loaded() -> nn.Module:
    """A module with stored weights, and constants that change after they were used."""
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(600, 600, bias=False), nn.Linear(600, 600, bias=False))
    m[0].load_state_dict(
        {"weight": torch.as_tensor(np.eye(4), dtype=torch.float32), "bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    )
    constant = torch.from_numpy(np.ones((600, 600), np.float32))
    with torch.no_grad():
        m[1].weight.copy_(constant)
        constant.mul_(2)
        m[2].weight.copy_(constant)
    return m


@pytest.mark.parametrize("build", [initialised, computed, loaded])
def test_a_replay_computes_what_was_built_without_a_recording(build):
    torch.manual_seed(0)
    expected = build()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with recording():
        found = build()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.is_meta for p in found.parameters()) > 0
    materialize(found, Shards(), {}, places_of(found), 0, torch.device("cpu"))
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    for name, value in expected.state_dict().items():
        mine = found.state_dict()[name]
        assert mine.dtype == value.dtype and mine.stride() == value.stride() and torch.equal(mine, value), name
    for key in ("rates", "listed"):
        assert getattr(found, key, None) == getattr(expected, key, None)


def test_tensors_that_are_no_buffers_are_made_as_well():
    with recording():
        module = nn.Module()
        module.scale, module.parts = torch.ones(2) * 3, [torch.arange(3), "text"]
        module.register_buffer("one", torch.zeros(4))
        module.register_buffer("same", module.one)
    materialize(module, Shards(), {}, places_of(module), 0, torch.device("cpu"))
    assert module.scale.tolist() == [3, 3] and module.parts[0].tolist() == [0, 1, 2] and module.parts[1] == "text"
    module.one.fill_(1)
    assert module.same.tolist() == [1, 1, 1, 1]


def test_attributes_and_hooks_of_a_parameter_stay_with_it():
    calls: list[str] = []
    with recording():
        module = nn.Linear(2, 2)
        module.weight.no_decay = True
        module.weight.register_hook(lambda grad: calls.append("hook"))
        module.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    materialize(module, Shards(), {}, places_of(module), 0, torch.device("cpu"))
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight.no_decay and calls == ["hook", "accumulated"]


class Stored:
    """Numbers that count up, and how many were read."""

    def __init__(self) -> None:
        self.read_elements = 0

    def read(self, offset: tuple[int, ...], into: Tensor) -> None:
        self.read_elements += into.numel()
        into.copy_(torch.arange(into.shape[0])[:, None].expand_as(into) + offset[0])


def test_stored_values_are_read_in_parts_unless_they_were_changed():
    with recording(draw=False):
        weight, changed = torch.rand(6, 2), torch.rand(6, 2)
        for tensor in (weight, changed):
            record_source(tensor, Stored())
        larger = torch.zeros(8, 2)
        larger[:6] = changed
    place = Place.of(weight)
    assert place is not None and place.source is not None
    found = Place.of(larger)
    assert found is not None and found.source is None
    assert found.value()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_what_is_overwritten_by_what_was_made_of_it_has_that_value():
    def build() -> list[Tensor]:
        torch.manual_seed(3)
        tensors = [torch.randn(6, 5) for _ in range(4)] + [torch.empty(40, 9)]
        tensors[0].copy_(tensors[0] / tensors[0].norm(dim=1, keepdim=True))
        for _ in range(3):
            tensors[1].copy_(tensors[1] @ tensors[0].T @ tensors[1])
        tensors[2].copy_(tensors[3] + tensors[2])
        tensors[3].copy_(tensors[2] * tensors[3])
        nn.init.trunc_normal_(tensors[4], std=0.02, a=-0.03, b=0.03)  # from torch 2.13 on it draws again what is outside
        return tensors

    expected = build()
    with recording():
        recorded = build()
    for want, tensor in zip(expected, recorded, strict=True):
        place = Place.of(tensor)
        assert place is not None
        assert torch.equal(place.value(), want)


def test_numbers_that_are_drawn_until_all_are_in_a_range_come_to_an_end_where_no_generator_moves():
    before = torch.get_rng_state()
    with recording(draw=False):
        first, second = (nn.init.trunc_normal_(torch.empty(64, 64), std=0.02, a=-0.03, b=0.03) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    found = [place.value() for tensor in (first, second) if (place := Place.of(tensor)) is not None]
    assert all(value.abs().max() <= 0.03 and value.std() > 0.01 for value in found) and len(found) == 2
    assert not torch.equal(*found)


def test_what_cannot_be_right_is_told():
    with recording():
        weight = nn.Parameter(torch.rand(3))
        with pytest.raises(ValueError, match="read-only"):
            weight.detach().numpy()[0] = 1
        module = nn.Module()
        module.empty = nn.Parameter(torch.empty(3))
    with pytest.raises(ValueError, match="empty was built in configure_model, and nothing gave it values"):
        materialize(module, Shards(), {}, places_of(module), 0, torch.device("cpu"))
    with recording():
        module.empty, module.twin = weight, nn.Parameter(weight.data)
    with pytest.raises(ValueError, match=r"empty, twin are parameters that share memory.*head\.weight = embed\.weight"):
        places_of(module)
    outside = torch.ones(3, device="meta")
    with recording(), pytest.raises(ValueError, match="made before it: it has no values"):
        outside.zero_()
    constant = torch.ones(2**19)
    with recording():
        copied = torch.empty(2**19).copy_(constant)
    constant.zero_()
    with pytest.raises(ValueError, match=r"changed after configure_model.*clone"):
        values([Place.of(copied)])


def test_ranks_that_build_otherwise_are_found_by_fingerprints():
    def build(seed: int, given: float, last: bool) -> int:
        torch.manual_seed(seed)
        with recording():
            weight = torch.empty(3).normal_().add_(torch.full((3,), given))
            weight.mul_(torch.tensor([given] * 3))
            if last:
                weight.zero_()
        place = Place.of(weight)
        assert place is not None
        return fingerprint(place)

    assert build(0, 1.0, False) == build(0, 1.0, False)
    assert len({build(0, 1.0, False), build(1, 1.0, False), build(0, 2.0, False), build(0, 1.0, True)}) == 4


def test_memory_whose_device_is_named_is_real():
    with recording():
        memory = torch.zeros(3, device="cpu")
        np.from_dlpack(memory)[:] = 2
        weight = nn.Parameter(torch.empty(3))
        weight.data.copy_(memory)
    place = Place.of(weight)
    assert place is not None and place.value().tolist() == [2, 2, 2]


def test_a_saved_state_dict_loads_inside_of_a_recording(tmp_path: Path):
    state = nn.Linear(3, 3).state_dict()
    torch.save(state, tmp_path / "state.pt")
    with recording():
        module = nn.Linear(3, 3)
        module.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True, weights_only=True))
    materialize(module, Shards(), {}, places_of(module), 0, torch.device("cpu"))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
