"""The data of a fine-tuning on conversations as a Lightning data module, packed whole and exactly resumable."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L

from kenotron.data.chat import ChatCorpus, TooLong
from kenotron.data.loader import Loading
from kenotron.data.made import MadeCorpus
from kenotron.data.stages import Stage
from kenotron.data.stream import Sampling
from kenotron.tasks.token_data import TokenDataBase


class ChatDataBase(TokenDataBase):
    """Conversations as samples for causal language models, of which only what the assistant says is learned.

    Conversations are tokenised once, by one process of a node, into ``cache_dir``. Whole ones are packed into samples;
    positions begin anew with each, and it sees no other. Everything else is as in :class:`kenotron.TokenData`: blends, stages,
    validation, and the resume that neither skips nor repeats a conversation.

    Args:
        conversations: by name, each a path of JSON lines or Parquet (a file, folder, glob, URL, or a list of them), a
            ``datasets.Dataset``, a list of mappings, or a mapping with ``path`` and arguments of
            :class:`kenotron.data.chat.ChatCorpus` that differ. Rows have ``messages``, or ``prompt`` and ``completion``.
        tokenizer: a folder that ``AutoTokenizer`` reads.
        sequence_length: positions of a sample, and so of the longest conversation.
        global_batch_size: samples of an optimizer step, over all data-parallel ranks and accumulated batches.
        too_long: what becomes of longer ones: ``"drop"``, or ``"cut"`` at their end. They are counted.
        template: ``"tokenizer"``: the tokenizer's own; the path of a Jinja file, or its text; ``"none"``: prompts and
            completions are plain text. column: of the messages.
        on_error: what becomes of rows that are no conversation: ``"fail"``, or ``"skip"``, and they are counted.
        validation: as ``conversations``.
        shuffle, seed: of the order of samples. pad_token_id: stands where a sample has no token.
        weights, stages, loading, val_batch_size, vocab_size, steps_per_epoch, cache_dir: as in :class:`kenotron.TokenData`.

    Raises:
        ValueError: a number out of range, an unknown name, or nothing to train on.
    """

    def __init__(
        self,
        conversations: Mapping[str, Any],
        tokenizer: str | os.PathLike[str],
        sequence_length: int,
        global_batch_size: int,
        too_long: TooLong = "drop",
        template: str = "tokenizer",
        column: str = "messages",
        on_error: Literal["fail", "skip"] = "fail",
        validation: Mapping[str, Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        pad_token_id: int = 0,
        weights: Mapping[str, float] | None = None,
        stages: Sequence[Stage] = (),
        loading: Loading = Loading(),  # noqa: B008
        val_batch_size: int | None = None,
        vocab_size: int | None = None,
        steps_per_epoch: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        shortest = min([sequence_length, *(stage.sequence_length for stage in stages if stage.sequence_length)])
        common: dict[str, Any] = {
            "tokenizer": tokenizer,
            "max_tokens": shortest + 1,
            "too_long": too_long,
            "template": template,
            "column": column,
            "on_error": on_error,
        }
        super().__init__(
            {name: _corpus(name, given, common) for name, given in conversations.items()},
            sequence_length,
            global_batch_size,
            weights=weights,
            stages=stages,
            validation={name: _corpus(name, given, common) for name, given in (validation or {}).items()},
            sampling=Sampling(samples="documents", shuffle=shuffle, seed=seed, pad_token_id=pad_token_id),
            loading=loading,
            val_batch_size=val_batch_size,
            vocab_size=vocab_size,
            steps_per_epoch=steps_per_epoch,
            cache_dir=cache_dir,
        )


def _corpus(name: str, given: Any, common: Mapping[str, Any]) -> MadeCorpus:
    """Return what was given in any of the ways above."""
    if isinstance(given, MadeCorpus):
        return given
    if not isinstance(given, Mapping):
        return ChatCorpus(given, **common)
    known = {"path", "tokenizer", "too_long", "template", "column", "on_error", "fingerprint", "cache_dir"}
    if "path" not in given or set(given) - known:
        raise ValueError(
            f"the conversations {name} have {', '.join(map(str, given)) or 'nothing'}: give path, and of "
            f"{', '.join(sorted(known - {'path'}))} what differs. A DatasetDict has splits: give one of them."
        )
    return ChatCorpus(given["path"], **{**common, **{key: value for key, value in given.items() if key != "path"}})


class ChatData(ChatDataBase, L.LightningDataModule):
    __doc__ = ChatDataBase.__doc__


@functools.cache
def chat_data_class(package: str = "lightning.pytorch") -> type[ChatDataBase]:
    """Return the data module for one of Lightning's two packages: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    if package == "lightning.pytorch":
        return ChatData
    base = importlib.import_module(package).LightningDataModule
    return type("ChatData", (ChatDataBase, base), {"__module__": __name__, "__doc__": ChatDataBase.__doc__})
