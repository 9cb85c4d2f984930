"""What autocast asks of operations that torch does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocasting(x: Tensor) -> bool:
    """Return whether autocast is on where ``x`` is."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which products of ``x`` run; autocast leaves float64 alone, as it does for ``nn.Linear``."""
    is_cast = is_autocasting(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
