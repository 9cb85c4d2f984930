"""Whose gradient is only a share of it on each tp rank: read off autograd's graph, exactly, for any module.

What tensor parallelism did is in the graph of a loss. Going backward from it, gradients are whole, the same on every tp rank,
until a node is met behind which each rank computes with a part (a row-wise linear's sum, gathered outputs, logits split by
vocabulary): from there on gradients are shares, until one that sums them again (the entry of a column-wise linear). A parameter
that the plan leaves whole and that is found

- among whole gradients, has a whole gradient: nothing is owed;
- among shares (an activation's parameter between two split linears, a norm of heads, a scale of split logits), has a share: it
  is summed over tp before the update, whatever the plan says of it;
- among both, has a mixture that no sum makes right: hidden states went into split ones without passing the entry of a
  column-wise linear. That is refused.

Compiled code is one node of the graph, and what lies inside is not seen. So the first step runs uncompiled where it matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kenotron.parallel._torch import unsharded_parameters
from kenotron.parallel.shards import Shards

_WHOLE, _SHARE = 0, 1

#: What gradients are behind a node that communicates over the tp group, whatever they were before it.
_BEHIND = {
    "_CopyToBackward": _WHOLE,
    "_CopyTailToBackward": _WHOLE,
    "_ScatterToBackward": _WHOLE,
    "_ReduceFromBackward": _SHARE,
    "_GatherFromBackward": _SHARE,
    "_ReduceScatterToBackward": _SHARE,
}
#: The same for nodes of logits that are split by vocabulary, which is over the tp group always.
_BEHIND_LOGITS = {
    "_CrossEntropyBackward": _SHARE,
    "_LogNormalizerBackward": _SHARE,
    "_WrapBackward": _SHARE,
    "_AdoptBackward": _WHOLE,
}
_OPAQUE = "CompiledFunctionBackward"


def gradients_met(outputs: Iterable[Tensor], group: ProcessGroup) -> dict[Tensor, set[int]]:
    """Return every leaf that ``outputs`` depend on, with what its gradients are: whole (0), shares (1), or some of each.

    Args:
        outputs: whose gradients are whole. group: the tp axis.
    """
    found: dict[Tensor, set[int]] = {}
    waiting: list[tuple[Any, int]] = [(out.grad_fn, _WHOLE) for out in outputs if out.grad_fn is not None]
    seen: set[tuple[Any, int]] = set()  # holds on to the nodes: Python makes them anew, at the same place
    while waiting:
        node, state = waiting.pop()
        if (node, state) in seen:
            continue
        seen.add((node, state))
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.setdefault(leaf, set()).add(state)
            continue
        name = node.name()
        if name in _BEHIND and node.group == group:
            state = _BEHIND[name]
        state = _BEHIND_LOGITS.get(name, state)
        for further, _ in node.next_functions:
            if further is not None and not (name == _OPAQUE and hasattr(further, "variable")):
                waiting.append((further, state))
    return found


class ShareCheck:
    """Looks at the first backward passes of a run for parameters whose gradients are shares.

    Args:
        group: the tp axis. shards: what is cut, and which gradients are shares as far as the plan says so; others are added.
        parents: modules around row-wise linears. names: of all parameters.
    """

    _PASSES = 8  # a step may have several, of which each reaches other parameters

    def __init__(self, group: ProcessGroup, shards: Shards, parents: Iterable[str] = (), names: Iterable[str] = ()) -> None:
        self._group, self._partial = group, shards.partial
        self._cut = {name for name, shard in shards.by_name.items() if shard.dim is not None}
        inside = tuple(f"{parent}." if parent else "" for parent in parents)
        self._may_owe = any(name.startswith(inside) for name in set(names) - self._cut - self._partial)
        self._unseen: set[str] | None = None
        self._left = self._PASSES

    @property
    def is_done(self) -> bool:
        return self._left == 0

    @property
    def needs_graph(self) -> bool:
        """Tell whether blocks must run uncompiled now: parameters beside split linears were not seen in a graph yet."""
        return self._may_owe and not self.is_done

    def look(self, outputs: Iterable[Any], params: Mapping[str, nn.Parameter], root: nn.Module) -> None:
        """Find what is owed of the gradients of ``outputs``. All tp ranks call it with the same graph.

        Args:
            params: of ``root`` on this rank, by name.

        Raises:
            ValueError: gradients are a mixture of whole ones and shares.
        """
        if self._unseen is None:
            self._unseen = {name for name, param in params.items() if param.requires_grad and param.numel()} - self._cut
        names = {id(param): name for name, param in params.items()}
        names |= {id(whole): names[id(part)] for whole, part in unsharded_parameters(root) if id(part) in names}
        met = gradients_met([out for out in outputs if isinstance(out, Tensor)], self._group)
        kinds: dict[str, set[int]] = {}
        for leaf, states in met.items():
            name = names.get(id(leaf))
            if name is not None and name not in self._cut:
                kinds.setdefault(name, set()).update(states)
        mixed = sorted(name for name, states in kinds.items() if len(states) == 2)
        if mixed:
            raise ValueError(
                f"tp > 1: {', '.join(mixed[:4])}{' and others' if len(mixed) > 4 else ''} would get gradients that are neither "
                "whole nor shares: between a column-wise linear and the row-wise one behind it, what the first returns is "
                "computed with something that did not come through a linear of the plan. Give that a column-wise linear, or "
                "leave these linears out of the plan, or set tp=1."
            )
        self._partial.update(name for name, states in kinds.items() if states == {_SHARE})
        self._unseen -= kinds.keys()
        self._left = self._left - 1 if self._unseen else 0
