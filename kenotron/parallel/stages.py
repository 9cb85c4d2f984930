"""Which part of a module each pipeline stage owns: blocks, units, costs, and the cut that balances them.

*Blocks* are the module's one list of like layers. *Units* are its children with parameters in registration order, with the
blocks expanded: the smallest pieces that a cut can separate. A stage owns a contiguous slice of the units.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

#: Cost of a unit is counted in multiplied weights per token; norms and the like are not free.
_ELEMENTWISE_COST = 0.25


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of a module in execution order.

    Args:
        names: fully qualified names.
        blocks: the name of the block list.
        first_block: index of the first block among ``names``.
        num_blocks: how many blocks there are.
        costs: multiplied weights per token of each unit.
    """

    names: tuple[str, ...]
    blocks: str
    first_block: int
    num_blocks: int
    costs: tuple[float, ...]


def find_blocks(root: nn.Module, blocks: str | None = None, hints: Sequence[str] = ()) -> str:
    """Return the name of the one list of like layers in ``root``.

    Args:
        blocks: what the user named: a full name or its unique end (``"layers"`` for ``"model.layers"``).
        hints: candidates known otherwise (a transformers config names them); the first one that exists is taken.

    Raises:
        ValueError: none is found, several are equally likely, or ``blocks`` names none.
    """
    lists = {name: module for name, module in root.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    if blocks is not None:
        matches = [name for name in lists if name == blocks or name.endswith("." + blocks)]
        if len(matches) == 1:
            return matches[0]
        known = ", ".join(sorted(name for name in lists if name)) or "none at all"
        problem = "names no ModuleList or Sequential" if not matches else f"is ambiguous ({', '.join(matches)})"
        raise ValueError(f"blocks={blocks!r} {problem}. Lists in this module: {known}. Set blocks to the full name of one.")
    for hint in hints:
        if hint in lists:
            return hint
    outermost = lists_of_like_layers(root)
    if not outermost:
        raise ValueError(
            "no block list found: pp > 1, sequence_parallel, recompute and compile need one nn.ModuleList (or Sequential) of "
            "at least two layers of the same class, with parameters. Set blocks='name.of.the.list', or leave them out."
        )
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in outermost}
    best = max(sizes, key=lambda name: sizes[name])
    rivals = [name for name in sizes if name != best and sizes[name] > sizes[best] // 2]
    if rivals:
        raise ValueError(
            f"several block lists found: {', '.join([best, *rivals])}. A pipeline runs over one of them: set blocks={best!r} "
            "to choose it; the others then stay whole on the first or last stage."
        )
    return best


def lists_of_like_layers(root: nn.Module, *, composite: bool = False) -> list[str]:
    """Return the names of the outermost lists of two or more layers of one class, with parameters.

    Args:
        composite: layers must have children of their own.
    """
    found = [name for name, module in root.named_modules() if name and _holds_like_layers(module, composite)]
    return [name for name in found if not any(name.startswith(other + ".") for other in found)]


def _holds_like_layers(module: nn.Module, composite: bool) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    if composite and not all(any(True for _ in child.children()) for child in children):
        return False
    kinds = {type(child) for child in children}
    return len(children) >= 2 and len(kinds) == 1 and all(any(True for _ in child.parameters()) for child in children)


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called: a ``ModuleList`` can't."""
    return type(module).forward is not nn.Module.forward


def find_units(root: nn.Module, blocks: str) -> Units:
    """Return the units of ``root`` around its list ``blocks``, in registration order.

    Raises:
        ValueError: a block is a container, of which only parts are called.
    """
    block_list = root.get_submodule(blocks)
    for name, block in block_list.named_children():
        if not has_forward(block):
            raise ValueError(
                f"{blocks}.{name} is a {type(block).__name__}, which has no forward: a pipeline is cut between blocks that are "
                "called. Make each block a module that calls its parts in its forward, or set pp=1."
            )
    names: list[str] = []
    for name, module in _children(root, "", blocks):
        if name == blocks:
            names.extend(f"{blocks}.{key}" for key, _ in block_list.named_children())
        elif any(True for _ in module.parameters()):
            names.append(name)
    num_blocks = len(list(block_list.children()))
    first_block = next(i for i, name in enumerate(names) if name.startswith(blocks + "."))
    costs = tuple(unit_cost(root.get_submodule(name)) for name in names)
    return Units(names=tuple(names), blocks=blocks, first_block=first_block, num_blocks=num_blocks, costs=costs)


def _children(module: nn.Module, prefix: str, blocks: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of ``module``; those that contain ``blocks`` are opened."""
    for name, child in module.named_children():
        full = prefix + name
        if blocks.startswith(full + "."):
            yield from _children(child, full + ".", blocks)
        else:
            yield full, child


def unit_cost(module: nn.Module) -> float:
    """Return the multiplied weights per token of one unit: matrices count their elements, table look-ups and vectors little."""
    cost = 0.0
    for child in module.modules():
        for param in child.parameters(recurse=False):
            looked_up = isinstance(child, nn.Embedding)
            cost += param.numel() * (0.0 if looked_up else _ELEMENTWISE_COST if param.ndim < 2 else 1.0)
    return cost


def balance(units: Units, num_stages: int) -> tuple[int, ...]:
    """Return the stage of each unit: contiguous, at least one block each, the costliest stage as cheap as can be.

    Units before the blocks belong to the first stage, units after them to the last one.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    if units.num_blocks < num_stages:
        raise ValueError(
            f"{units.blocks} has {units.num_blocks} blocks, fewer than the {num_stages} pipeline stages (pp × virtual_stages). "
            f"Set pp × virtual_stages to at most {units.num_blocks}."
        )
    first, last = units.first_block, units.first_block + units.num_blocks
    blocks = units.costs[first:last]
    before, after = sum(units.costs[:first]), sum(units.costs[last:])
    sizes = _split(blocks, num_stages, before, after)
    stages = [0] * first
    for stage, size in enumerate(sizes):
        stages += [stage] * size
    return tuple(stages + [num_stages - 1] * (len(units.names) - last))


def _split(costs: Sequence[float], parts: int, before: float, after: float) -> list[int]:
    """Return how many of ``costs`` each of ``parts`` contiguous parts takes, the largest sum being minimal (exact)."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    n = len(costs)

    def load(part: int, lo: int, hi: int) -> float:
        return total[hi] - total[lo] + (before if part == 0 else 0) + (after if part == parts - 1 else 0)

    # best[hi]: (largest load, sum of squares for ties, sizes) of the first `part + 1` parts over costs[:hi]
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for part in range(parts):
        following: dict[int, tuple[float, float, list[int]]] = {}
        for lo, (worst, squares, sizes) in best.items():
            for hi in range(lo + 1, n - (parts - part - 1) + 1):
                cost = load(part, lo, hi)
                entry = (max(worst, cost), squares + cost * cost, [*sizes, hi - lo])
                if hi not in following or entry[:2] < following[hi][:2]:
                    following[hi] = entry
        best = following
    return best[n][2]


def stages_from_user(units: Units, stages: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return unit names in the user's order and the stage of each, from one list of name patterns per stage.

    Raises:
        ValueError: a pattern names no unit, a unit is named twice or not at all, or a stage has no block.
    """
    owner: dict[str, int] = {}
    for stage, patterns in enumerate(stages):
        for pattern in patterns:
            matches = [name for name in units.names if fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(
                    f"stages[{stage}] names {pattern!r}, which is no unit of this module. Units: {', '.join(units.names)}."
                )
            for name in matches:
                if name in owner:
                    raise ValueError(f"stages names the unit {name!r} twice: on stage {owner[name]} and on stage {stage}.")
                owner[name] = stage
    missing = [name for name in units.names if name not in owner]
    if missing:
        raise ValueError(f"stages leaves out {', '.join(missing)}. Name every unit: {', '.join(units.names)}.")
    for stage in range(len(stages)):
        if not any(owner[name] == stage and name.startswith(units.blocks + ".") for name in owner):
            raise ValueError(f"stages[{stage}] holds no block of {units.blocks}. Give every stage at least one block.")
    order = sorted(owner, key=lambda name: (owner[name], list(owner).index(name)))
    return tuple(order), tuple(owner[name] for name in order)
