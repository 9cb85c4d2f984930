"""Tokenising: ``kenotron tokenize`` against ``tokenizers`` itself, on the same text, cores and tokenizer.

Text is the sources of Python's standard library, several times over, as JSON lines (a file a document) and as Parquet; the
tokenizer is a byte-level BPE of 4096 trained on it. Ours goes from the files to a finished, durable corpus, with its processes'
start and end. Theirs is one call of ``Tokenizer.encode_batch`` on all texts, in memory already, in a process that is warm, on
as many threads as ours has workers; nothing is read or written. Both take turns; the ratio is of tokens per second, ours
over theirs, of each pair.

    python bench/tokenization.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from ratios import spread, verdict

from kenotron.data.tokenize import tokenize

BAR = 0.9
VOCABULARY = 4096
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}

#: Times encode_batch, each time that a line comes in, and says how many tokens and seconds.
THEIRS = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
tokenizer.encode_batch(texts[:8])
for _ in sys.stdin:
    started = time.perf_counter()
    encodings = tokenizer.encode_batch(texts)
    seconds = time.perf_counter() - started
    print(sum(map(len, encodings)), seconds, flush=True)
    del encodings
"""


def source_texts() -> list[str]:
    """Return the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return [text for path in paths if (text := path.read_bytes().decode("utf-8", "replace"))]


def write_inputs(folder: Path, copies: int) -> int:
    """Write the text in both formats and train the tokenizer; return how many bytes of text there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = source_texts()
    with open(folder / "once.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenize(folder / "once.jsonl", folder / "trained", train_tokenizer=VOCABULARY)
    with open(folder / "text.jsonl", "w") as file:
        # Each copy with its own first line, so that no two documents are the same.
        many = [f"# {copy}\n{text}" for copy in range(copies) for text in texts]
        file.writelines(json.dumps({"text": text}) + "\n" for text in many)
    pq.write_table(pa.table({"text": many}), folder / "text.parquet", row_group_size=100)
    return sum(len(text.encode()) for text in many)


def compare(folder: Path, name: str, workers: int, repetitions: int) -> dict[str, Any]:
    """Return the ratios of tokens per second, ours over theirs."""
    tokenizer = str(folder / "trained" / "tokenizer" / "tokenizer.json")
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": str(workers > 1).lower()}
    command = [sys.executable, "-c", THEIRS, tokenizer, str(folder / "text.jsonl")]
    ratios, ours, theirs = [], 0.0, 0.0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(repetitions):
            process.stdin.write("\n")
            process.stdin.flush()
            tokens, seconds = map(float, process.stdout.readline().split())
            with tempfile.TemporaryDirectory(dir=folder) as out:
                started = time.perf_counter()
                report = tokenize(folder / name, Path(out, "corpus"), tokenizer=tokenizer, workers=workers)
                ours = report.num_tokens / (time.perf_counter() - started)
            assert report.num_tokens == tokens, "both must have done the same"
            theirs = tokens / seconds
            ratios.append(ours / theirs)
        process.stdin.close()
    return {**spread(ratios), "ours_tokens_per_s": ours, "theirs_tokens_per_s": theirs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less text and fewer repetitions: about three minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="rows whose name matches this pattern")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    repetitions = 3 if options.quick else 7
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bytes = write_inputs(folder, 2 if options.quick else 8)
        print(f"{num_bytes / 1e6:.0f} MB of text, {cores} cores")
        print(f"{'':<40} {'ratio':>6} {'quartiles':>15} {'bar':>6}")
        kinds, counts = ("jsonl", "parquet"), sorted({1, cores})
        rows = [(f"{kind}, workers: {workers}", f"text.{kind}", workers) for kind in kinds for workers in counts]
        for name, file, workers in rows:
            if not fnmatch.fnmatch(name, options.only):
                continue
            figures = compare(folder, file, workers, repetitions)
            row = {"name": name, "bar": BAR, "ok": figures["ratio"] >= BAR, **figures}
            found.append(row)
            quartiles = f"{row['low']:.3f} – {row['high']:.3f}"
            print(f"{name:<40} {row['ratio']:>6.3f} {quartiles:>15} {BAR:>6.3f}  {verdict(row)}", flush=True)
            print(f"    ours {row['ours_tokens_per_s']:,.0f} tokens/s, theirs {row['theirs_tokens_per_s']:,.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
