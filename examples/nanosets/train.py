"""Train any causal language model on any corpora, all of it said by a YAML file.

python examples/nanosets/train.py fit --config examples/nanosets/config.yaml
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LightningCLI

from kenotron import CausalLM, TokenData


def main() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes share the cores
    LightningCLI(CausalLM, TokenData, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
