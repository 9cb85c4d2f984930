"""Conversations as documents of tokens, of which what the assistant says is learned.

A row has ``messages`` (a list of {role, content}; tool calls as the template takes them; ``tools`` beside it where there are
any), or ``prompt`` and ``completion``: two texts, or two lists of messages. The tokenizer's chat template turns them into text.

Which tokens are learned comes from the template where it marks what the assistant says with ``{% generation %}``. Otherwise
the conversation is rendered up to each turn of the assistant, once with the header that asks for an answer and once with the
answer: what the second has on top is the answer. That is right if each rendering begins the next one; where a template
rewrites earlier turns, that is an error.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kenotron.data.made import Made, MadeCorpus, Refused, tokenizer_digest
from kenotron.data.records import Record, records_of
from kenotron.data.tokenize.vocabulary import Vocabulary

TooLong = Literal["cut", "drop"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationError(ValueError):
    """A row is no conversation. ``kind``: a few words to count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChatTemplate:
    """Turns conversations into tokens.

    Args:
        tokenizer: a folder that ``AutoTokenizer`` reads.
        template: ``"tokenizer"``: its own; ``"none"``: no template, for prompts and completions that are plain text; else the
            path of a Jinja file, or the template itself.

    Raises:
        ValueError: the tokenizer has no template, or none that is a fast one.
    """

    def __init__(self, tokenizer: str | Path, template: str = "tokenizer") -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
        self._template = None if template == "none" else template_text(template) or self._own_template(tokenizer)
        self.has_marks = self._template is not None and bool(_GENERATION.search(self._template))

    def _own_template(self, tokenizer: str | Path) -> str:
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"{tokenizer} has no chat template. Set template='path/to/template.jinja', or template='none' for prompts and "
                "completions that are plain text."
            )
        found: str = self._tokenizer.get_chat_template()
        return found

    def encode(self, row: Mapping[str, Any], column: str = "messages") -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a row (int64), and which of them are learned (bool of that shape).

        Raises:
            ConversationError: it is no conversation, or the template does not take it.
        """
        if column in row:
            messages, first = _messages(row[column], column), 0
        elif "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                if self._template is None:
                    return self._encode_plain(prompt, completion)
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                first = 1
            else:
                before = _messages(prompt, "prompt")
                messages, first = before + _messages(completion, "completion"), len(before)
        else:
            raise ConversationError("missing column", f"no {column!r}, nor 'prompt' and 'completion', among {', '.join(row)}")
        if self._template is None:
            raise ConversationError("a template is needed", "template='none' takes prompts and completions that are plain text")
        try:
            return self._encode_messages(messages, first, _tools(row.get("tools")))
        except ConversationError:
            raise
        except Exception as error:  # what templates are made of raises anything: TemplateError, TypeError, KeyError
            raise ConversationError("refused by the template", f"{type(error).__name__}: {error}") from error

    def _encode_plain(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if end is None:
            raise ValueError("The tokenizer names no token that ends a completion. Set its eos_token.")
        before = [] if start is None else [start]
        before += self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = [*self._tokenizer(completion, add_special_tokens=False)["input_ids"], end]
        ids = np.asarray([*before, *after], dtype=np.int64)
        return ids, np.arange(len(ids)) >= len(before)

    def _encode_messages(
        self, messages: list[dict[str, Any]], first: int, tools: list[Any] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a conversation; only turns from number ``first`` on are learned."""
        if self.has_marks:
            found: Any = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, learned = np.asarray(found["input_ids"], np.int64), np.asarray(found["assistant_masks"], dtype=bool)
            if first:
                text = self._render(messages, tools)
                learned &= self._tokenize(text)[1] >= _num_common(self._render(messages[:first], tools), text)
            return ids, learned
        text, ranges = self._answers(messages, first, tools)
        ids, starts = self._tokenize(text)
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in ranges:
            learned |= (begin <= starts) & (starts < end)
        return ids, learned

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, and the character at which each token begins: int64, of one shape."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
        return np.asarray(found["input_ids"], np.int64), starts

    def _answers(
        self, messages: list[dict[str, Any]], first: int, tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and where in it the assistant's turns are."""
        whole, ranges = self._render(messages, tools), []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or turn < first:
                continue
            through = self._render(messages[: turn + 1], tools)
            asked = self._render(messages[:turn], tools, add_generation_prompt=True)
            before = self._render(messages[:turn], tools) if turn else ""
            # Headers that go on differently than the answer (as with an empty thought) are prompt as far as both agree.
            begin = _num_common(asked, through)
            if begin < len(before) or not whole.startswith(through):
                raise ConversationError(
                    "not a stable template",
                    f"the template writes what comes before, or in, message {turn} (counted from 0) differently when more "
                    "follows, so that nobody can tell what the assistant says. Use a template that marks it with "
                    "{% generation %} … {% endgeneration %}: template='path/to/template.jinja'",
                )
            ranges.append((begin, len(through)))
        return whole, ranges

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **settings: Any) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=False, **settings
        )
        return str(text)


def template_text(template: str) -> str | None:
    """Return the text of a template that is given as a path or as it is; ``None`` for ``"tokenizer"`` and ``"none"``."""
    if template in ("tokenizer", "none"):
        return None
    if "{" in template or "\n" in template:
        return template
    if not Path(template).expanduser().is_file():
        raise ValueError(f"template={template!r}: no such file. Set 'tokenizer', 'none', a Jinja file, or a template's text.")
    return Path(template).expanduser().read_text(encoding="utf-8")


def _num_common(one: str, other: str) -> int:
    """Return with how many equal characters two texts begin."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _messages(given: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ConversationError("no messages", f"{column} is {_told(given)}, and no list of messages")
    messages = []
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConversationError("no messages", f"message {number} of {column} is {_told(message)}, without a role")
        # Columns of Parquet and of `datasets` have all fields in every row.
        kept = {key: value for key, value in message.items() if value is not None}
        if not isinstance(kept.get("content"), (str, list)) and not kept.get("tool_calls"):
            raise ConversationError("no messages", f"message {number} of {column} has no content")
        messages.append(kept)
    return messages


def _tools(given: Any) -> list[Any] | None:
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConversationError("broken JSON", f"tools: {error}") from None
    return list(given) if given else None


def _told(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


class ChatCorpus(MadeCorpus):
    """Conversations, tokenised once and kept with a mask of what is learned.

    Args:
        conversations: see :func:`kenotron.data.records.records_of`.
        tokenizer: a folder that ``AutoTokenizer`` reads.
        max_tokens: of a conversation: one more than the positions of a sample. too_long: what becomes of longer ones:
            ``"drop"``, or ``"cut"`` at their end. Both are counted.
        template: see :class:`ChatTemplate`. column: of the messages.
        fingerprint: of a dataset that does not tell one.
        on_error, cache_dir: as for :class:`kenotron.data.made.MadeCorpus`.

    Raises:
        ValueError: an option is wrong, or there is no such tokenizer.
    """

    has_mask = True
    wanted = frozenset({"too long, dropped", "too long, cut", "nothing to learn"})

    def __init__(
        self,
        conversations: Any,
        tokenizer: str | os.PathLike[str],
        *,
        max_tokens: int,
        too_long: TooLong = "drop",
        template: str = "tokenizer",
        column: str = "messages",
        fingerprint: str | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, on_error, cache_dir)
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens}: set it to 2 or more.")
        if too_long not in ("cut", "drop"):
            raise ValueError(f"too_long={too_long!r}: set it to 'cut' or 'drop'.")
        self._records = records_of(conversations, fingerprint)
        self._max_tokens, self._too_long, self._template, self._column = max_tokens, too_long, template, column

    def __repr__(self) -> str:
        return f"conversations of {self._records!r}"

    @functools.cached_property
    def _job(self) -> dict[str, Any]:
        assert self.tokenizer is not None
        return {
            "rows": self._records.digest(),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": template_text(self._template) or self._template,
            "column": self._column,
            "max_tokens": self._max_tokens,
            "too_long": self._too_long,
            "on_error": self.on_error,
        }

    def job(self) -> dict[str, Any]:
        """Return all that the tokens depend on."""
        return self._job

    def num_shards(self) -> int:
        """Return into how many files the corpus is cut."""
        return self._records.num_shards()

    def documents(self, shard: int, folder: Path, vocabulary: Vocabulary | None) -> Iterator[Made | Refused]:
        """Yield the conversations of a shard."""
        template = _template(folder, self._template)
        for item in self._records.read(shard):
            if isinstance(item, Refused):
                yield item
                continue
            try:
                yield from self._fitted(item, *template.encode(item.row, self._column))
            except ConversationError as error:
                yield Refused(error.kind, item.place, str(error))

    def _fitted(self, item: Record, ids: np.ndarray, learned: np.ndarray) -> Iterator[Made | Refused]:
        if len(ids) > self._max_tokens:
            told = f"{len(ids)} tokens, and {self._max_tokens} are a sample's"
            if self._too_long == "drop":
                yield Refused("too long, dropped", item.place, told)
                return
            ids, learned = ids[: self._max_tokens], learned[: self._max_tokens]
            if learned[1:].any():
                yield Refused("too long, cut", item.place, told)
        if learned[1:].any():  # nothing precedes the first token, from which it could be learned
            yield Made(ids, learned)
        else:
            yield Refused("nothing to learn", item.place, "no token of it is the assistant's")


#: Loaded once for all shards.
_template = functools.lru_cache(maxsize=1)(ChatTemplate)
