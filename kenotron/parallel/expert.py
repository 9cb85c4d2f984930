"""Expert parallelism of a module that knows nothing of it: each rank keeps some experts, and tokens travel to them.

An *experts module* holds the matrices of all experts of one layer, stacked along dimension 0, and is called with tokens and
the router's choice: ``forward(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]``. All of
transformers' MoE models have one, and so has ``kenotron.models.moe``. Here every rank keeps ``1 / ep`` of the stack, and a call
becomes:

1. own tokens: find the ranks that have a chosen expert. A token travels to each of them once, with its choices and weights.
2. all ranks of the group: exchange counts, then tokens (``all_to_all``).
3. tokens that arrived: one pair of token and expert a row, the module's own ``forward`` on them with k = 1. So any
   implementation of it serves: a loop, a grouped matrix product, one with biases or another gate.
4. sum the rows of each token, send them back, and sum at home what came from several ranks.

No token is dropped unless a capacity factor says so. Counts are made on the device and read on the host once a call, because
``all_to_all`` takes sizes from there.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kenotron.layout import divisors
from kenotron.parallel.collectives import all_to_all
from kenotron.parallel.expert_load import ExpertLoads, ExpertsCall
from kenotron.parallel.rows import add_rows, take_rows
from kenotron.parallel.shards import Shards, TensorShard, set_part

#: (index of the choice, -1 for one that was dropped; its weight)
Choices = tuple[Tensor, Tensor]


def find_experts(root: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules of ``root`` by name: three arguments, ``num_experts``, parameters stacked by expert."""
    return {name: module for name, module in root.named_modules() if _is_experts(module)}


def _is_experts(module: nn.Module) -> bool:
    count = getattr(module, "num_experts", None)
    own = list(module.parameters(recurse=False))
    stacked = isinstance(count, int) and all(p.ndim and p.shape[0] == count for p in own)
    return stacked and any(p.ndim >= 3 for p in own) and len(call_of(module).arguments) == 3


def call_of(module: nn.Module) -> ExpertsCall:
    """Return how an experts module is called, before it is spread."""
    return ExpertsCall(int(module.num_experts), tuple(inspect.signature(module.forward).parameters))  # type: ignore[arg-type]


def check_experts(root: nn.Module, experts: Mapping[str, nn.Module], ep: int) -> None:
    """Raise ``ValueError`` where the experts of ``root`` can't be spread over ``ep`` ranks."""
    if not experts:
        alike = [name for name, module in root.named_modules() if "expert" in type(module).__name__.lower()]
        raise ValueError(
            f"ep={ep}, but {type(root).__name__} has no experts modules: ones with num_experts, parameters [num_experts, …] "
            "and forward(hidden_states, top_k_index, top_k_weights), as transformers' MoE models have them"
            + (f" ({', '.join(alike[:4])}: of another kind)" if alike else "")
            + ". Set ep=1."
        )
    for name, module in experts.items():
        count = int(module.num_experts)  # type: ignore[arg-type]
        if count % ep:
            raise ValueError(f"{name} has {count} experts, which ep={ep} does not divide. Set ep to one of {divisors(count)}.")
        if any(p.dtype == torch.float16 for p in module.parameters()):
            raise ValueError(f"{name} has float16 weights, whose gradients expert parallelism can't scale. Use bfloat16.")


@dataclass(kw_only=True)
class ExpertParallel:
    """One rank's view of the ep axis.

    Args:
        group: the ranks over which experts are spread. rank, size: of this process in it.
        shards: filled with what this rank holds of each parameter.
        capacity_factor: an expert takes so many times its even share of a rank's pairs, those of the greatest weight;
            None: all.
        loads: told what is dropped.
    """

    group: ProcessGroup
    rank: int
    size: int
    shards: Shards
    capacity_factor: float | None = None
    loads: ExpertLoads | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    _is_silent: bool = False

    def apply(self, root: nn.Module, names: Iterable[str]) -> None:
        """Cut the experts modules called ``names``."""
        for name in names:
            module = root.get_submodule(name)
            self._cut(name, module)
            kind, call = type(module), call_of(module)
            module.__class__ = type(kind.__name__, (_SpreadExperts, kind), {"__module__": kind.__module__})
            module.__dict__["_spread"] = _Spread(self, name, call)
            self.modules[name] = module

    def _cut(self, name: str, module: nn.Module) -> None:
        for key, param in list(module._parameters.items()):
            if param is None:
                continue
            count = param.shape[0] // self.size
            shard = TensorShard(
                global_shape=tuple(param.shape), experts=(self.rank * count, count), replicas=tuple(range(self.shards.tp))
            )
            self.shards.by_name[f"{name}.{key}"] = shard
            set_part(param, shard.take(param.detach()).clone())

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Let experts return zeros without talking to anybody: only shapes matter, and other ranks may not be here."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    def run(
        self, forward: Callable[..., Tensor], params: list[nn.Parameter], num_experts: int, x: Tensor, choices: Choices
    ) -> Tensor:
        """Return what all experts make of the tokens ``x`` [T, H]; ``forward`` runs those that are here."""
        if self._is_silent:
            return torch.zeros_like(x)
        parcels = _pack(choices, num_experts // self.size, self.size, self.group)
        counts = parcels.sent, parcels.arrived
        rows = all_to_all(take_rows(x, parcels.token, parcels.sent), self.group, *counts)
        weights, index = (all_to_all(part, self.group, *counts) for part in (parcels.weights, parcels.index))
        # Choice by choice, so that within each no row appears twice and sums have one order.
        choice, row = torch.nonzero_static(index.T >= 0, size=sum(parcels.pairs)).unbind(1)
        inputs, weight = take_rows(rows, row, parcels.pairs), weights[row, choice, None]
        if sum(parcels.pairs):
            pairs = forward(inputs, index[row, choice, None], weight)
        else:  # every rank has a gradient for every parameter: FSDP2 reduces them together
            pairs = inputs + weight.sum() + torch.stack([p.reshape(-1)[:0].sum() for p in params]).sum().to(inputs.dtype)
        found = add_rows(pairs.to(x.dtype), row, parcels.pairs, rows.shape[0])
        back = all_to_all(found, self.group, parcels.arrived, parcels.sent)
        return add_rows(back, parcels.token, parcels.sent, x.shape[0])


def limit(choices: Choices, num_experts: int, capacity_factor: float) -> Choices:
    """Return the choices without those that exceed an expert's capacity: their index is -1, their weight 0."""
    index, weights = choices
    capacity = math.ceil(capacity_factor * index.numel() / num_experts)
    expert = index.flatten()
    by_weight = weights.detach().flatten().argsort(descending=True, stable=True)
    order = by_weight[expert[by_weight].argsort(stable=True)]
    counts = expert.new_zeros(num_experts + 1).index_add_(0, expert, torch.ones_like(expert))
    place = torch.arange(len(order), device=index.device) - (counts.cumsum(0) - counts)[expert[order]]
    is_over = torch.empty_like(expert, dtype=torch.bool).index_put_((order,), place >= capacity).view_as(index)
    return index.masked_fill(is_over, -1), weights.masked_fill(is_over, 0.0)


@dataclass(kw_only=True)
class _Parcels:
    """What this rank sends, ordered by the rank that gets it. R: rows, K: choices of a token.

    Args:
        token: [R], whose hidden state a row is. index, weights: [R, K], local experts (-1 for those elsewhere), weights.
        sent, arrived: rows for and from each rank. pairs: of token and expert that arrive, by choice.
    """

    token: Tensor
    index: Tensor
    weights: Tensor
    sent: list[int]
    arrived: list[int]
    pairs: list[int]


def _pack(choices: Choices, num_local: int, size: int, group: ProcessGroup) -> _Parcels:
    index, weights = choices
    owner = torch.div(index, num_local, rounding_mode="floor")
    is_there = owner == torch.arange(size, device=index.device)[:, None, None]  # [ranks, T, K]
    wanted = is_there.any(2)
    sent = torch.cat([wanted.sum(1, keepdim=True), is_there.sum(1)], dim=1)  # [ranks, 1 + K]: rows, and pairs by choice
    arrived = all_to_all(sent, group)
    counts = torch.cat([sent[:, :1].T, arrived.T]).tolist()  # the one read on the host
    to, token = torch.nonzero_static(wanted, size=sum(counts[0])).unbind(1)
    here = is_there[to, token]
    return _Parcels(
        token=token,
        index=torch.where(here, index[token] - to[:, None] * num_local, -1),
        weights=torch.where(here, weights[token], 0.0),
        sent=counts[0],
        arrived=counts[1],
        pairs=[sum(pairs) for pairs in counts[2:]],
    )


@dataclass(frozen=True)
class _Spread:
    """What a call of an experts module needs: the axis, its name, and how it is called."""

    axis: ExpertParallel
    name: str
    whole: ExpertsCall

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden, index, weights = self.whole.bind(args, kwargs)
        num_experts = self.whole.num_experts
        choices = index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])
        if self.axis.capacity_factor is not None:
            choices = limit(choices, num_experts, self.axis.capacity_factor)
            if self.axis.loads is not None and module.training and torch.is_grad_enabled():
                self.axis.loads.add_dropped(self.name, (choices[0] < 0).sum())
        params = [p for p in module.parameters(recurse=False) if p.requires_grad]

        def run_local(*tensors: Tensor) -> Tensor:
            module.num_experts = num_experts // self.axis.size  # type: ignore[assignment]
            try:
                out = forward(*tensors)
            finally:
                module.num_experts = num_experts  # type: ignore[assignment]
            if not isinstance(out, Tensor):
                raise ValueError(f"{type(module).__name__} returned {type(out).__name__}, not a tensor. Set ep=1.")
            return out

        out = self.axis.run(run_local, params, num_experts, hidden.reshape(-1, hidden.shape[-1]), choices)
        # No view of what was summed: FSDP2 hangs its hook on what a module returns, and in-place code would lose it.
        return out if hidden.ndim == 2 else out.view(hidden.shape).clone()


class _SpreadExperts:
    """Mixed into the class of every experts module that is spread."""

    _spread: _Spread

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._spread.call(self, super().forward, args, kwargs)  # type: ignore[arg-type, misc]
