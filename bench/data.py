"""Data: samples from a corpus by random access, what opening and resuming cost.

- samples: the tokens of shuffled samples, one by one, as datatrove's dataset returns them and as our source does: S + 1 ids in
  int64, in an order that lies in memory there and is computed here.
- batches: TokenData's stream, datatrove's ``DatatroveFileDataset`` and indexed reading as Megatron does it (a shuffled index
  of samples, an index of where samples begin in documents, both mapped from files, and reads of mapped tokens) serve the same
  ``.ds`` file: 16 samples of 2048 tokens in the order of a shuffled epoch, as contiguous tensors of inputs and labels, one
  batch each in turn; ours holds labels twice, for models that shift and for those that don't. "With positions" is what keeps
  documents apart.
  The ratio is of a batch's times, theirs over ours. The file is in the page cache: what is measured is the work of a sample.
- resuming: making the stream of a blend of three corpora and its first batch, at sample 0 and at sample 10⁹ + 7, in turns.
- opening: a corpus of 10¹² tokens (a file with a hole) and its first batch, in a fresh process: time, and resident memory
  above what the imports take.

    python bench/data.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ratios import spread, verdict

from kenotron.data.corpus import open_corpus
from kenotron.data.permutation import Permutation
from kenotron.data.source import ArraySource
from kenotron.data.stages import Stage, plan
from kenotron.data.stream import Sampling, Stream

LENGTH, BATCH = 2048, 16
DATATROVE_BAR, MEGATRON_BAR, RESUME_BAR = 3.0, 1.0, 2.0
OPEN_SECONDS, OPEN_BYTES = 1.0, 50e6

Serve = Callable[[int], Any]  # a batch's number to the batch


# -------------------------------------------------------------------------------------------------------- contestants


def write_corpus(path: Path, num_tokens: int) -> None:
    """Write a ``.ds`` file of documents of 600 tokens on average."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(2, 1200, num_tokens // 600 + 1))
    ends = np.append(ends[ends < num_tokens], num_tokens)
    rng.integers(0, 50_000, num_tokens).astype("<u2").tofile(path)
    ends.astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"words|2\n{num_tokens}\n{num_tokens} tokens")


def ours(path: Path, positions: bool = False) -> Serve:
    """Serve batches of the stream."""
    stages = [Stage(start_step=0, corpora={"corpus": 1.0}, sequence_length=LENGTH, global_batch_size=BATCH)]
    stream = Stream({"corpus": open_corpus(path)}, plan(stages), Sampling(mask_documents=positions))
    return lambda number: {name: torch.from_numpy(value) for name, value in stream.batch(number * BATCH, BATCH).items()}


def datatrove(path: Path, positions: bool = False) -> Serve:
    """Serve samples of datatrove's dataset, in a shuffled order that is in memory, as Nanotron does."""
    from datatrove.utils.dataset import DatatroveFileDataset

    dataset = DatatroveFileDataset(str(path), seq_len=LENGTH, token_size=2, return_positions=positions)
    order = np.random.default_rng(0).permutation(len(dataset))

    def serve(number: int) -> Any:
        samples = [dataset[int(order[i % len(order)])] for i in range(number * BATCH, (number + 1) * BATCH)]
        rows = torch.stack([torch.as_tensor(sample["input_ids"]) for sample in samples])
        batch = {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        if positions:
            batch["position_ids"] = torch.stack([torch.as_tensor(sample["positions"])[:-1] for sample in samples])
        return batch

    return serve


def our_samples(path: Path, **settings: bool) -> Serve:
    """Serve the tokens of samples, shuffled by a permutation, which is computed for many samples at a time as in Stream."""
    source, at_once = open_corpus(path), 64 * BATCH
    order = Permutation((source.num_tokens - 1) // LENGTH, 0)
    starts: dict[int, list[int]] = {}

    def serve(number: int) -> Any:
        block, first = divmod(number * BATCH, at_once)
        if block not in starts:
            places = np.arange(block * at_once, (block + 1) * at_once) % order.n
            starts[block] = (order(places) * LENGTH).tolist()
        return [source.read(start, start + LENGTH + 1) for start in starts[block][first : first + BATCH]]

    return serve


def datatrove_samples(path: Path, **settings: bool) -> Serve:
    """Serve the tokens of samples, in a shuffled order that is in memory."""
    from datatrove.utils.dataset import DatatroveFileDataset

    dataset = DatatroveFileDataset(str(path), seq_len=LENGTH, token_size=2)
    order = np.random.default_rng(0).permutation(len(dataset))
    return lambda number: [
        dataset[int(order[i % len(order)])]["input_ids"] for i in range(number * BATCH, (number + 1) * BATCH)
    ]


def megatron(path: Path) -> Serve:
    """Serve samples by indexed reading: shuffle index, sample index, tokens of each document that a sample touches."""
    tokens = np.memmap(path, dtype="<u2", mode="r")
    ends = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    starts = np.arange(0, len(tokens) - 1, LENGTH)
    documents = np.searchsorted(ends, starts, side="right")
    np.save(f"{path}.samples.npy", np.stack([documents, starts - begins[documents]], axis=1).astype(np.int64))
    np.save(f"{path}.shuffle.npy", np.random.default_rng(0).permutation(len(starts) - 1))
    sample_index, shuffle = (np.load(f"{path}.{name}.npy", mmap_mode="r") for name in ("samples", "shuffle"))

    def sample(number: int) -> np.ndarray:
        first, first_offset = sample_index[number]
        last, last_offset = sample_index[number + 1]
        if first == last:
            begin = begins[first]
            return tokens[begin + first_offset : begin + last_offset + 1].astype(np.int64)
        parts = [tokens[begins[first] + first_offset : ends[first]]]
        parts += [tokens[begins[document] : ends[document]] for document in range(first + 1, last)]
        parts.append(tokens[begins[last] : begins[last] + last_offset + 1])
        return np.concatenate(parts).astype(np.int64)

    def serve(number: int) -> Any:
        rows = [torch.from_numpy(sample(shuffle[i % len(shuffle)])) for i in range(number * BATCH, (number + 1) * BATCH)]
        batch = torch.stack(rows)
        return {"input_ids": batch[:, :-1].contiguous(), "labels": batch[:, 1:].contiguous()}

    return serve


# ------------------------------------------------------------------------------------------------------------- measures


def clock(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def random_access(
    theirs: Callable[..., Serve], num_tokens: int, repetitions: int, own: Callable[..., Serve] = ours, **settings: bool
) -> dict[str, Any]:
    """Return the ratios of times for a batch, theirs over ours."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "corpus.ds"
        write_corpus(path, num_tokens)
        contestants = [theirs(path, **settings), own(path, **settings)]
        for contestant in contestants:
            for number in range(5):
                contestant(number)
        times = [[clock(lambda: serve(n)) for serve in contestants] for n in range(5, 5 + repetitions)]  # noqa: B023
    median = [BATCH / sorted(column)[repetitions // 2] for column in zip(*times, strict=True)]
    return {**spread([a / b for a, b in times]), "told": f"{median[1]:,.0f} samples/s of ours, {median[0]:,.0f} of theirs"}


def resuming(repetitions: int) -> dict[str, Any]:
    """Return the ratios of times to begin at sample 0, over those to begin after 10⁹."""
    sources = {name: ArraySource(name, [np.zeros(1_000_000, np.int64)]) for name in "abc"}
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    segments = plan([Stage(start_step=0, corpora=weights, sequence_length=LENGTH, global_batch_size=BATCH)])

    def begin(sample: int) -> None:
        Stream(sources, segments, Sampling(), sample).batch(sample, BATCH)

    begin(0)
    times = [[clock(lambda: begin(sample)) for sample in (10**9 + 7, 0)] for _ in range(repetitions)]  # noqa: B023
    after = sorted(late for late, _ in times)[repetitions // 2]
    return {**spread([late / early for late, early in times]), "told": f"{after * 1e3:.1f} ms after 10⁹ samples"}


_OPENING = """
import resource, sys, time
import numpy as np
from kenotron.data.corpus import open_corpus
from kenotron.data.stages import Stage, plan
from kenotron.data.stream import Sampling, Stream
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
Stream.batch, np.ma
before, started = resident(), time.perf_counter()
source = open_corpus(sys.argv[1])
stages = [Stage(start_step=0, corpora={"big": 1.0}, sequence_length=2048, global_batch_size=16)]
batch = Stream({"big": source}, plan(stages), Sampling()).batch(10**8, 16)
assert source.num_tokens == 10**12 and batch["input_ids"].shape == (16, 2048)
print(time.perf_counter() - started, resident() - before)
"""


def opening(repetitions: int) -> dict[str, Any]:
    """Return seconds and bytes that a corpus of 10¹² tokens takes, of fresh processes."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "big.ds"
        with path.open("wb") as file:
            file.truncate(2 * 10**12)
        np.array([10**12 // 2, 10**12], dtype="<u8").tofile(f"{path}.index")
        Path(f"{path}.metadata").write_text(f"words|2\n{10**12}\n1 T tokens")
        found = []
        for _ in range(repetitions):
            done = subprocess.run([sys.executable, "-c", _OPENING, str(path)], capture_output=True, text=True, check=True)
            found.append([float(word) for word in done.stdout.split()])
    seconds, resident = (sorted(column) for column in zip(*found, strict=True))
    is_small = resident[-1] < OPEN_BYTES
    return {
        **spread([second / OPEN_SECONDS for second in seconds]),
        "told": f"{seconds[len(seconds) // 2] * 1e3:.0f} ms, {resident[-1] / 1e6:.1f} MB (bar {OPEN_BYTES / 1e6:.0f} MB)",
        "is_small": is_small,
    }


# ----------------------------------------------------------------------------------------------------------------- rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller file and fewer repetitions: under a minute")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="rows whose name matches this pattern")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_tokens, repetitions = (20_000_000, 100) if options.quick else (500_000_000, 1000)
    # name, bar, whether less is better, measure
    rows: list[tuple[str, float, bool, Callable[[], dict[str, Any]]]] = [
        (
            "samples over datatrove's",
            DATATROVE_BAR,
            False,
            lambda: random_access(datatrove_samples, num_tokens, repetitions, our_samples),
        ),
        ("batches over datatrove's", 1.0, False, lambda: random_access(datatrove, num_tokens, repetitions)),
        (
            "batches with positions over datatrove's",
            DATATROVE_BAR,
            False,
            lambda: random_access(datatrove, num_tokens, max(repetitions // 20, 8), positions=True),
        ),
        ("batches over Megatron's", MEGATRON_BAR, False, lambda: random_access(megatron, num_tokens, repetitions)),
        ("resuming after 10⁹ samples over at 0", RESUME_BAR, True, lambda: resuming(repetitions // 5)),
        ("opening 10¹² tokens, seconds", OPEN_SECONDS, True, lambda: opening(3 if options.quick else 10)),
    ]
    print(f"{'':<40} {'ratio':>6} {'quartiles':>15} {'bar':>6}")
    found = []
    for name, bar, less, measure in rows:
        if not fnmatch.fnmatch(name, options.only):
            continue
        figures = measure()
        ok = (figures["ratio"] <= bar if less else figures["ratio"] >= bar) and figures.get("is_small", True)
        row = {"name": name, "bar": bar, "ok": ok, **figures}
        found.append(row)
        quartiles = f"{row['low']:.3f} – {row['high']:.3f}"
        print(f"{name:<40} {row['ratio']:>6.3f} {quartiles:>15} {bar:>6.2f}  {verdict(row)}", flush=True)
        print(f"    {row['told']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
