"""What tensor parallelism takes for granted of a module before it cuts it.

A style promises the numbers of the whole module from parts of its weights. That holds for one ``forward``, which is known here,
on a ``weight`` (and a ``bias``) that are plain parameters of that very module. A subclass that does more, a parametrisation
(weight or spectral norm, pruning), an adapter inside, a quantised weight: each computes another thing from a part than from the
whole, or keeps its weight where no cut reaches it. So everything else is refused, by its full class name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from kenotron.models.head import Head
from kenotron.models.layers import RMSNorm
from kenotron.models.mixer import GatedNorm
from kenotron.parallel._torch import FakeTensor
from kenotron.parallel.shards import canonical

_REMEDY = "Leave it and the linears it works with out of the plan, so that each tp rank keeps them whole, or set tp=1."


def class_name(module: object) -> str:
    """Return the full name of a module's class."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def enclosing(name: str) -> str:
    """Return the name of the module around another one, or around the wrappers (``torch.compile``'s) that it is in."""
    while name and not canonical(name.rpartition(".")[2]):
        name = name.rpartition(".")[0]
    return name.rpartition(".")[0]


def check_linear(module: nn.Module, name: str, style: str) -> None:
    """Raise ``ValueError`` unless a module multiplies by its weight, adds its bias, and does nothing else."""
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"plan[{name!r}] = {style!r} applies to nn.Linear, but the module is a {class_name(module)}. Leave it out of the "
            "plan (it is then kept whole on every tp rank), or use an nn.Linear."
        )
    forwards = (nn.Linear.forward, Head.forward) if style == "vocab_head" else (nn.Linear.forward,)
    _check_forward(module, name, style, forwards)
    _check_parameters(module, name, style, ("weight", "bias"))


def check_norm(module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` unless a module is one of the norms of which the sum over split features is known."""
    if not isinstance(module, (RMSNorm, GatedNorm)):
        raise ValueError(f"plan[{name!r}] = 'split_norm' applies to kenotron's norms, not to {class_name(module)}.")
    _check_forward(module, name, "split_norm", (RMSNorm.forward, GatedNorm.forward))
    _check_parameters(module, name, "split_norm", ("weight",))


def check_rows(module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` unless all that a module has lies along the first dimension of its own parameters."""
    _check_parameters(module, name, "split_rows", tuple(module._parameters))


def check_embedding(module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` unless a module can look up its rows over several ranks."""
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"plan[{name!r}] = 'vocab_embedding' applies to nn.Embedding, not to {class_name(module)}.")
    if module.max_norm is not None:
        raise ValueError(
            f"{name} has max_norm={module.max_norm}, which a vocabulary-parallel embedding can't apply. Set max_norm=None, or "
            "leave it and the head out of the plan."
        )
    if "forward" in module.__dict__:
        _check_forward(module, name, "vocab_embedding", ())
    _check_parameter(module, name, "vocab_embedding", "weight")


def _check_forward(module: nn.Module, name: str, style: str, known: tuple[Callable[..., Any], ...]) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"plan[{name!r}] = {style!r}: the forward of this {class_name(module)} has been replaced, and may do other things "
            f"with a part of the weight than with the whole. {_REMEDY}"
        )
    if type(module).forward not in known:
        raise ValueError(
            f"plan[{name!r}] = {style!r}: {class_name(module)} has a forward of its own, which may do other things with a part "
            f"of the weight than with the whole. {_REMEDY}"
        )


def _check_parameters(module: nn.Module, name: str, style: str, known: tuple[str, ...]) -> None:
    for key in known:
        if key == "weight" or getattr(module, key, None) is not None:
            _check_parameter(module, name, style, key)
    further = [key for key, _ in module.named_parameters() if key not in known]
    if further:
        raise ValueError(
            f"plan[{name!r}] = {style!r}: {class_name(module)} has further parameters ({', '.join(further[:4])}), of which "
            f"the plan does not say what becomes of them. {_REMEDY}"
        )


def _check_parameter(module: nn.Module, name: str, style: str, key: str) -> None:
    """Raise ``ValueError`` unless ``module.key`` is a parameter as torch makes them."""
    param = module._parameters.get(key)
    if param is None:
        how = "is made anew in each call" if hasattr(module, key) else "is missing"
        raise ValueError(
            f"plan[{name!r}] = {style!r}: {key} of {class_name(module)} is no parameter of it but {how} (weight norm, spectral "
            f"norm, pruning, another parametrisation), so that there is nothing to cut. {_REMEDY}"
        )
    if type(param) not in (nn.Parameter, FakeTensor):  # the planner cuts those, which have no data
        raise ValueError(
            f"plan[{name!r}] = {style!r}: {key} of {class_name(module)} is a {class_name(param)}, not a plain nn.Parameter, "
            f"and can't be cut. {_REMEDY}"
        )


# ---- Hooks that others have hung on ------------------------------------------------------------------------------------


def watch_hooks(hooks: dict[int, Any], name: str, what: str) -> None:
    """Let hooks that find a part of something look at it, but change nothing.

    Args:
        hooks: of a module, as torch keeps them. name: of the module. what: they find.
    """
    for key, hook in list(hooks.items()):
        hooks[key] = functools.partial(_observe, hook, name, what)


def _observe(hook: Callable[..., Any], name: str, what: str, *args: Any) -> None:
    if hook(*args) is not None:
        raise ValueError(
            f"tp > 1: a hook on {name!r} changes {what}, of which it finds this rank's part alone. Leave this linear and those "
            "that it works with out of the plan, or set tp=1."
        )
