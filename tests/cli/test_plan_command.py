"""``kenotron plan``: what it prints and writes, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kenotron.cli import main
from kenotron.cli.plan import batch_samples

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "num_attention_heads": 4,
    "intermediate_size": 128, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def arguments(config: str, *more: str) -> list[str]:
    return ["plan", "--model", config, "--devices", "4", "--seq", "64", "--batch-tokens", "1024", *more]


def test_best_are_printed_and_written(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("plan.json", "plan.yaml", "plan.png")]
    pytest.importorskip("matplotlib")
    assert main(arguments(config, "--json", files[0], "--yaml", files[1], "--picture", files[2], "--top", "3")) == 0
    out = capsys.readouterr().out
    assert "choices fit. Why others fail:" in out and "MFU" in out
    plan = json.loads(Path(files[0]).read_text())
    assert len(plan["best"]) == 3 and plan["best"][0]["memory_bytes"]["total"] > 0
    assert Path(files[2]).read_bytes().startswith(b"\x89PNG")


def test_yaml_is_what_a_trainer_takes(config: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    import kenotron

    path = tmp_path / "plan.yaml"
    assert main(arguments(config, "--pp", "2", "--tp", "2", "--yaml", str(path))) == 0
    trainer = yaml.safe_load(path.read_text())["trainer"]
    assert trainer["devices"] * trainer["num_nodes"] >= 4
    assert trainer["strategy"]["class_path"] == "kenotron.KenotronStrategy"
    layout = kenotron.KenotronStrategy(**trainer["strategy"]["init_args"]).layout
    assert (layout.pp, layout.tp) == (2, 2)


def test_what_cannot_fit_says_which_rank_and_what_would(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(config, "--memory-gb", "0.0028", "--zero", "0", "--microbatch", "4", "--tp", "1", "--pp", "1")) == 1
    told = capsys.readouterr().err
    assert "rank 0 takes" in told and "MB are missing" in told and "The nearest that fits" in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--device", "h1000"], "is not known"),
        (["--batch-tokens", "many"], "write a number of tokens"),
        (["--batch-tokens", "10"], "less than one sample"),
        (["--precision", "bf8"], "is unknown"),
        (["--devices", "0"], "devices=0"),
    ],
)
def test_bad_input_is_told(config: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(config, *more)) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(str(tmp_path))) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    assert main(arguments(str(tmp_path))) == 2
    assert "knows no model_type" in capsys.readouterr().err
    assert main(arguments("no.such:thing")) == 2
    assert "to import" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "samples"), [("4M", 512), ("4194304", 512), ("512K", 64), ("16M", 2048), ("81920", 10)])
def test_tokens_become_samples(text: str, samples: int) -> None:
    assert batch_samples(text, 8192) == samples
