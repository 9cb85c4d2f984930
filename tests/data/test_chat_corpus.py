"""Conversations as tokens: only what the assistant says is learned, whatever the template; what can't be told is an error."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from kenotron.data.chat import ChatCorpus, ChatTemplate, ConversationError
from kenotron.data.made import MadeCorpus
from kenotron.data.masked import MaskedSource
from kenotron.data.stream import Sampling
from kenotron.data.tokenize.shards import BadInputError
from kenotron.data.tokenize.vocabulary import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
#: Leaves thoughts out of all answers but the last, as reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Größe? 🙂"},
    {"role": "assistant", "content": "Zwölf 🙂🙂 Meter."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(["One and one is two. Be brief, user, system, assistant."] * 3, 320, place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(place)
    return place


def learned_text(folder: Path, ids: np.ndarray, learned: np.ndarray) -> list[str]:
    """Return the runs of text that are learned."""
    tokenizer, runs = AutoTokenizer.from_pretrained(folder), []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]])))
    for start, stop in edges.reshape(-1, 2).tolist():
        runs.append(tokenizer.decode(ids[start:stop]))
    return runs


@pytest.mark.parametrize(
    ("template", "end"), [("tokenizer", "<|im_end|>\n"), (MARKED, "<|im_end|>"), (FORGETFUL, "<|im_end|>\n")]
)
def test_what_the_assistant_says_is_learned(folder: Path, template: str, end: str) -> None:
    ids, learned = ChatTemplate(folder, template).encode({"messages": TALK})
    assert learned_text(folder, ids, learned) == [f"Two.{end}", f"Zwölf 🙂🙂 Meter.{end}"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert ids.tolist() == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template", ["tokenizer", MARKED, FORGETFUL, "<s>{% if messages[0].role == 'system' %}!{% endif %}" + CHATML]
)
def test_a_conversation_that_the_assistant_begins_is_learned_from_its_first_word(folder: Path, template: str) -> None:
    talk = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
    ]
    end = "<|im_end|>" if template is MARKED else "<|im_end|>\n"
    ids, learned = ChatTemplate(folder, template).encode({"messages": talk})
    assert learned_text(folder, ids, learned) == [f"a{end}", f"Two.{end}"]
    ids, learned = ChatTemplate(folder, template).encode({"messages": talk[:1]})
    assert learned_text(folder, ids, learned) == [f"a{end}"]


def test_prompts_and_completions_become_turns_or_plain_text(folder: Path) -> None:
    row = {"prompt": "One?", "completion": "Two."}
    ids, learned = ChatTemplate(folder).encode(row)
    assert learned_text(folder, ids, learned) == ["Two.<|im_end|>\n"]
    ids, learned = ChatTemplate(folder, "none").encode(row)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(ids) == "One?Two.<|endoftext|>"
    assert learned_text(folder, ids, learned) == ["Two.<|endoftext|>"]
    for template, end in ((CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")):
        lists = {"prompt": TALK[:4], "completion": TALK[4:]}
        ids, learned = ChatTemplate(folder, template).encode(lists)
        # Of a prompt nothing is learned, not even what the assistant said before.
        assert learned_text(folder, ids, learned) == [f"Zwölf 🙂🙂 Meter.{end}"]


def test_a_template_that_rewrites_what_came_before_is_refused_unless_it_marks(folder: Path) -> None:
    thoughtful = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in TALK]
    with pytest.raises(ConversationError, match=r"message 2 .* generation"):
        ChatTemplate(folder, FORGETFUL).encode({"messages": thoughtful})
    ids, learned = ChatTemplate(folder, MARKED).encode({"messages": thoughtful})
    assert len(learned_text(folder, ids, learned)) == 2


def test_a_header_that_goes_on_otherwise_than_the_answer_is_prompt_as_far_as_both_agree(folder: Path) -> None:
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    ids, learned = ChatTemplate(folder, template).encode({"messages": TALK})
    assert learned_text(folder, ids, learned)[0] == "Two.<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({}, "missing column"),
        ({"text": "a"}, "missing column"),
        ({"prompt": "a"}, "missing column"),
        ({"messages": []}, "no messages"),
        ({"messages": None}, "no messages"),
        ({"messages": "hello"}, "no messages"),
        ({"messages": ["hello"]}, "no messages"),
        ({"messages": [{"content": "x"}]}, "no messages"),
        ({"messages": [{"role": "user"}]}, "no messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "no messages"),
        ({"messages": TALK, "tools": "{"}, "broken JSON"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 3}, {"role": "boom", "content": "x"}]}, "refused"),
    ],
)
def test_rows_that_are_no_conversation_are_told(folder: Path, row: Any, kind: str) -> None:
    template = "{% if messages[-1].role == 'boom' %}{{ raise_exception('no such role') }}{% endif %}" + CHATML
    with pytest.raises(ConversationError) as caught:
        ChatTemplate(folder, template).encode(row)
    assert caught.value.kind.startswith(kind)


# --------------------------------------------------------------------------------------------------------------- corpora


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": "one " * (i % 7 + 1)}]}
        for i in range(count)
    ]


def corpus(given: Any, folder: Path, cache: Path, **changes: Any) -> ChatCorpus:
    return ChatCorpus(given, folder, **{"max_tokens": 100, "cache_dir": cache, **changes})


def contents(made: MadeCorpus) -> tuple[list[int], list[int], list[bool]]:
    made.make()
    source = made.open("c")
    assert isinstance(source, MaskedSource)
    n = source.num_tokens
    return source.read(0, n).tolist(), source.ends(0, source.num_documents).tolist(), source.learned(0, n).tolist()


def test_files_datasets_and_lists_make_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    given = rows(40)
    lines = "".join(json.dumps(row) + "\n" for row in given)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "c.parquet", row_group_size=7)
    forms = [given, tuple(given), datasets.Dataset.from_list(given)]
    forms += [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    found = [contents(corpus(form, folder, tmp_path / "cache")) for form in forms]
    assert len(found[0][1]) == 40 and sum(found[0][2]) > 80
    assert all(one == found[0] for one in found)


def test_what_is_packed_keeps_conversations_apart_and_prompts_unlearned(folder: Path, tmp_path: Path) -> None:
    made = corpus(rows(30), folder, tmp_path)
    ids, ends, learned = contents(made)
    sampling = Sampling(samples="documents", shuffle=False)
    samples = sampling.cut(made.open("c"), 99)
    out = sampling.rows(samples.num_samples, 99)
    samples.fill(out, np.arange(samples.num_samples), np.arange(samples.num_samples), 0)
    batch = out.batch()
    trained = batch["shift_labels"][batch["shift_labels"] >= 0]
    first = np.zeros(len(ids), bool)
    first[[0, *ends[:-1]]] = True
    assert sorted(trained) == sorted(np.asarray(ids)[np.asarray(learned) & ~first])
    assert int((batch["position_ids"] == 0).sum()) >= 30
    assert (batch["labels"][:, 1:] == batch["shift_labels"][:, :-1]).all()


@pytest.mark.parametrize(("too_long", "documents"), [("drop", 3), ("cut", 4)])
def test_long_conversations_are_dropped_or_cut_and_counted(
    folder: Path,
    tmp_path: Path,
    too_long: str,
    documents: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("kenotron"), "parent", logging.getLogger())  # a strategy gives it another one
    caplog.set_level(logging.INFO, "kenotron")
    hopeless = {"messages": [{"role": "user", "content": "one " * 500}, {"role": "assistant", "content": "x"}]}
    long = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one " * 500}]}
    silent = {"messages": [{"role": "user", "content": "one"}]}
    made = corpus([*rows(3), hopeless, long, silent], folder, tmp_path, max_tokens=60, too_long=too_long)
    _, ends, _ = contents(made)
    assert len(ends) == documents and max(np.diff([0, *ends])) <= 60
    record = json.loads((made.folder() / "corpus.json").read_text())
    assert record["skipped"] == (
        {"nothing to learn": 1, "too long, dropped": 2} if too_long == "drop" else {"nothing to learn": 2, "too long, cut": 1}
    )
    assert "nothing to learn" in caplog.text


def test_bad_rows_name_file_and_line_or_are_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(good + b"\n\n{oops\n" + b'{"messages": 3}\n\xff\xfe\n[1]\n' + good)
    with pytest.raises(BadInputError, match=r"a\.jsonl, line 3 \(byte \d+\): broken JSON"):
        corpus(path, folder, tmp_path / "cache").make()
    made = corpus(path, folder, tmp_path / "cache", on_error="skip")
    assert len(contents(made)[1]) == 2
    record = json.loads((made.folder() / "corpus.json").read_text())
    assert record["skipped"] == {"broken JSON": 2, "invalid UTF-8": 1, "no messages": 1}
    assert record["problems"][1]["place"].startswith(f"{path}, line 4")


def test_nothing_at_all_is_an_error(folder: Path, tmp_path: Path) -> None:
    for given in ([], [{"messages": [{"role": "user", "content": "x"}]}]):
        with pytest.raises(ValueError, match="No document came of"):
            corpus(given, folder, tmp_path).make()
    (tmp_path / "e.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="No document came of"):
        corpus(tmp_path / "e.jsonl", folder, tmp_path).make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"too_long": "truncate"}, "too_long='truncate'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"template": "nowhere.jinja"}, "no such file"),
        ({"tokenizer": "/nowhere"}, "is no tokenizer"),
        ({"conversations": 3}, "A int can't be read"),
        ({"conversations": iter([])}, "StreamData"),
        ({"conversations": "/nowhere.jsonl"}, "no such file"),
    ],
)
def test_mistakes_are_told(folder: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    given = {"conversations": rows(1), "tokenizer": folder, "max_tokens": 50, "cache_dir": tmp_path, **change}
    with pytest.raises(ValueError, match=says):
        ChatCorpus(**given).make()


def test_a_tokenizer_without_a_template_is_told(tmp_path: Path) -> None:
    train_tokenizer(["a"], 257, tmp_path / "t")
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate(tmp_path / "t")


def test_every_setting_has_a_corpus_of_its_own_and_a_second_use_makes_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(5)
    base = corpus(given, folder, tmp_path)
    others = [
        corpus(rows(6), folder, tmp_path),
        corpus(given, folder, tmp_path, max_tokens=50),
        corpus(given, folder, tmp_path, template=MARKED),
        corpus(given, folder, tmp_path, too_long="cut"),
        corpus(given, folder, tmp_path, fingerprint="mine"),
    ]
    assert len({made.folder() for made in [base, *others]}) == 6
    base.make()
    monkeypatch.setattr(ChatCorpus, "documents", lambda *_: pytest.fail("made twice"))
    corpus(rows(5), folder, tmp_path).make()
    with pytest.raises(ValueError, match="Call make"):
        others[0].open("c")


class _Killed(BaseException):
    pass


def test_a_job_that_was_killed_goes_on_after_its_last_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kenotron.data.records._ROWS_AT_ONCE", 4)
    whole = contents(corpus(rows(18), folder, tmp_path / "whole"))
    documents, seen = ChatCorpus.documents, []

    def dying(self: ChatCorpus, shard: int, *args: Any) -> Any:
        seen.append(shard)
        for number, item in enumerate(documents(self, shard, *args)):
            if shard == 2 and number == 2 and seen.count(2) == 1:
                raise _Killed
            yield item

    monkeypatch.setattr(ChatCorpus, "documents", dying)
    made = corpus(rows(18), folder, tmp_path / "killed")
    with pytest.raises(_Killed):
        made.make()
    assert contents(made) == whole
    assert seen == [0, 1, 2, 2, 3, 4]
    assert not list(made.folder().glob(".*unfinished"))


def make_in_process(given: Any, folder: Path, cache: Path, start: Any, answers: Any) -> None:
    start.wait()
    found = contents(corpus(given, folder, cache))
    answers.put(len(found[0]))


def test_processes_that_come_together_make_one_corpus(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=make_in_process, args=(rows(200), folder, tmp_path, start, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    assert len({answers.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len([place for place in tmp_path.iterdir() if not place.name.startswith(".")]) == 1


def test_a_source_of_tokens_and_a_mask_of_another_length_do_not_fit(folder: Path, tmp_path: Path) -> None:
    made = corpus(rows(5), folder, tmp_path)
    place = made.make()
    mask = place / "00000.ds.loss"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=r"00000\.ds\.loss, byte \d+: has \d+ bytes"):
        made.open("c")
    mask.unlink()
    with pytest.raises(RuntimeError, match=r"00000\.ds\.loss: is not there"):
        made.open("c")
