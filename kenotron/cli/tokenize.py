"""``kenotron tokenize``: text into a corpus, with its progress."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kenotron.data import tokenize as data
from kenotron.data.corpus import CorpusError

#: Between two lines of progress, where nobody watches a bar.
_SECONDS_BETWEEN_LINES = 10.0


def run(options: argparse.Namespace) -> int:
    """Tokenise, say what was written, and return the exit code."""
    try:
        if options.shard_mb is not None and not options.shard_mb * 1e6 >= 1:
            raise ValueError(f"--shard-mb {options.shard_mb}: set it to more than 0.")
        with _Display() as display:
            report = data.tokenize(
                options.inputs,
                options.out,
                tokenizer=options.tokenizer,
                train_tokenizer=options.train_tokenizer,
                workers=options.workers,
                format=options.format,
                column=options.column,
                append_eos=options.append_eos,
                prepend_bos=options.prepend_bos,
                eos_token=options.eos_token,
                on_error=options.on_error,
                shard_bytes=None if options.shard_mb is None else int(options.shard_mb * 1e6),
                on_progress=display.show,
            )
    except (ValueError, ImportError, OSError, CorpusError, data.TokenizeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. What is finished stays in {options.out}: give the same command again to go on.", file=sys.stderr)
        return 130
    _tell(report)
    return 0


def _tell(report: data.TokenizeReport) -> None:
    for problem in report.problems:
        where = "" if problem.line is None else f", {'row' if problem.offset is None else 'line'} {problem.line}"
        print(f"skipped: {problem.file}{where}: {problem.kind}: {problem.message}", file=sys.stderr)
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in report.skipped.items())
    resumed = f"; {report.resumed_shards} of its files were there already" if report.resumed_shards else ""
    files = _count(report.num_shards, "file")
    print(
        f"{report.out}: {report.num_documents:,} documents, {report.num_tokens:,} tokens in {files} "
        f"from {_count(report.num_files, 'file')} of {report.num_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s{resumed}"
    )
    if skipped:
        print(f"skipped: {skipped}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Display:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._last = time.monotonic()
        if sys.stderr.isatty():
            percent, words = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[words]}")
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), percent, words, console=Console(stderr=True))
            self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, now: data.Progress) -> None:
        """Show how far it has come."""
        step = "training the tokenizer" if now.step == "train" else "tokenising"
        if self._bar is not None:
            if now.step not in self._tasks:
                self._tasks[now.step] = self._bar.add_task(step, total=now.total_bytes, words="")
            self._bar.update(self._tasks[now.step], completed=now.num_bytes, words=_words(now))
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            share = now.num_bytes / max(now.total_bytes, 1)
            print(f"{step}: {share:.0%}, {_words(now)}", file=sys.stderr, flush=True)


def _words(now: data.Progress) -> str:
    seconds = max(now.seconds, 1e-9)
    words = f"{(now.documents - now.resumed_documents) / seconds:,.0f} documents/s"
    if now.step == "tokenize":
        words += f", {(now.tokens - now.resumed_tokens) / seconds:,.0f} tokens/s"
    done = now.num_bytes - now.resumed_bytes
    if done:
        left = round((now.total_bytes - now.num_bytes) / done * seconds)
        words += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    return words
