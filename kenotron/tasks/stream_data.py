"""A stream that is tokenised while it is trained, as a Lightning data module: split over ranks and resumed exactly."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kenotron.data.hf_datasets import RowEncoder
from kenotron.data.loader import Loading
from kenotron.data.made import Refused
from kenotron.data.records import Record
from kenotron.data.stream import Sampling
from kenotron.data.streamed import Cursor, DocumentStream, cursor_from_state, cursor_to_state, samples_of
from kenotron.data.windows import check_sequence_length
from kenotron.parallel.plan import transformers_models
from kenotron.tasks.token_data import TokenData, check_positions, num_processed_batches

if TYPE_CHECKING:
    _DataModule = L.LightningDataModule
else:  # mixed in below, from either of Lightning's packages
    _DataModule = object


class StreamDataBase(_DataModule):
    """A stream of texts, or of token ids, as samples for causal language models, in its own order.

    For what is too large to be tokenised first, or is made as it is read; where it can be tokenised,
    :class:`kenotron.TokenData` shuffles and blends, and opens at once anywhere. Batches are as there.

    Every data-parallel rank reads and tokenises the whole stream, and trains its own samples. A checkpoint keeps where the
    stream was: resumed on any number of ranks, nothing is skipped or repeated. Streams with ``state_dict`` and
    ``load_state_dict`` (``datasets.IterableDataset``) go on at once, others are read again up to there.

    Args:
        stream: mappings from column to value; iterated over again for each pass, before which ``set_epoch`` is called if
            there is one.
        sequence_length, global_batch_size, vocab_size: as in :class:`kenotron.TokenData`.
        tokenizer: a folder with ``tokenizer.json``; ``None``: the column holds token ids.
        column: ``None``: ``text``, or ``input_ids`` without a tokenizer.
        append_eos, prepend_bos: put the tokenizer's token for it at the end, at the begin, of each text.
        sampling: ``samples``, ``mask_documents`` and ``pad_token_id`` of it; a stream is not shuffled here.
        repeat: begin again at the stream's end; otherwise training ends there, and samples that fill no batch are left out.
        on_error: what becomes of rows that are no document: ``"fail"``, or ``"skip"``.
        in_worker: a process of its own reads and tokenises. prefetch: batches that are ready.
        validation: held-out corpora, as :class:`kenotron.TokenData` takes them.
        steps_per_epoch: of the trainer; ``None``: an epoch has no end but the stream's.

    Raises:
        ValueError: a number out of range, or no such tokenizer.
    """

    def __init__(
        self,
        stream: Iterable[Mapping[str, Any]],
        sequence_length: int,
        global_batch_size: int,
        tokenizer: str | os.PathLike[str] | None = None,
        column: str | None = None,
        append_eos: bool = False,
        prepend_bos: bool = False,
        sampling: Sampling = Sampling(shuffle=False),  # noqa: B008
        repeat: bool = True,
        on_error: Literal["fail", "skip"] = "fail",
        in_worker: bool = True,
        prefetch: int = 4,
        validation: Mapping[str, Any] | None = None,
        val_batch_size: int | None = None,
        vocab_size: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        check_sequence_length(sequence_length)
        for name, value in (("global_batch_size", global_batch_size), ("steps_per_epoch", steps_per_epoch)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: set it to 1 or more.")
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error={on_error!r}: set it to 'fail' or 'skip'.")
        folder = None if tokenizer is None else Path(tokenizer).expanduser()
        self.tokenizer_folder = folder  # which checkpoints note
        self._encoder = RowEncoder(
            column or ("input_ids" if tokenizer is None else "text"), folder, prepend_bos=prepend_bos, append_eos=append_eos
        )
        if sampling.corpus_ids:
            raise ValueError("corpus_ids=True: a stream is one corpus. Leave it out, or blend corpora with TokenData.")
        self._rows, self._repeat, self._skip = stream, repeat, on_error == "skip"
        self.sequence_length, self.sampling = sequence_length, sampling
        self._global_batch_size, self._steps_per_epoch, self._vocab_size = global_batch_size, steps_per_epoch, vocab_size
        self._loading = Loading(num_workers=int(in_worker), prefetch=prefetch)
        self._validation: Any = None
        if validation:
            # Of the two packages' data modules either will do: it is asked for loaders alone.
            self._validation = TokenData(
                validation, sequence_length, global_batch_size, validation=validation, sampling=sampling,
                loading=Loading(num_workers=int(in_worker)), val_batch_size=val_batch_size, vocab_size=vocab_size,
            )  # fmt: skip
        #: Where the samples begin that follow so many processed batches; the run's samples before the first of them.
        self._cursors: dict[int, Cursor] = {0: Cursor()}
        self._sample, self._processed_then, self._batch = 0, 0, global_batch_size
        self._trainer_then: Any = None
        self._restored: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Make validation corpora that are to be made."""
        if self._validation is not None:
            self._validation.prepare_data()

    def setup(self, stage: str) -> None:
        """Open validation corpora, and go to where the run is."""
        if self._validation is not None:
            self._validation.trainer = self.trainer
            self._validation.setup("validate")
        if stage != "fit":
            return
        self._freeze()
        if self._trainer_then not in (None, self.trainer):
            self._sample, self._cursors = 0, {0: Cursor()}
        self._trainer_then = None
        if self._restored:
            self._apply(self._restored)

    # ------------------------------------------------------------------------------------------------------- position

    @property
    def _num_batches(self) -> int:
        """How many batches have been trained since the loader was made."""
        return 0 if self._trainer_then is None else num_processed_batches(self._trainer_then) - self._processed_then

    @property
    def num_trained_samples(self) -> int:
        """How many samples of the run have been trained, over all ranks."""
        return self._sample + self._num_batches * self._batch

    def _freeze(self) -> None:
        """Count from now on anew."""
        num_batches = self._num_batches
        self._cursors, self._sample = {0: self._cursors[num_batches]}, self.num_trained_samples
        if self._trainer_then is not None:
            self._processed_then = num_processed_batches(self._trainer_then)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is in the stream."""
        if self._restored:
            return self._restored
        return {
            "version": 1,
            "sample": self.num_trained_samples,
            "cursor": cursor_to_state(self._cursors[self._num_batches]),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Return what decides which samples follow a cursor."""
        return {
            "sequence_length": self.sequence_length,
            "samples": self.sampling.samples,
            "mask_documents": self.sampling.mask_documents,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was; nothing but training does.

        Raises:
            ValueError: its samples were others than these would be.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self._restored = dict(state_dict)
        if self.trainer is not None:
            self._apply(self._restored)

    def _apply(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != 1 or "cursor" not in state:
            raise ValueError("the checkpoint's data state is no stream's. Give it to the data module that it was saved with.")
        saved, here = state["settings"], self._settings()
        changed = [key for key in here if saved.get(key) != here[key]]
        if changed and state["sample"]:
            raise ValueError(
                f"the checkpoint was trained with {', '.join(f'{key}={saved.get(key)!r}' for key in changed)}, and the data "
                f"module has {', '.join(f'{key}={here[key]!r}' for key in changed)}. Set it as it was, or begin a new run."
            )
        self._sample, self._trainer_then = int(state["sample"]), None
        self._cursors, self._restored = {0: cursor_from_state(state["cursor"])}, {}

    # -------------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> StreamLoader:
        """Return this rank's batches, from where the run is."""
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        given = self.trainer.distributed_sampler_kwargs
        rank, num_ranks = (0, 1) if given is None else (given["rank"], given["num_replicas"])
        if self._global_batch_size % (num_ranks * accumulate):
            raise ValueError(
                f"global_batch_size={self._global_batch_size} can't be divided over {num_ranks} data-parallel ranks × "
                f"{accumulate} accumulated batches. Set it to a multiple of {num_ranks * accumulate}."
            )
        self._freeze()
        self._trainer_then, self._processed_then = self.trainer, num_processed_batches(self.trainer)
        self._batch = self._global_batch_size // accumulate
        batches = _Batches(self, rank, num_ranks, self._model_vocab_size())
        return StreamLoader(self, batches, self.trainer.strategy.root_device)

    def val_dataloader(self) -> Any:
        """Return a loader for each validation corpus."""
        if self._validation is None:
            return []
        self._validation.trainer = self.trainer
        return self._validation.val_dataloader()

    def _model_vocab_size(self) -> int | None:
        assert self.trainer is not None
        models = [model for _, model in transformers_models(self.trainer.lightning_module)]
        check_positions(models, self.sequence_length)
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in models]
        return self._vocab_size or min(sizes, default=None)


class _Encode:
    """Makes token ids of a stream's rows."""

    def __init__(self, encoder: RowEncoder) -> None:
        self._encoder = encoder

    def __call__(self, rows: list[Any]) -> list[Any]:
        items: list[Record | Refused] = [
            Record("", row) if isinstance(row, Mapping) else Refused("not a mapping", "", type(row).__name__) for row in rows
        ]
        return list(self._encoder.encode(items))


class _Batches(IterableDataset[tuple[dict[str, Tensor], Cursor]]):
    """One rank's part of each batch from a cursor on, and where the next one begins."""

    def __init__(self, data: StreamDataBase, rank: int, num_ranks: int, vocab_size: int | None) -> None:
        self._settings = data._rows, _Encode(data._encoder), data._repeat, data._skip
        self._sampling, self._length, self._batch = data.sampling, data.sequence_length, data._batch
        self._rank, self._num_ranks, self._vocab_size = rank, num_ranks, vocab_size
        self.begin = Cursor()

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Cursor]]:
        rows, encode, repeat, skip = self._settings
        packs = self._sampling.samples == "documents"
        documents = DocumentStream(rows, encode, shortest=2 if packs else 1, repeat=repeat, skip=skip)
        own = self._batch // self._num_ranks
        mine = range(self._rank * own, (self._rank + 1) * own)
        out, place = self._sampling.rows(own, self._length), 0
        for sample in samples_of(documents, self.begin, self._length, self._sampling):
            if place in mine:
                sample.put(out, place - mine.start, apart=packs or self._sampling.mask_documents)
            place += 1
            if place == self._batch:
                yield self._checked({name: torch.from_numpy(value) for name, value in out.batch().items()}), sample.following
                out, place = self._sampling.rows(own, self._length), 0

    def _checked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        largest = max(int(batch["input_ids"].max()), int(batch["shift_labels"].max()))
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ValueError(
                f"the stream holds token id {largest}, and the model's vocabulary has {self._vocab_size}. Tokenise with the "
                "model's tokenizer."
            )
        return batch


class StreamLoader:
    """The training batches of a rank; each iteration begins at the first sample not yet trained."""

    def __init__(self, data: StreamDataBase, batches: _Batches, device: torch.device) -> None:
        self._data, self._batches, self._device = data, batches, device
        # By this name Lightning's loops find it when they are done, and stop its workers.
        self._iterator: Iterator[Any] | None = None
        self._next = -1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data = self._data
        first = data._num_batches
        if self._iterator is None or self._next != first:  # else it goes on, with what its worker has ready
            self._batches.begin = data._cursors[first]
            self._iterator, self._next = data._loading.iterate(self._batches, None, self._device), first
        for _ in range(data._steps_per_epoch * self._accumulate if data._steps_per_epoch else 1 << 62):
            found = next(self._iterator, None)
            if found is None:
                self._iterator = None
                return
            batch, cursor = found
            self._next += 1
            data._cursors[self._next] = cursor
            for trained in [index for index in data._cursors if index < data._num_batches]:
                del data._cursors[trained]
            yield batch

    @property
    def _accumulate(self) -> int:
        return self._data._global_batch_size // self._data._batch

    # Lightning's loops take a loader with these for one that can be resumed. Where it goes on is the data module's to keep.

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class StreamData(StreamDataBase, L.LightningDataModule):
    __doc__ = StreamDataBase.__doc__


@functools.cache
def stream_data_class(package: str = "lightning.pytorch") -> type[StreamDataBase]:
    """Return the data module for one of Lightning's two packages: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    if package == "lightning.pytorch":
        return StreamData
    base = importlib.import_module(package).LightningDataModule
    return type("StreamData", (StreamDataBase, base), {"__module__": __name__, "__doc__": StreamDataBase.__doc__})
