"""Text from a model, with transformers' ``generate``: on one process, or on the ranks of a tensor-parallel group."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kenotron.parallel.logits import VocabParallelLogits


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
    seed: int | None = None,
) -> list[str]:
    """Return what follows each prompt, all of them in one batch.

    On tensor-parallel ranks each of them calls it, and all get the same.

    Args:
        model: a transformers model or Decoder. tokenizer: transformers'.
        max_new_tokens: at most so many for each prompt.
        temperature, top_k, top_p: any of them makes it sample; without, the likeliest token is taken each time.
        use_cache: keep keys and values of what was there before.
        seed: for sampling; ``None``: torch's generator as it is, which must be alike on all ranks.

    Raises:
        ValueError: no prompts, settings out of range, or a tokenizer of a larger vocabulary than the model's.
    """
    check_settings(prompts, max_new_tokens, temperature, top_k, top_p)
    if tokenizer.pad_token is None:
        tokenizer = copy.copy(tokenizer)  # the caller's stays as it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    device = next(model.parameters()).device
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(device)
    largest, vocab_size = int(batch["input_ids"].max()), model.config.get_text_config().vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, and the model's vocabulary ends at {vocab_size - 1}. "
            "Take the tokenizer of this model."
        )
    samples = not (temperature is None and top_k is None and top_p is None)
    how: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples else {}
    how |= {key: x for key, x in {"temperature": temperature, "top_k": top_k, "top_p": top_p}.items() if x is not None}
    if seed is not None:
        torch.manual_seed(seed)
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _whole_logits(model):
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens,
                do_sample=samples, use_cache=use_cache, pad_token_id=tokenizer.pad_token_id, **how,
            )  # fmt: skip
    finally:
        for module in trained:
            module.training = True
    new = out[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def check_settings(
    prompts: Sequence[str], max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None
) -> None:
    """Raise ``ValueError`` for settings with which nothing can be generated."""
    if not prompts or not all(prompts):
        raise ValueError("Give one prompt or more, and no empty one.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: set it to 1 or more.")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature={temperature}: set it above 0; leave it out to take the likeliest token each time.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: set it to 1 or more, or leave it out.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: set it above 0 and at most 1, or leave it out.")


@contextlib.contextmanager
def _whole_logits(model: nn.Module) -> Iterator[None]:
    """Let a head whose vocabulary is split return all of the logits: what samples from them ranks them all."""

    def gather(module: nn.Module, args: Any, out: Any) -> Any:
        return out.full_tensor() if isinstance(out, VocabParallelLogits) else out

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
