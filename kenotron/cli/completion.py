"""``kenotron completion``: a script that lets a shell complete commands, options, their choices, and files.

The script is a table, made of the parsers once: completing costs no start of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from kenotron.cli.parsers import TRAINER_COMMANDS, parser

_BASH = r"""# Completion of kenotron. For this shell: source <(kenotron completion SHELL)
_kenotron() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} path="" i words=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path/${COMP_WORDS[i]}" in
            @PATHS@) path="$path/${COMP_WORDS[i]}" ;;
        esac
    done
    case "$path $previous" in
@CHOICES@
    esac
    if [ -z "$words" ]; then
        case "$path" in
@WORDS@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [ ${#COMPREPLY[@]} -eq 0 ]; then
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o filenames -o bashdefault -F _kenotron kenotron
"""

_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def run(options: argparse.Namespace) -> int:
    """Print the script of a shell, and return the exit code."""
    print((_ZSH if options.shell == "zsh" else "") + script(_trainer_options()), end="")
    return 0


def script(trainer_options: Mapping[str, list[str]]) -> str:
    """Return the script for bash, which zsh reads as well.

    Args:
        trainer_options: the options of those commands whose parser is Lightning's.
    """
    words: dict[str, list[str]] = {}
    choices: dict[str, list[str]] = {}
    for path, one in _parsers("", parser()):
        words[path] = _words(one)
        for action in one._actions:
            if action.choices and action.option_strings:
                choices |= {f"{path} {option}": [str(choice) for choice in action.choices] for option in action.option_strings}
    words |= {f"/{name}": options for name, options in trainer_options.items()}
    arms = [f'            "{path}") words="{" ".join(known)}" ;;' for path, known in words.items()]
    given = [f'        "{place}") words="{" ".join(known)}" ;;' for place, known in choices.items()]
    paths = "|".join(path for path in words if path)
    return _BASH.replace("@PATHS@", paths).replace("@WORDS@", "\n".join(arms)).replace("@CHOICES@", "\n".join(given))


def _parsers(path: str, one: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every parser with the commands that lead to it, as ``/checkpoint/ls``."""
    yield path, one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _parsers(f"{path}/{name}", inner)


def _words(one: argparse.ArgumentParser) -> list[str]:
    """Return what may stand first after a command: its subcommands, or its options."""
    found = [name for action in one._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices]
    found += [option for action in one._actions for option in action.option_strings if option.startswith("--")]
    found += [
        str(choice) for action in one._actions if action.choices and not action.option_strings for choice in action.choices
    ]
    return list(dict.fromkeys(found))


def _trainer_options() -> dict[str, list[str]]:
    """Return the options of Lightning's commands."""
    from kenotron.cli.fit import options_of

    return {name: options_of(name) for name in TRAINER_COMMANDS}
