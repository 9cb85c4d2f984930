"""How evenly a router spreads tokens over experts: measured at the experts themselves, on any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron.parallel.shards import canonical


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """What one layer's experts got since the last report, over all ranks.

    Args:
        load: [experts], the share of token-expert pairs that the router gave to each; the sum is one.
        dropped: 0-dim, the share of pairs that exceeded an expert's capacity.
        router_entropy: 0-dim, of the router's distribution over experts, mean over tokens, in nats: ``log(experts)`` where it
            knows no preference. NaN where no router's logits were seen.
    """

    load: Tensor
    dropped: Tensor
    router_entropy: Tensor

    @property
    def imbalance(self) -> Tensor:
        """The greatest load over the mean one (0-dim): 1 is even, the number of experts the worst."""
        return self.load.max() * self.load.numel()


class ExpertsCall(NamedTuple):
    """An experts module as it is called: how many experts, and the names of its three arguments."""

    num_experts: int
    arguments: tuple[str, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, choices and weights of a call."""
        hidden, index, weights = (*args, *(kwargs[name] for name in self.arguments[len(args) :]))
        return hidden, index, weights


class ExpertLoads:
    """Counts what routers choose in training, on the device; nothing is read on the host before ``report``.

    Args:
        experts: by name, on all ranks in the same order, also those of other pipeline stages.
        root: their module. device: of this rank.
    """

    def __init__(self, root: nn.Module, experts: Mapping[str, ExpertsCall], device: torch.device) -> None:
        self._experts = dict(experts)
        width = max((call.num_experts for call in experts.values()), default=0)
        # [layers, counts of the choice … | dropped, entropy, tokens with an entropy], summed over ranks as it is
        self._sums = torch.zeros(len(experts), width + 3, dtype=torch.float64, device=device)
        for row, name in enumerate(experts):
            module = root.get_submodule(name)
            if any(p.numel() for p in module.parameters(recurse=False)):
                self._watch(root, name, module, row)

    def _watch(self, root: nn.Module, name: str, module: nn.Module, row: int) -> None:
        count = self._experts[name].num_experts

        def count_choices(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                index = self._experts[name].bind(args, kwargs)[1].detach().flatten()
                counts = self._sums.new_zeros(count + 1)  # the last: a choice of no expert, as some routers mark it
                counts.index_add_(0, index.clamp(max=count), torch.ones_like(index, dtype=counts.dtype))
                self._sums[row, :count] += counts[:count]

        module.register_forward_pre_hook(count_choices, with_kwargs=True, prepend=True)
        parent = root.get_submodule(name.rpartition(".")[0])
        for router in parent.children():
            if router is not module and any(True for _ in router.parameters()):
                router.register_forward_hook(lambda m, args, out: self._add_entropy(m, out, row, count))

    @torch.no_grad()
    def _add_entropy(self, router: nn.Module, output: Any, row: int, count: int) -> None:
        logits = _logits(output, count)
        if logits is None or not router.training:
            return
        logits = logits.detach().float().reshape(-1, count)
        # Some routers return probabilities.
        is_probability = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)
        p = torch.where(is_probability[:, None], logits, logits.softmax(1))
        self._sums[row, -2] += torch.special.entr(p).sum(dtype=self._sums.dtype)
        self._sums[row, -1] += p.shape[0]

    def add_dropped(self, name: str, dropped: Tensor) -> None:
        """Count pairs that an experts module dropped (0-dim)."""
        self._sums[list(self._experts).index(canonical(name)), -3] += dropped

    def report(self, group: dist.ProcessGroup | None = None) -> dict[str, ExpertLoad]:
        """Return the load of each experts module since the last report, by name. All ranks of ``group`` call it.

        Args:
            group: all ranks of the job, if ``None``.
        """
        sums = self._sums.clone()
        self._sums.zero_()
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        return {name: _load(sums[row], call.num_experts) for row, (name, call) in enumerate(self._experts.items())}


def _load(sums: Tensor, count: int) -> ExpertLoad:
    pairs = sums[:count].sum()
    return ExpertLoad(
        load=(sums[:count] / pairs.clamp(min=1)).float(),
        dropped=(sums[-3] / pairs.clamp(min=1)).float(),
        router_entropy=(sums[-2] / sums[-1]).float(),
    )


def _logits(output: Any, count: int) -> Tensor | None:
    """Return the first tensor of floats with an entry for each expert; a field ``logits`` goes before."""
    named = getattr(output, "logits", None)
    parts: Sequence[Any] = (named,) if named is not None else output if isinstance(output, tuple) else (output,)
    found = (p for p in parts if isinstance(p, Tensor) and p.is_floating_point() and p.ndim and p.shape[-1] == count)
    return next(found, None)
