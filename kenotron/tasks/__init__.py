"""What stands on top of everything: Lightning modules and data modules for common tasks."""

from kenotron.tasks.causal_lm import CausalLM
from kenotron.tasks.chat_data import ChatData
from kenotron.tasks.stream_data import StreamData
from kenotron.tasks.token_data import TokenData

__all__ = ["CausalLM", "ChatData", "StreamData", "TokenData"]
