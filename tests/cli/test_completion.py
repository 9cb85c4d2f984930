"""``kenotron completion``: what bash offers after a beginning."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kenotron.cli.completion import _ZSH, script
from kenotron.cli.fit import options_of


@pytest.fixture(scope="module")
def bash_script() -> str:
    return script({"fit": options_of("fit")})


def offered(bash_script: str, folder: Path, *words: str) -> list[str]:
    """Return what bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    given = f"COMP_WORDS=(kenotron {quoted}); COMP_CWORD={len(words)}"
    ask = f"{bash_script}\n{given}; _kenotron; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=20, check=True, cwd=folder)
    return done.stdout.split()


def test_commands_options_choices_and_files_are_offered(bash_script: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert {"fit", "checkpoint", "compare", "launch"} <= set(offered(bash_script, tmp_path, ""))
    assert offered(bash_script, tmp_path, "comp") == ["compare", "completion"]
    assert "verify" in offered(bash_script, tmp_path, "checkpoint", "")
    assert offered(bash_script, tmp_path, "checkpoint", "ls", "--") == ["--help", "--json"]
    assert offered(bash_script, tmp_path, "launch", "slurm", "--dry") == ["--dry-run"]
    assert offered(bash_script, tmp_path, "tokenize", "in", "--format", "") == ["nanoset", "megatron"]
    assert {"bash", "zsh"} <= set(offered(bash_script, tmp_path, "completion", ""))
    assert offered(bash_script, tmp_path, "checkpoint", "ls", "mi") == ["mine.yaml"]
    assert "--trainer.max_steps" in offered(bash_script, tmp_path, "fit", "--trainer.max")
    assert offered(bash_script, tmp_path, "fit", "--config", "mi") == ["mine.yaml"]


def test_bash_can_read_it_and_zsh_is_told_how(bash_script: str) -> None:
    subprocess.run(["bash", "-n"], input=bash_script, text=True, check=True, timeout=20)
    assert "bashcompinit" in _ZSH
