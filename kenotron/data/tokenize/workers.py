"""Processes that tokenise shards. Which of them does which has no influence on what is written."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kenotron.data.tokenize.documents import Document, PieceReader
from kenotron.data.tokenize.inputs import Piece
from kenotron.data.tokenize.shards import BadInputError, Settings, tokenize_shard
from kenotron.data.tokenize.vocabulary import Encoder, train_tokenizer

#: A task: the function and its arguments. It is given a function as well, which sends what it is called with.
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class WorkerError(RuntimeError):
    """A worker ended without a word (killed, by the system when memory was short perhaps), or a library of storage failed."""


def run_tasks(tasks: list[Task], num_workers: int, num_threads: int) -> Iterator[tuple[int, str, Any]]:
    """Run tasks in processes of their own, and yield what they say: (number of the task, "told" or "done", what).

    Who stops iterating, by an error or a signal, ends the processes; and when this process is killed, they end by themselves.

    Args:
        tasks: begun in this order. num_workers: processes. num_threads: of ``tokenizers`` in each of them.

    Raises:
        WorkerError: a process is gone, or a library has raised what can't be sent.
        Exception: what a task has raised.
    """
    # Not fork: tokenizers, Arrow and fsspec have threads, whose locks would be copied as they stand.
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(tasks))[::-1]
    running: dict[Connection, int] = {}
    processes = []
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, num_threads), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            number, task = waiting.pop()
            running[ours] = number
            ours.send(task)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                kind, what = connection.recv()
                if kind == "failed":
                    raise what
                yield running[connection], kind, what
                if kind == "done":
                    if waiting:
                        running[connection], task = waiting.pop()
                        connection.send(task)
                    else:
                        del running[connection]
                        connection.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise WorkerError(
            "a worker process ended without a word. If it was killed for memory, use fewer workers; if this is a script of "
            "yours, call tokenize under `if __name__ == '__main__':`"
        ) from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(connection: Connection, num_threads: int) -> None:
    """Run tasks until there are no more."""
    # The library's own settings; it reads them when it first encodes, and this process is ours.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*arguments, lambda *what: connection.send(("told", what)))
        except Exception as error:
            connection.send(("failed", _that_can_be_sent(error)))
        else:
            connection.send(("done", result))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _that_can_be_sent(error: Exception) -> Exception:
    """Return an exception that another process can rebuild: those of storage libraries often can't be."""
    if isinstance(error, (OSError, ImportError, BadInputError)) and type(error).__module__ in (
        "builtins",
        BadInputError.__module__,
    ):
        return error
    error.add_note("".join(traceback.format_exception(error)))
    if type(error).__module__ == "builtins":
        return error
    return WorkerError(f"{type(error).__name__}: {error}")


# ---- Tasks ----------------------------------------------------------------------------------------------------------


def shard_task(shard: str, pieces: list[Piece], settings: Settings, num_threads: int, tell: Callable[..., None]) -> Any:
    """Tokenise a shard and return its record; tell documents, tokens and bytes as they come on top."""
    encoder = _encoder(settings.tokenizer, settings.prefix, settings.suffix)
    return tokenize_shard(shard, pieces, settings, encoder, num_threads, tell)


#: One for all shards of a worker: reading a large vocabulary takes a second, and what it has encoded before is faster.
_encoder = functools.lru_cache(maxsize=1)(Encoder)


def train_task(pieces: list[Piece], column: str, size: int, folder: Path, max_bytes: int, tell: Callable[..., None]) -> None:
    """Train a tokenizer on the first of these pieces; tell documents, tokens (none) and bytes as they come on top."""

    def texts() -> Iterator[str]:
        num_bytes = 0
        for piece in pieces:
            reader, told = PieceReader(piece, column), 0
            for item in reader:
                if isinstance(item, Document):  # what else there is, is told when it is tokenised
                    num_bytes += len(item.text)
                    yield item.text
                    if reader.position > told:
                        tell(1, 0, reader.position - told)
                        told = reader.position
                if num_bytes >= max_bytes:
                    return

    train_tokenizer(texts(), size, folder)
