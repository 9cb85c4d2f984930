"""Write the sources of Python's standard library as JSON lines: two corpora to train on, and one that is held out.

python examples/nanosets/texts.py runs/nanosets/texts
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stdlib_data import is_held_out, source_files


def main(folder: Path) -> None:
    corpora: dict[str, list[str]] = {"modules": [], "packages": [], "held_out": []}
    for path, text in source_files():
        name = "held_out" if is_held_out(path) else "packages" if "/" in path else "modules"
        if text:
            corpora[name].append(text)
    for name, texts in corpora.items():
        file = folder / name / "sources.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{file}: {len(texts)} documents, {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
