"""Check that activations keep their size, and the best learning rate its place, when a model grows wider.

    python examples/mup/check.py --quick      # under two minutes on two CPU cores
    python examples/mup/check.py              # wider models, more rates

Trains a small Llama-like decoder at several widths on sequences from a random Markov chain, with standard and with spectral
µTransfer parametrisation. Writes ``coordinates.png``, ``rates.png`` and ``results.json`` to ``--out``. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from kenotron.models import Decoder
from kenotron.optim import Coordinate, Schedule, ScheduleLR, coordinate_check, growth, parameter_groups, parametrise

WORDS, LENGTH, HEAD, BATCH, BASE_WIDTH = 64, 24, 16, 16, 32
SCHEMES = ("standard", "spectral_mup")


def make(width: int, scheme: str) -> nn.Module:
    """Return a decoder of two layers; widths differ in the number of heads."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Decoder(config)
    parametrise(model, scheme, base_width=BASE_WIDTH)  # type: ignore[arg-type]
    return model


def text(rows: int, seed: int) -> Tensor:
    """Return ``[rows, LENGTH]`` words, each drawn by the one before it."""
    odds = torch.softmax(2.0 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0)), -1)
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, WORDS, (rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        words.append(torch.multinomial(odds[words[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(words, 1)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    # With logits, so that the head is called and its outputs can be measured.
    loss: Tensor = model(input_ids=batch, labels=batch, return_logits=True).loss
    return loss


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=rate, weight_decay=0.0), lr=rate, betas=(0.9, 0.95))


def final_loss(width: int, scheme: str, rate: float, batches: Sequence[Tensor], held_out: Tensor) -> float:
    """Train once, and return the loss on words that were not trained on."""
    torch.manual_seed(1)
    model = make(width, scheme)
    optimizer = adamw(model, rate)
    scheduler = ScheduleLR(optimizer, Schedule(total_steps=len(batches), warmup_steps=len(batches) // 8, decay="linear"))
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float(loss_of(model, held_out))


def check_coordinates(scheme: str, widths: Sequence[int], rate: float) -> list[Coordinate]:
    return coordinate_check(
        lambda width: make(width, scheme),
        widths,
        [text(BATCH, seed) for seed in range(4)],
        optimizer=lambda model: adamw(model, rate),
        loss=loss_of,
        modules=r"embed_tokens$|layers\.1\.(self_attn|mlp)$|lm_head$",
        seeds=(1, 2, 3),
    )


def plot_coordinates(found: Mapping[str, list[Coordinate]], path: Path) -> None:
    """Draw the mean size of each activation over the width: one row for each parametrisation, one line for each step."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.module for one in found[SCHEMES[0]]))
    figure = Figure(figsize=(3.2 * len(names), 5.6), layout="constrained")
    axes = figure.subplots(len(found), len(names), squeeze=False, sharex=True, sharey="col")
    for row, (scheme, coordinates) in zip(axes, found.items(), strict=True):
        for axis, name in zip(row, names, strict=True):
            for step in sorted({one.step for one in coordinates}):
                points = [(one.width, one.size) for one in coordinates if (one.module, one.step) == (name, step)]
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{step}", label=f"after {step}")
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", title=f"{scheme}: {name.removeprefix('model.')}")
            axis.title.set_fontsize(8)
    for axis in axes[-1]:
        axis.set_xlabel("width")
    axes[0][0].set_ylabel("mean |activation|")
    axes[1][0].set_ylabel("mean |activation|")
    axes[0][-1].legend(title="updates", fontsize=7)
    figure.savefig(path, dpi=110)


def plot_rates(losses: Mapping[str, Mapping[int, Mapping[float, float]]], path: Path) -> None:
    """Draw the final loss over the learning rate: one picture for each parametrisation, one line for each width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(losses), sharey=True)
    for axis, (scheme, by_width) in zip(axes, losses.items(), strict=True):
        for index, (width, by_rate) in enumerate(by_width.items()):
            axis.plot(list(by_rate), list(by_rate.values()), marker="o", color=f"C{index}", label=f"width {width}")
            best = min(by_rate, key=by_rate.__getitem__)
            axis.plot([best], [by_rate[best]], marker="*", markersize=14, color=f"C{index}")
        axis.set_xscale("log", base=2)
        axis.set(title=scheme, xlabel="learning rate")
        axis.legend()
    axes[0].set_ylabel("loss on held-out words")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrower models and fewer rates")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the coordinate check")
    parser.add_argument("--out", type=Path, default=Path("mup"), help="folder for pictures and numbers")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # models this small gain nothing from more
    torch.set_flush_denormal(True)  # a CPU is many times slower on the tiny gradients of models that diverge
    begun = time.monotonic()

    widths = (32, 64, 128, 256) if options.quick else (32, 64, 128, 256, 512)
    coordinates = {scheme: check_coordinates(scheme, widths, options.rate) for scheme in SCHEMES}
    plot_coordinates(coordinates, options.out / "coordinates.png")
    last = max(one.step for one in coordinates[SCHEMES[0]])
    print(f"size of activations after {last} updates ~ width to the power of")
    slopes = {scheme: growth(found, last) for scheme, found in coordinates.items()}
    for scheme, by_module in slopes.items():
        print(f"  {scheme:<13}", "  ".join(f"{name.removeprefix('model.')} {slope:+.2f}" for name, slope in by_module.items()))

    swept = (32, 128) if options.quick else (32, 64, 128, 256)
    exponents = range(2, 9) if options.quick else range(2, 12)
    batches = [text(BATCH, seed) for seed in range(32 if options.quick else 100)]
    held_out = text(128, 9999)
    losses: dict[str, dict[int, dict[float, float]]] = {scheme: {} for scheme in SCHEMES}
    print(f"loss after training, over learning rates from 2^-{exponents[0]} to 2^-{exponents[-1]}")
    for scheme in SCHEMES:
        for width in swept:
            by_rate = {2.0**-e: final_loss(width, scheme, 2.0**-e, batches, held_out) for e in exponents}
            losses[scheme][width] = by_rate
            best = min(exponents, key=lambda e: by_rate[2.0**-e])
            print(
                f"  {scheme:<13} width {width:<4}",
                " ".join(f"{x:.3f}" for x in by_rate.values()),
                f"  best 2^-{best}",
                flush=True,
            )
    plot_rates(losses, options.out / "rates.png")
    print(keeping(losses))
    results: dict[str, Any] = {"growth": slopes, "losses": losses, "seconds": time.monotonic() - begun}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{options.out}/coordinates.png, {options.out}/rates.png, {results['seconds']:.0f} s")


def keeping(losses: Mapping[str, Mapping[int, Mapping[float, float]]]) -> str:
    """Say what it costs to keep the rate that is best for the narrowest model when training the widest."""
    lines = []
    for scheme, by_width in losses.items():
        narrow, wide = by_width[min(by_width)], by_width[max(by_width)]
        kept = wide[min(narrow, key=narrow.__getitem__)]
        lines.append(f"  {scheme:<13} {kept - min(wide.values()):.3f}")
    return f"what it costs to keep the best rate of width {min(by_width)} at width {max(by_width)}\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
