"""What Kénotron's causal language models share: how they end, and what of transformers does not go with them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from kenotron.models.head import Head, shifted


class OwnCausalLM:
    """Mixed into a model of transformers with a ``lm_head``, before transformers' own classes."""

    lm_head: Head
    config: Any
    training: bool
    z_loss: float
    loss_type: Any

    def _make_head(self, config: Any, z_loss: float) -> None:
        """Add the head.

        Raises:
            ValueError: ``z_loss`` is below 0.
        """
        if z_loss < 0:
            raise ValueError(f"z_loss={z_loss}: set a coefficient of 0 or more.")
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.z_loss = z_loss
        self.loss_type = "ForCausalLM"  # which transformers else reads from the class's name

    def _keeps_states(self, use_cache: bool | None, states: Any, has_labels: bool, position_ids: Tensor | None) -> bool:
        """Return whether a call returns what a next one begins with, keys and values or states."""
        if use_cache is not None:
            return use_cache
        is_alone = has_labels or self.training or position_ids is not None
        return states is not None or (not is_alone and self.config.use_cache)

    def _end(
        self,
        x_BSH: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: int | Tensor | None,
        return_logits: bool | None,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the loss, where there are labels, and logits, where they are wanted."""
        loss = logits = None
        has_labels = labels is not None or shift_labels is not None
        if has_labels:
            loss = self.lm_head(x_BSH, shifted(labels, shift_labels), z_loss=self.z_loss, num_items=num_items_in_batch)
        if return_logits or not has_labels:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x_BSH[:, keep])
        return cast(Tensor | None, loss), cast(Tensor | None, logits)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: transformers would write what nothing else could read."""
        raise ValueError(
            f"{type(self).__name__} has no save_pretrained. Write a Hugging Face directory of a checkpoint: kenotron.hf.export."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers does not know which weights are stored under which names."""
        raise ValueError(f"{cls.__name__} has no from_pretrained. Use kenotron.from_hf(path).")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the head computes losses, which the one that transformers would make does not."""
        raise ValueError(
            f"{type(self).__name__} can't be resized. Set vocab_size in its configuration, or resize transformers' model and "
            "export."
        )
