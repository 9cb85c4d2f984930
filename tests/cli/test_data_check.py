"""``kenotron data check``: what is sound, what is damaged, and what is no corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kenotron.cli import main
from kenotron.data.nanoset import NanosetWriter


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        with NanosetWriter(tmp_path / f"{name}.ds", token_size=2) as writer:
            for length in (5, 3, 9):
                writer.write(np.arange(length))
    return tmp_path


def test_a_sound_corpus_is_summed_up(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(corpus), "--vocab-size", "9"]) == 0
    out = capsys.readouterr().out
    assert "2 files: 6 documents, 34 tokens, largest id 8\nsound\n" in out
    assert f"{corpus / 'b.ds'}: 3 documents, 17 tokens: ok" in out


def test_damage_is_told_with_file_and_byte(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = corpus / "b.ds.index"
    ends = np.fromfile(index, "<u8")
    ends[0] = 2**40
    ends.tofile(index)
    assert main(["data", "check", str(corpus), "--vocab-size", "8"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 2 files are damaged" in out
    assert f"{index}, byte 0: document 0 ends at token {2**40}" in err
    assert "a.ds, byte 32: token id 8, and the vocabulary has 8" in err


def test_what_cannot_be_opened_is_another_exit_code(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(corpus / "c")]) == 2
    (corpus / "a.ds.loss").write_bytes(b"\1" * 16)
    assert main(["data", "check", str(corpus / "a.ds")]) == 2
    assert "a.ds.loss, byte 16: has 16 bytes, one for each token, and there are 17 tokens" in capsys.readouterr().err
