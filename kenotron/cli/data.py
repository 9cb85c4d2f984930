"""``kenotron data check``: all of a corpus read, and what is wrong with it."""

from __future__ import annotations

import argparse
import sys

from kenotron.data.corpus import CorpusError, FileCheck, check, find_tokenizer, open_corpus
from kenotron.data.masked import with_mask


def run(options: argparse.Namespace) -> int:
    """Check a corpus, tell what was found in each file, and return the exit code: 0 sound, 1 not, 2 it can't be opened."""
    try:
        source = open_corpus(options.path, token_size=options.token_size)
        with_mask(source)  # tells whether masks fit
        found = check(source, vocab_size=options.vocab_size, on_file=_tell)
    except (CorpusError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    tokenizer = find_tokenizer(options.path)
    largest = max(one.max_token_id for one in found)
    told = f", largest id {largest}" if largest >= 0 else ""
    told += f", tokenizer {tokenizer}" if tokenizer is not None else ""
    print(f"{len(found)} files: {source.num_documents:,} documents, {source.num_tokens:,} tokens{told}")
    num_wrong = sum(bool(one.problems) for one in found)
    print("sound" if not num_wrong else f"{num_wrong} of {len(found)} files are damaged")
    return 1 if num_wrong else 0


def _tell(found: FileCheck) -> None:
    for problem in found.problems:
        print(problem, file=sys.stderr)
    state = "ok" if not found.problems else "damaged"
    print(f"{found.path}: {found.num_documents:,} documents, {found.num_tokens:,} tokens: {state}", flush=True)
