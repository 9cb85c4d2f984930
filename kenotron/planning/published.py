"""Published figures of speed, by which the time model is calibrated and tested.

Which half a figure belongs to was settled before anything was fitted: within each table, in its order, the first calibrates,
the second tests, the third calibrates, and so on.

- torchtitan, docs of its benchmarks and issues: H100 of 96 GB HBM2e at 500 W; FSDP2 gathers in bf16. Of a batch that is not
  told the assumption stands in the row's note.
- Nanotron v0.5, the best configurations of its grid: MFU by all pairs of positions, sequences of 4096, 256 of them in a
  batch. Shapes follow from the sizes (Llama 3 with as many KV heads as heads and 131,072 words); microbatches are not told:
  the best that fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kenotron.devices import DEVICES, Device
from kenotron.planning.time import Software

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 2**20}
#: name -> a transformers configuration
MODELS: dict[str, dict[str, Any]] = {
    "8B": {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "70B": {**_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "405B": {**_LLAMA3, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
             "num_key_value_heads": 8},
    "1.34B": {**_LLAMA3, "vocab_size": 131072, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
              "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True},
    "3.57B": {**_LLAMA3, "vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
              "num_attention_heads": 24, "num_key_value_heads": 24, "tie_word_embeddings": True},
    "8.86B": {**_LLAMA3, "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32},
    "80B": {**_LLAMA3, "vocab_size": 131072, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 64},
}  # fmt: skip

#: Makers don't sell it by a name of its own: less bandwidth than the SXM with HBM3, and 500 W.
H100_HBM2E = Device(
    name="h100-hbm2e", memory=96e9, memory_bandwidth=2.4e12, peak_flops=DEVICES["h100"].peak_flops, link_bandwidth=450e9
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure and what it was measured with.

    Args:
        table: where it stands. model: a key of `MODELS`. device, devices, seq, batch: as of a job.
        settings: of the strategy; a ``microbatch`` that is left out is the best that fits.
        value: tokens/s of a device, or MFU by all pairs of positions where ``is_mfu``.
    """

    table: Literal["torchtitan", "Nanotron"]
    name: str
    model: str
    devices: int
    seq: int
    batch: int
    settings: dict[str, Any]
    value: float
    device: Device = H100_HBM2E
    is_mfu: bool = False
    compile: bool = False
    software: Software = field(default_factory=lambda: Software(scatters=True))
    note: str = ""

    @property
    def job_settings(self) -> dict[str, Any]:
        """What a job of this figure keeps to: axes that are not told are not used."""
        unused: dict[str, Any] = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp_replicate": 1, "schedule": "1f1b"}
        return {**unused, **self.settings}


def _titan(
    model: str, devices: int, value: float, local: int = 2, *, seq: int = 8192, fp8: bool = False, async_tp: bool = False,
    compile: bool = True, device: Device = H100_HBM2E, note: str = "", recompute: str = "selective", **settings: Any,
) -> Figure:  # fmt: skip
    model_axes = settings.get("tp", 1) * settings.get("pp", 1) * settings.get("cp", 1)
    sharded = 1 if settings.get("pp", 1) > 1 else 3
    words = ["compile" if compile else "eager", *(["fp8"] if fp8 else []), *(["async tp"] if async_tp else [])]
    sizes = [f"{key}{settings[key]}" for key in ("tp", "pp", "cp") if settings.get(key, 1) > 1]
    if settings.get("schedule"):
        sizes.append(settings["schedule"])
    microbatch = settings.pop("microbatch", 1 if settings.get("pp", 1) > 1 else local)
    return Figure(
        table="torchtitan",
        name=" ".join([model, f"× {devices}", *([f"{seq // 1024}k"] if seq != 8192 else []), *sizes, *words]),
        model=model, devices=devices, seq=seq, batch=devices // model_axes * local, value=value, device=device,
        compile=compile, software=Software(fp8=fp8, async_tp=async_tp, gathered_bytes=2, scatters=True), note=note,
        settings={
            "zero_stage": sharded, "recompute": recompute, "microbatch": microbatch,
            "sequence_parallel": settings.get("tp", 1) > 1, **settings,
        },
    )  # fmt: skip


_H200 = DEVICES["h200"]
_FULL: dict[str, Any] = {"recompute": "full"}
_405: dict[str, Any] = {"tp": 8, "pp": 8, "fp8": True, "async_tp": True, **_FULL, "note": "batches of 32 samples"}
TORCHTITAN: tuple[Figure, ...] = (
    _titan("8B", 8, 5762, compile=False),
    _titan("8B", 8, 6667),
    _titan("8B", 8, 8532, fp8=True),
    _titan("8B", 128, 5605, compile=False),
    _titan("8B", 128, 6514),
    _titan("8B", 128, 8380, fp8=True),
    _titan("8B", 8, 3890, 1, seq=32768, fp8=True, **_FULL),
    _titan("8B", 8, 2540, 1, seq=65536, cp=2, fp8=True, **_FULL),
    _titan("8B", 8, 1071, 1, seq=131072, cp=4, fp8=True, **_FULL),
    _titan("8B", 8, 548, 1, seq=262144, cp=8, fp8=True, **_FULL),
    _titan("70B", 256, 829, 16, tp=8, fp8=True, **_FULL),
    _titan("70B", 256, 876, 16, tp=8, fp8=True, async_tp=True, **_FULL),
    _titan("405B", 512, 100, 32, **_405, schedule="1f1b"),
    _titan("405B", 512, 128, 32, **_405, schedule="interleaved_1f1b", virtual_stages=2),
    _titan("70B", 256, 597, 16, tp=8, **_FULL),
    _titan("70B", 256, 652, 16, tp=8, async_tp=True, **_FULL),
    _titan("8B", 64, 4378, 8, tp=8, note="batch not told: 8 samples assumed"),
    _titan("8B", 64, 4809, 8, tp=8, async_tp=True, note="batch not told: 8 samples assumed"),
    _titan("8B", 32, 10938, device=_H200, fp8=True, note="batch not told: 2 samples assumed"),
    _titan("8B", 64, 10753, device=_H200, fp8=True, note="batch not told: 2 samples assumed"),
)


def _nanotron(model: str, nodes: int, mfu: float, dp: int = 1, tp: int = 1, pp: int = 1, zero: int = 0) -> Figure:
    sizes = [f"{name}{size}" for name, size in (("dp", dp), ("tp", tp), ("pp", pp)) if size > 1]
    return Figure(
        table="Nanotron",
        name=" ".join([model, f"× {nodes * 8}", *sizes, f"zero{zero}"]),
        model=model, devices=nodes * 8, seq=4096, batch=256, value=mfu / 100, is_mfu=True, device=DEVICES["h100"],
        settings={"tp": tp, "pp": pp, "zero_stage": zero, "sequence_parallel": tp > 1, "recompute": "none"},
    )  # fmt: skip


NANOTRON: tuple[Figure, ...] = (
    _nanotron("1.34B", 1, 44.3, 4, 1, 2, 1), _nanotron("3.57B", 1, 46.7, 4, 1, 2, 1), _nanotron("8.86B", 1, 45.2, 2, 1, 4, 1),
    _nanotron("1.34B", 2, 41.6, 8, 1, 2, 1), _nanotron("3.57B", 2, 43.8, 8, 1, 2, 1), _nanotron("8.86B", 2, 43.9, 4, 4, 1, 1),
    _nanotron("1.34B", 4, 38.4, 16, 1, 2, 1), _nanotron("3.57B", 4, 40.4, 16, 1, 2, 1),
    _nanotron("8.86B", 4, 43.3, 16, 1, 2, 1), _nanotron("80B", 4, 14.8, 1, 8, 4),
    _nanotron("1.34B", 8, 32.5, 32, 1, 2, 1), _nanotron("3.57B", 8, 35.5, 32, 1, 2, 1),
    _nanotron("8.86B", 8, 39.5, 32, 1, 2, 1), _nanotron("80B", 8, 30.7, 1, 4, 16),
    _nanotron("1.34B", 16, 29.5, 64, 2), _nanotron("3.57B", 16, 34.6, 32, 4), _nanotron("8.86B", 16, 36.3, 16, 8),
    _nanotron("80B", 16, 34.3, 1, 4, 32),
    _nanotron("1.34B", 32, 23.2, 64, 4), _nanotron("3.57B", 32, 26.8, 64, 4), _nanotron("8.86B", 32, 32.7, 32, 8),
    _nanotron("80B", 32, 30.8, 4, 4, 16, 1),
    _nanotron("1.34B", 64, 5.3, 128, 2, 2), _nanotron("3.57B", 64, 10.5, 128, 4), _nanotron("8.86B", 64, 18.7, 128, 4),
    _nanotron("80B", 64, 17.8, 32, 16, 1, 1),
)  # fmt: skip

CALIBRATE: tuple[Figure, ...] = TORCHTITAN[::2] + NANOTRON[::2]
TEST: tuple[Figure, ...] = TORCHTITAN[1::2] + NANOTRON[1::2]
