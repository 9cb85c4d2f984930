"""Accelerators: what their makers say that they can do, for utilisation and for planning, and how a few numbers leave one.

Figures are of dense matrices (no structured sparsity) with accumulation in fp32, from the makers' data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator.

    Args:
        name: as ``--device`` takes it.
        memory: bytes.
        memory_bandwidth: of its own memory, bytes/s.
        peak_flops: operations/s by ``bf16``, ``fp32`` and ``fp8``, each where it has it. ``fp16`` is as fast as ``bf16``.
        link_bandwidth: to its neighbours in the node, bytes/s in one direction.
        per_node: devices in a usual node.
        network_bandwidth: to other nodes, bytes/s in one direction for each device, of a usual cluster.
    """

    name: str
    memory: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    link_bandwidth: float
    per_node: int = 8
    network_bandwidth: float = 50 * _GIGA


def _device(
    name: str, memory: float, bandwidth: float, bf16: float, fp32: float, link: float, *, fp8: float | None = None,
    network: float = 50.0,
) -> Device:  # fmt: skip
    peak = {"bf16": bf16 * _TERA, "fp32": fp32 * _TERA} | ({} if fp8 is None else {"fp8": fp8 * _TERA})
    return Device(
        name=name, memory=memory * _GIGA, memory_bandwidth=bandwidth * _TERA, peak_flops=peak, link_bandwidth=link * _GIGA,
        network_bandwidth=network * _GIGA,
    )  # fmt: skip


#: By name. Memory in GB, its bandwidth in TB/s, bf16, fp32 and fp8 in TFLOP/s, links in GB/s, network in GB/s.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("v100", 32, 0.9, 125, 15.7, 150, network=12.5),  # fp16: it has no bf16
        _device("a100-40gb", 40, 1.555, 312, 19.5, 300, network=25),
        _device("a100", 80, 2.039, 312, 19.5, 300, network=25),
        _device("h100", 80, 3.35, 989, 67, 450, fp8=1979),
        _device("h100-pcie", 80, 2.0, 756, 51, 64, fp8=1513),
        _device("h200", 141, 4.8, 989, 67, 450, fp8=1979),
        _device("gh200", 96, 4.0, 989, 67, 450, fp8=1979),
        _device("b200", 180, 7.7, 2250, 75, 900, fp8=4500),
        _device("l4", 24, 0.3, 121, 30.3, 32, fp8=242, network=12.5),
        _device("l40s", 48, 0.864, 362, 91.6, 32, fp8=733, network=25),
        _device("a10", 24, 0.6, 125, 31.2, 32, network=12.5),
        _device("rtx-4090", 24, 1.008, 165, 82.6, 32, fp8=330, network=12.5),
        _device("mi250x", 128, 3.2, 383, 47.9, 200, network=25),
        _device("mi300x", 192, 5.3, 1307, 163, 448, fp8=2615),
    )
}

#: What torch calls them. The first that its name contains decides.
_NAMES = (
    ("H100 PCIe", "h100-pcie"), ("GH200", "gh200"), ("H100", "h100"), ("H200", "h200"), ("B200", "b200"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100-PCIE-40GB", "a100-40gb"), ("A100", "a100"), ("V100", "v100"), ("L40S", "l40s"), ("L4", "l4"), ("A10", "a10"),
    ("RTX 4090", "rtx-4090"), ("MI250X", "mi250x"), ("MI300X", "mi300x"),
)  # fmt: skip


def find(name: str) -> Device:
    """Return the device of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"The device {name!r} is not known. Take one of {', '.join(DEVICES)}.")
    return DEVICES[name]


def identify(device: torch.device) -> Device | None:
    """Return what is known of the hardware behind a torch device, None if nothing is, or if it is a CPU."""
    if device.type != "cuda":
        return None
    called = torch.cuda.get_device_name(device)
    name = next((name for part, name in _NAMES if part in called), None)
    return None if name is None else DEVICES[name]


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy a few numbers to the host, which goes on.

    Returns:
        The copy, and the event after which it may be read: ``None`` where that is at once.
    """
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
