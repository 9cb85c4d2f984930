"""Doing something right before an update: after the closure that an optimizer may be given.

torch calls hooks before ``Optimizer.step`` before it calls the closure, in which Lightning runs forward and backward. So a hook
that is to come after that wraps the closure. LBFGS and its like call it several times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of ``Optimizer.step`` with its closure in a wrapper; ``None``: it has no closure.

    Args:
        args: positional ones; the first is the optimizer itself.
    """
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None
