"""The text that lies in each checkpoint and says how to open it, with Kénotron and without."""

from __future__ import annotations

README = "README.txt"

#: Reads the weights with torch alone. ``tests/checkpoint/test_opening.py`` runs it.
_WITH_TORCH_ALONE = """\
import json, torch

def load(path, prefix="model/"):
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
              "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}
    manifest, state = json.load(open(f"{path}/manifest.json")), {}
    for name, stored in manifest["tensors"].items():
        if name.startswith(prefix):
            whole = torch.empty(stored["shape"], dtype=getattr(torch, dtypes[stored["dtype"]]))
            for piece in stored["pieces"]:
                begin, end = piece["bytes"]
                with open(f"{path}/{piece['file']}", "rb") as file:
                    file.seek(begin)
                    data = torch.frombuffer(bytearray(file.read(end - begin)), dtype=whole.dtype)
                where = tuple(slice(at, at + size) for at, size in zip(piece["offset"], piece["shape"]))
                whole[where] = data.reshape(piece["shape"])
            state[name[len(prefix):]] = whole
    for name, first in manifest.get("aliases", {}).items():  # tied weights
        if name.startswith(prefix):
            state[name[len(prefix):]] = state[first[len(prefix):]]
    return state
"""

TEXT = f"""\
This directory is one checkpoint, written by Kénotron: manifest.json says which bytes of which file hold what.

Where Kénotron is installed it opens as a checkpoint of Lightning's does:

    import lightning, torch
    checkpoint = torch.load("<this directory>")                    # "state_dict", "optimizer_states", "epoch", ...
    module = MyModule.load_from_checkpoint("<this directory>")
    trainer.fit(module, ckpt_path="<this directory>")              # on any layout, with any strategy

Files named pickle-*.bin hold what only pickle can hold. They can run code: only weights_only=False opens them.

Without Kénotron the shards are safetensors files, and the weights are read with torch alone:

{"".join(f"    {line}" if line.strip() else line for line in _WITH_TORCH_ALONE.splitlines(keepends=True))}
    module.load_state_dict(load("<this directory>"))
"""
