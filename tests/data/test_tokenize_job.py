"""Jobs as a whole: the same bytes for any number of workers and after any kill, and what is refused."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kenotron.cli import main
from kenotron.data.corpus import check, find_tokenizer, open_corpus
from kenotron.data.errors import CorpusUnfinishedError
from kenotron.data.tokenize import BadInputError, Progress, TokenizeError, TokenizeReport, tokenize
from kenotron.data.tokenize.workers import WorkerError, run_tasks

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits at white space; knows w0 to w49. Would cut every text after three tokens, and pad it, if it were let."""
    words = Tokenizer(models.WordLevel({"<end>": 0} | {word: number for number, word in enumerate(WORDS, 1)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.enable_truncation(3)
    words.enable_padding(length=5)
    folder = tmp_path_factory.mktemp("tokenizer")
    words.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several kinds, with some lines that are no documents."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)

    def line() -> str:
        return json.dumps({"text": " ".join(random.choice(WORDS, random.integers(1, 30)))}) + "\n"

    (folder / "a.jsonl").write_text("".join(line() for _ in range(400)) + "{broken\n" + "".join(line() for _ in range(400)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(line() for _ in range(100)).encode(), mtime=0))
    (folder / "c.txt").write_text("w1 w2\nw3")
    (folder / "d.jsonl").write_text(line() + '{"text": "w1 unknown"}\n' + '{"text": "  "}\n' + line())
    return folder


run = functools.partial(tokenize, eos_token="<end>", append_eos=True, on_error="skip", shard_bytes=12_000)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def reference(texts: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizeReport]:
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, run(texts, out, tokenizer=tokenizer, workers=1)


def test_tokens_are_those_of_the_documents_and_their_ends(texts: Path, reference: tuple[Path, TokenizeReport]) -> None:
    out, report = reference
    expected = []
    for line in (texts / "a.jsonl").read_text().splitlines():
        if line != "{broken":
            expected.append([int(word[1:]) + 1 for word in json.loads(line)["text"].split()] + [0])
    source = open_corpus(out, vocab_size=51)
    bounds = [0, *source.ends(0, len(expected)).tolist()]
    assert [source.read(a, b).tolist() for a, b in itertools.pairwise(bounds)] == expected
    assert (report.num_documents, report.num_tokens) == (source.num_documents, source.num_tokens) == (903, source.num_tokens)
    assert not any(found.problems for found in check(source, vocab_size=51))
    assert report.skipped == {"broken JSON": 1, "empty": 1, "not encodable": 1}
    told = [(Path(problem.file).name, problem.line, problem.kind) for problem in report.problems]
    assert told == [("a.jsonl", 401, "broken JSON"), ("d.jsonl", 2, "not encodable"), ("d.jsonl", 3, "empty")]
    assert report.num_shards == len(list(out.glob("*.ds"))) > 3
    place = find_tokenizer(out)
    assert place is not None
    assert (place / "tokenizer.json").is_file()


def test_three_workers_write_what_one_writes(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    run(texts, tmp_path / "out", tokenizer=tokenizer, workers=3, on_progress=seen.append)
    assert contents(tmp_path / "out") == contents(reference[0])
    assert (seen[-1].num_bytes, seen[-1].documents) == (seen[-1].total_bytes, reference[1].num_documents)


def test_killed_run_goes_on_and_writes_what_an_uninterrupted_one_writes(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["tokenize", str(texts), str(out), "--tokenizer", str(tokenizer), "--append-eos", "--eos-token", "<end>"]
    arguments += ["--on-error", "skip", "--shard-mb", "0.012", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "kenotron.cli", *arguments], start_new_session=True)
    while not list(out.glob(".progress/*.json")) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)  # the workers find out by themselves
    process.wait()
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "workers outlive the run that began them"
        time.sleep(0.01)
    if (out / ".progress").is_dir():  # it has not been quicker than the kill
        with pytest.raises(CorpusUnfinishedError):
            open_corpus(out)
        (out / ".00000.ds.1.unfinished").write_bytes(b"of a worker that was killed")
        (out / "00003.ds").write_bytes(b"published, and not yet noted") if not (out / ".progress/00003.json").exists() else None
    report = run(texts, out, tokenizer=tokenizer, workers=1)
    assert report.resumed_shards >= 1
    ours, theirs = contents(out), contents(reference[0])
    assert ours == theirs


def test_finished_job_is_not_done_again_and_a_changed_one_is_refused(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport]
) -> None:
    out, first = reference
    before = contents(out)
    again = run(texts, out, tokenizer=tokenizer)
    assert (again.num_tokens, again.resumed_shards, again.problems) == (first.num_tokens, first.num_shards, first.problems)
    for options, match in (
        ({"column": "content"}, "column = 'text', and now it is 'content'"),
        ({"shard_bytes": 1000}, "shard_bytes"),
        ({"append_eos": False, "eos_token": None}, "append_eos"),
        ({"format": "megatron"}, "format"),
    ):
        with pytest.raises(ValueError, match=match):
            run(texts, out, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other inputs: 4 files"):
        run(texts / "a.jsonl", out, tokenizer=tokenizer)
    other = tokenizer.parent / "other.json"
    other.write_text(tokenizer.read_text().replace('"w1"', '"v1"'))
    with pytest.raises(ValueError, match="another tokenizer"):
        run(texts, out, tokenizer=other)
    assert contents(out) == before


def end(tell: object) -> None:
    os._exit(9)


def test_worker_that_is_killed_ends_the_run_with_what_to_do() -> None:
    with pytest.raises(WorkerError, match="fewer workers"):
        list(run_tasks([(end, ())] * 3, 2, 1))


def test_input_that_changed_since_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1")
    run(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, workers=1)
    (tmp_path / "out" / "00000.ds").unlink()
    run(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert open_corpus(tmp_path / "out").num_tokens == 2  # what was lost is made again
    os.utime(tmp_path / "a.txt", (0, 0))
    with pytest.raises(ValueError, match="have changed"):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer)


def test_what_is_no_document_ends_the_run_unless_it_is_to_be_skipped(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=r"a\.jsonl, line 401 \(byte \d+\): broken JSON: .*--on-error skip"):
        run(texts, tmp_path / "out", tokenizer=tokenizer, workers=1, on_error="fail")
    run(texts, tmp_path / "out", tokenizer=tokenizer, workers=1)  # the same job, which goes on
    assert contents(tmp_path / "out") == contents(reference[0])


def test_megatron_files_hold_the_same_documents(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport], tmp_path: Path
) -> None:
    run(f"file://{texts}", tmp_path / "out", tokenizer=tokenizer, workers=1, format="megatron")
    ours, theirs = open_corpus(tmp_path / "out"), open_corpus(reference[0])
    assert ours.read(0, ours.num_tokens).tolist() == theirs.read(0, theirs.num_tokens).tolist()
    assert ours.ends(0, ours.num_documents).tolist() == theirs.ends(0, theirs.num_documents).tolist()


def test_full_disk_leaves_what_is_finished_and_a_rerun_goes_on(
    texts: Path, tokenizer: Path, reference: tuple[Path, TokenizeReport], tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in reference[0].glob("*.ds")]
    others = [path.stat().st_size for path in (reference[0] / "tokenizer").iterdir()]
    assert max(others) < max(sizes)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, before[1]))  # workers inherit it
    try:
        with pytest.raises(TokenizeError, match=r"File too large.*same command again"):
            run(texts, tmp_path / "out", tokenizer=tokenizer, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob(".*.ds.*"))
    run(texts, tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert contents(tmp_path / "out") == contents(reference[0])


def test_tokenizer_is_trained_first_and_transformers_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown fox jumps over the lazy dog, said {name}\n" * 50)
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    arguments = ["--train-tokenizer", "300", "--append-eos", "--workers", "1"]
    assert main(["tokenize", *inputs, str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 2 documents, " in said.out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer", local_files_only=True)
    source = open_corpus(tmp_path / "out", vocab_size=len(tokenizer))
    text = tokenizer.decode(source.read(0, source.num_tokens))
    assert text == (tmp_path / "a.txt").read_text() + "<|endoftext|>" + (tmp_path / "b.txt").read_text() + "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    # and a folder that AutoTokenizer reads gives the same tokens
    arguments = ["--tokenizer", str(tmp_path / "out" / "tokenizer"), "--append-eos", "--workers", "1"]
    assert main(["tokenize", *inputs, str(tmp_path / "again"), *arguments]) == 0
    assert (tmp_path / "again" / "00000.ds").read_bytes() == (tmp_path / "out" / "00000.ds").read_bytes()


def test_what_is_asked_for_wrongly_is_told_and_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    given = {"tokenizer": tokenizer}
    for out, options, match in (
        ("out", {}, "either tokenizer"),
        ("out", given | {"train_tokenizer": 300}, "either tokenizer"),
        ("out", {"train_tokenizer": 256}, "257"),
        ("out", {"train_tokenizer": 300, "prepend_bos": True}, "prepend_bos"),
        ("out", given | {"workers": 0}, "workers=0"),
        ("out", given | {"format": "arrow"}, "format='arrow'"),
        ("out", given | {"on_error": "ignore"}, "on_error='ignore'"),
        ("out", given | {"append_eos": True}, "--eos-token"),
        ("out", given | {"prepend_bos": True}, "begins a document"),
        ("out", given | {"eos_token": "<end>"}, "append_eos=True"),
        ("out", given | {"append_eos": True, "eos_token": "<no>"}, "none of this tokenizer's"),
        ("out", {"tokenizer": tmp_path}, "is no tokenizer"),
        ("out", {"tokenizer": tmp_path / "a.txt"}, "is no tokenizer"),
        ("full", given, "holds precious"),
        ("file", given, "is a file"),
    ):
        with pytest.raises(ValueError, match=match):
            tokenize(tmp_path / "a.txt", tmp_path / out, **options)  # type: ignore[arg-type]
    assert not contents(tmp_path / "out")
    assert main(["tokenize", str(tmp_path / "none"), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == 1


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, tokenizer: Path) -> None:
    import fcntl

    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another process"):
            tokenize(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer)
