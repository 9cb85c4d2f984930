"""Fine-tune a causal language model on conversations, all of it said by a YAML file.

python examples/sft/train.py fit --config examples/sft/config.yaml
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LightningCLI

from kenotron import CausalLM, ChatData


def main() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes share the cores
    LightningCLI(CausalLM, ChatData, save_config_callback=None)


if __name__ == "__main__":
    main()
