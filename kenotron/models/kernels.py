"""Kernels of the packages mamba-ssm and causal-conv1d, where they are installed, in the form of :mod:`kenotron.models.scan`.

They run on CUDA alone. What they can't do (a state to begin with, for Mamba; documents, for Mamba) the plain scans do.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor

from kenotron.models import scan

SCANS = ("auto", "mamba_ssm", "torch")
_PACKAGES = ("mamba_ssm", "causal_conv1d")


def check_scan(name: str) -> None:
    """Raise ``ValueError`` for a scan that does not exist, or whose packages are not installed."""
    if name not in SCANS:
        raise ValueError(f"scan={name!r} is unknown. Set scan to one of {', '.join(map(repr, SCANS))}.")
    if name == "mamba_ssm" and not _is_installed():
        raise ValueError("scan='mamba_ssm' needs the packages mamba-ssm and causal-conv1d. Install them, or set scan='torch'.")


def choose_scan(device: torch.device) -> str:
    """Return the fastest scan that runs on ``device``."""
    return "mamba_ssm" if device.type == "cuda" and _is_installed() else "torch"


def _is_installed() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES)


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def documents_of(starts_BS: Tensor | None) -> Tensor | None:
    """Return the number of each position's document, int32, as the kernels want it."""
    return None if starts_BS is None else starts_BS.cumsum(1).to(torch.int32)


def causal_conv(x_BSI: Tensor, weight_I1K: Tensor, bias_I: Tensor | None, starts_BS: Tensor | None) -> Tensor:
    """Return the convolution of :func:`~kenotron.models.scan.causal_conv` with a SiLU behind it."""
    convolve = _function("causal_conv1d", "causal_conv1d_fn")
    # A transposed view is what the kernel wants for documents: channels lie side by side.
    out = convolve(
        x_BSI.contiguous().transpose(1, 2), weight_I1K[:, 0], bias_I, seq_idx=documents_of(starts_BS), activation="silu"
    )
    return cast(Tensor, out.transpose(1, 2))


def selective_scan(
    x_BSI: Tensor,
    dt_BSI: Tensor,
    A_IN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    state_BIN: Tensor | None,
    starts_BS: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return the scan of Mamba, see :func:`~kenotron.models.scan.selective_scan`."""
    if kernel == "mamba_ssm" and state_BIN is None and starts_BS is None:
        fused = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        x, dt, B, C = (t.transpose(1, 2).contiguous() for t in (x_BSI, dt_BSI.to(x_BSI.dtype), B_BSN, C_BSN))
        y, state = fused(x, dt, A_IN, B, C, return_last_state=True)
        return y.transpose(1, 2), state
    return _plain_selective_scan(x_BSI, dt_BSI, A_IN, B_BSN, C_BSN, initial_BIN=state_BIN, starts_BS=starts_BS)


# Its loop over positions would be unrolled.
_plain_selective_scan = torch.compiler.disable(scan.selective_scan)


def chunk_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    state_BHPN: Tensor | None,
    starts_BS: Tensor | None,
    kernel: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return the scan of Mamba-2, see :func:`~kenotron.models.scan.chunk_scan`.

    Args:
        chunk: of the kernel. The plain scan has its own, which is better for a cache.
    """
    if kernel == "mamba_ssm":
        fused = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        y, state = fused(
            x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size=chunk, initial_states=state_BHPN,
            seq_idx=documents_of(starts_BS), return_final_states=True,
        )  # fmt: skip
        return y, state
    return scan.chunk_scan(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, initial_BHPN=state_BHPN, starts_BS=starts_BS)
