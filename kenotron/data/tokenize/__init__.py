"""From text to tokens: JSON lines, Parquet and plain text, on several processes, restartable, the same bytes every time.

1. The inputs are listed and cut into shards by their sizes (``inputs``). The folder notes the job (``job``); a rerun must be
   the same one.
2. The tokenizer is copied into the folder, or trained there (``vocabulary``).
3. Workers take one shard after the other (``workers``). A shard becomes one file of tokens, published in one step, and is then
   noted as finished (``shards``). A rerun after a kill does those that are not.
4. When all are, the folder says that it is complete (``job``). Before, ``open_corpus`` refuses it.
"""

from __future__ import annotations

from kenotron.data.tokenize.job import InputProblem
from kenotron.data.tokenize.run import Progress, TokenizeError, TokenizeReport, tokenize
from kenotron.data.tokenize.shards import BadInputError

__all__ = ["BadInputError", "InputProblem", "Progress", "TokenizeError", "TokenizeReport", "tokenize"]
