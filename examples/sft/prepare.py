"""Make conversations of the docstrings in Python's standard library, and a tokenizer with a chat template.

python examples/sft/prepare.py runs/sft
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from kenotron.data.tokenize.vocabulary import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from stdlib_data import is_held_out, source_files

#: ChatML, with what the assistant says marked: that alone is learned.
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def conversations(path: str, text: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield a question and its answer for every documented function of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        tree = ast.parse(text)
    module = path.removesuffix(".py").replace("/", ".")
    for node in ast.walk(tree):
        found = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if found:
            question = f"What does {node.name}({', '.join(arg.arg for arg in node.args.args)}) of {module} do?"
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": found.split("\n\n")[0]},
                ]
            }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    split: dict[str, list[dict[str, list[dict[str, str]]]]] = {"train": [], "held_out": []}
    for path, text in source_files():
        split["held_out" if is_held_out(path) else "train"] += conversations(path, text)
    for name, rows in split.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} conversations")
    texts = (message["content"] for row in split["train"] for message in row["messages"])
    train_tokenizer(texts, 1022, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    print(f"{folder / 'tokenizer'}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
