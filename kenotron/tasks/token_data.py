"""The data of a pretraining as a Lightning data module, exactly resumable under any trainer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np

from kenotron.data.corpus import find_tokenizer, open_corpus
from kenotron.data.fim import FillInTheMiddle, Infiller
from kenotron.data.loader import Loading, TrainLoader, ValidationLoader
from kenotron.data.made import MadeCorpus
from kenotron.data.masked import with_mask
from kenotron.data.rows import Samples
from kenotron.data.source import TokenSource
from kenotron.data.stages import (
    Segment,
    Stage,
    after_batches,
    align,
    check_division,
    from_state,
    history,
    plan,
    resume,
    to_state,
)
from kenotron.data.stream import Consumed, Sampling, Stream
from kenotron.data.windows import check_sequence_length
from kenotron.parallel.plan import transformers_models

if TYPE_CHECKING:
    _DataModule = L.LightningDataModule
else:  # mixed in below, from either of Lightning's packages
    _DataModule = object

#: Where the check of sources in memory looks at ids.
_PLACES, _IDS_AT_EACH = 64, 1024


class TokenDataBase(_DataModule):
    """Token corpora as samples for causal language models: blended, shuffled, staged, and resumed exactly.

    Batches are dicts of int64 tensors of shape (samples of this rank, sequence length): ``input_ids``; ``shift_labels``, the
    token that follows each position (-100: none); ``labels``, the same for code that shifts by itself; and ``position_ids``
    where documents are kept apart. ``model(**batch)`` is right for transformers' models and for
    :class:`kenotron.models.Decoder`.

    The order of all samples of a run follows from the seed and the corpora, not from ranks, workers or batch sizes. What a
    checkpoint keeps of it is how many samples have been trained. A second ``fit`` of the same trainer goes on, another
    trainer begins anew unless it is given a checkpoint.

    One epoch of the trainer is ``steps_per_epoch`` optimizer steps; the next one goes on where it ended, in the midst of passes
    over the corpora or not.

    Args:
        corpora: by name, each a path (see :func:`kenotron.data.corpus.open_corpus`), a mapping with ``path`` and further
            arguments of that function, a ``TokenSource``, or a :class:`kenotron.data.made.MadeCorpus`, which one process of a
            node makes before training. The names are part of the order. Masks beside tokens (``.ds.loss``) are kept to.
        sequence_length: positions of a sample.
        global_batch_size: samples of an optimizer step: over all data-parallel ranks and accumulated batches. A rank's batch is
            this divided by both.
        weights: of corpora in the blend, of any scale; ``None``: as many samples as each has.
        stages: what changes at later steps.
        validation: corpora to validate on, as ``corpora``; a loader for each, in this order.
        sampling: how corpora become samples. loading: how batches are prepared.
        val_batch_size: samples of a rank's validation batch; ``None``: as in training.
        vocab_size: of the model; ``None``: what the transformers models in the module say.
        steps_per_epoch: ``None``: as many as the corpora of the first stage have samples for, once.
        cache_dir: where the packing of documents keeps its counts, and corpora that are made their tokens.
        fim: rearranges documents of training samples for filling in the middle.

    Raises:
        ValueError: a number out of range, an unknown corpus, or no corpus.
    """

    def __init__(
        self,
        corpora: Mapping[str, Any],
        sequence_length: int,
        global_batch_size: int,
        weights: Mapping[str, float] | None = None,
        stages: Sequence[Stage] = (),
        validation: Mapping[str, Any] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        loading: Loading = Loading(),  # noqa: B008
        val_batch_size: int | None = None,
        vocab_size: int | None = None,
        steps_per_epoch: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        fim: FillInTheMiddle | None = None,
    ) -> None:
        super().__init__()
        check_sequence_length(sequence_length)
        numbers = {
            "global_batch_size": global_batch_size, "val_batch_size": val_batch_size, "vocab_size": vocab_size,
            "steps_per_epoch": steps_per_epoch,
        }  # fmt: skip
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: set it to 1 or more.")
        for name, named in {"corpora": corpora, "validation": validation or {}}.items():
            if not isinstance(named, Mapping):
                raise ValueError(f"{name}={named!r} has no names: give each corpus one, as {{'web': 'data/web'}}.")
        if not corpora:
            raise ValueError("corpora is empty: name at least one, as {'web': 'data/web'}.")
        unknown = sorted({*(weights or {}), *(name for stage in stages for name in stage.corpora or {})} - set(corpora))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} has a weight, but the corpora are {', '.join(corpora)}. Name it there, too."
            )
        self.sequence_length, self.sampling, self.loading = sequence_length, sampling, loading
        self._corpora, self._validation = dict(corpora), dict(validation or {})
        self._weights, self._stages = None if weights is None else dict(weights), tuple(stages)
        self._global_batch_size, self._val_batch_size = global_batch_size, val_batch_size
        self._vocab_size, self._steps_per_epoch = vocab_size, steps_per_epoch
        self._cache = None if cache_dir is None else Path(cache_dir)
        self._fim: FillInTheMiddle | None = fim
        self._infiller: Infiller | None = None
        if weights is not None:
            plan(self._all_stages(self._weights or {}))
        self._sources: dict[str, TokenSource] = {}
        self._cuts: dict[tuple[str, int], Samples] = {}
        self._validation_sources: dict[str, TokenSource] = {}
        self._stream: Stream | None = None
        self._restored: dict[str, Any] = {}
        self._saved_steps: int | None = None
        # The run's position: samples that were trained when the trainer had processed so many batches.
        self._sample, self._processed_then, self._accumulate = 0, 0, 1
        self._trainer_then: Any = None

    @functools.cached_property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer of the first corpus that tells its own. Checkpoints note it, for ``kenotron generate``."""
        return _tokenizer_of(self._corpora)

    def _all_stages(self, weights: Mapping[str, float]) -> list[Stage]:
        first = Stage(
            start_step=0,
            corpora=weights,
            sequence_length=self.sequence_length,
            global_batch_size=self._global_batch_size,
        )
        return [first, *self._stages]

    # -------------------------------------------------------------------------------------------------------- set-up

    def prepare_data(self) -> None:
        """Make the corpora that are to be made. Lightning calls this in one process of a node while the others wait."""
        for corpus in [*self._corpora.values(), *self._validation.values()]:
            if isinstance(corpus, MadeCorpus):
                corpus.make(self._cache)

    def setup(self, stage: str) -> None:
        """Open the corpora, and go to where the run is."""
        self._validation_sources = self._open_all(self._validation, self._validation_sources)
        if stage != "fit":
            return
        self._sources = self._open_all(self._corpora, self._sources)
        if self._fim is not None:
            self._infiller = self._fim.infiller(self.sampling.seed, _tokenizer_of(self._corpora))
        self._freeze()
        if self._trainer_then not in (None, self.trainer):
            self._sample, self._stream, self._saved_steps = 0, None, None
        self._trainer_then = None
        if self._stream is None:
            self._go_on(self._planned(self._weights))
        if self._restored:
            self._apply(self._restored)

    def _open_all(self, given: Mapping[str, Any], opened: Mapping[str, TokenSource]) -> dict[str, TokenSource]:
        return {name: opened.get(name) or _open(name, corpus, self._vocab_size, self._cache) for name, corpus in given.items()}

    def _planned(self, weights: Mapping[str, float] | None) -> tuple[Segment, ...]:
        if weights is None:
            weights = {name: float(self._cut(name, self.sequence_length).num_samples) for name in self._sources}
        return plan(self._all_stages(weights))

    def _go_on(self, segments: Sequence[Segment]) -> None:
        """Take segments for the run, from the sample on where it is."""
        self._stream = Stream(self._sources, segments, self.sampling, self._sample, self._cut, self._infiller)

    def _cut(self, name: str, sequence_length: int) -> Samples:
        """Return a corpus as samples."""
        key = name, sequence_length
        if key not in self._cuts:
            self._cuts[key] = self.sampling.cut(self._sources[name], sequence_length, self._cache)
        return self._cuts[key]

    # ------------------------------------------------------------------------------------------------------- position

    @property
    def num_trained_samples(self) -> int:
        """How many samples of the run have been trained, over all ranks."""
        if self._trainer_then is None or self._stream is None:
            return self._sample
        batches = num_processed_batches(self._trainer_then) - self._processed_then
        return after_batches(self._stream.segments, self._sample, batches, self._accumulate)

    def consumed(self) -> dict[str, Consumed]:
        """Return what has been trained of each corpus so far."""
        return {} if self._stream is None else self._stream.consumed(self.num_trained_samples)

    def _freeze(self) -> None:
        """Count from now on anew."""
        self._sample = self.num_trained_samples
        if self._trainer_then is not None:
            self._processed_then = num_processed_batches(self._trainer_then)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, and what decides the order of its samples."""
        if self._stream is None:
            return self._restored
        sample = self.num_trained_samples
        return {
            "version": 1,
            "sample": sample,
            "sampling": dataclasses.asdict(self.sampling),
            "segments": to_state(history(self._stream.segments, sample)),
            "steps_per_epoch": self._num_steps(),
            "corpora": {name: [source.num_tokens, source.num_documents] for name, source in self._sources.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was; nothing but training does.

        Raises:
            ValueError: samples that were trained already, or their order, would not be what they were.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self._restored = dict(state_dict)
        if self._stream is not None:
            self._apply(self._restored)

    def _apply(self, state: Mapping[str, Any]) -> None:
        if state["version"] != 1:
            raise ValueError(f"the checkpoint's data state is of version {state['version']}, and this code reads version 1.")
        saved, here = state["sampling"], dataclasses.asdict(self.sampling)
        changed = [key for key in ("seed", "samples", "shuffle", "shift_windows") if saved[key] != here[key]]
        past = from_state(state["segments"])
        used = {name for segment in past for name in segment.weights} & set(self._sources)
        for name in sorted(used):
            source = self._sources[name]
            if state["corpora"].get(name) != [source.num_tokens, source.num_documents]:
                tokens, documents = state["corpora"].get(name, (0, 0))
                raise ValueError(
                    f"the corpus {name} had {tokens:,} tokens in {documents:,} documents when the checkpoint was saved, and "
                    f"has {source.num_tokens:,} in {source.num_documents:,}. Give the same files back; add new ones as a "
                    "corpus of another name, by a Stage."
                )
        if changed and state["sample"]:
            raise ValueError(
                f"the checkpoint's order of samples comes of {', '.join(f'{key}={saved[key]!r}' for key in changed)}, and the "
                f"data module has {', '.join(f'{key}={here[key]!r}' for key in changed)}. Set sampling as it was, or begin a "
                "new run."
            )
        self._sample, self._trainer_then = int(state["sample"]), None
        # Weights that nobody set stay what they were at first.
        planned = self._planned(past[0].weights if self._weights is None else self._weights)
        self._go_on(resume(past, planned, self._sample))
        self._saved_steps = state["steps_per_epoch"] if self._sample else None
        self._restored = {}

    # -------------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> TrainLoader:
        """Return this rank's batches, from where the run is."""
        self._check_attached()
        assert self._stream is not None and self.trainer is not None
        self._check_trainer(self.trainer)
        vocab_size = self._check_vocabulary(self._corpora, self._sources)
        self._freeze()
        self._trainer_then = self.trainer
        self._processed_then, self._accumulate = num_processed_batches(self.trainer), self.trainer.accumulate_grad_batches
        rank, num_ranks = self._data_rank()
        check_division(self._stream.segments, self._sample, num_ranks, self._accumulate)
        self._go_on(align(self._stream.segments, self._sample, self._accumulate))
        return TrainLoader(
            self._stream,
            lambda: self.num_trained_samples,
            rank=rank,
            num_ranks=num_ranks,
            accumulate=self._accumulate,
            num_batches=self._num_steps() * self._accumulate,
            vocab_size=vocab_size,
            loading=self.loading,
            device=self.trainer.strategy.root_device,
        )

    def val_dataloader(self) -> list[ValidationLoader]:
        """Return a loader for each validation corpus."""
        self._check_attached()
        assert self.trainer is not None
        self._check_vocabulary(self._validation, self._validation_sources)
        rank, num_ranks = self._data_rank()
        in_training = self._global_batch_size // (num_ranks * self.trainer.accumulate_grad_batches)
        return [
            ValidationLoader(
                name,
                self.sampling.cut(source, self.sequence_length, self._cache),
                self.sampling,
                self.sequence_length,
                batch=self._val_batch_size or max(in_training, 1),
                rank=rank,
                num_ranks=num_ranks,
                loading=self.loading,
                device=self.trainer.strategy.root_device,
            )
            for name, source in self._validation_sources.items()
        ]

    def _num_steps(self) -> int:
        """Return how many optimizer steps an epoch of the trainer has."""
        if self._steps_per_epoch or self._saved_steps:
            return self._steps_per_epoch or self._saved_steps or 1
        assert self._stream is not None
        first = self._stream.segments[0]
        num_samples = sum(self._cut(name, first.sequence_length).num_samples for name in first.weights)
        return max(num_samples // first.batch, 1)

    def _data_rank(self) -> tuple[int, int]:
        assert self.trainer is not None
        given = self.trainer.distributed_sampler_kwargs
        return (0, 1) if given is None else (given["rank"], given["num_replicas"])

    # --------------------------------------------------------------------------------------------------------- checks

    def _check_attached(self) -> None:
        if self.trainer is None:
            raise ValueError(
                "TokenData cuts its batches for the ranks and steps of a Trainer, and has none: give it to one, as in "
                "trainer.fit(module, data). kenotron.data.corpus.open_corpus(path) reads tokens without."
            )

    def _check_trainer(self, trainer: Any) -> None:
        if trainer.overfit_batches:
            raise ValueError(
                f"overfit_batches={trainer.overfit_batches} repeats batches, and TokenData goes on through its corpora. Leave "
                "it out, and give a corpus of a few documents."
            )
        if any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in trainer.callbacks):
            raise ValueError(
                "GradientAccumulationScheduler changes how many batches a step has, which global_batch_size decides here. "
                "Leave it out, and use Stage(start_step=..., global_batch_size=...)."
            )

    def _check_vocabulary(self, given: Mapping[str, Any], sources: Mapping[str, TokenSource]) -> int | None:
        """Refuse ids that the model does not know, where they can be found before training. Returns the vocabulary's size."""
        assert self.trainer is not None
        models = [model for _, model in transformers_models(self.trainer.lightning_module)]
        check_positions(models, max([self.sequence_length, *(stage.sequence_length or 0 for stage in self._stages)]))
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in models]
        vocab_size = self._vocab_size or min(sizes, default=None)
        if vocab_size is None:
            return None
        if self.sampling.pad_token_id >= vocab_size:
            raise ValueError(
                f"pad_token_id={self.sampling.pad_token_id}, and the model's vocabulary has {vocab_size}. Set it to less."
            )
        if self._infiller is not None and self._infiller.largest_id >= vocab_size:
            raise ValueError(
                f"fill-in-the-middle puts in token {self._infiller.largest_id}, and the model's vocabulary has {vocab_size}. "
                "Build a model with a larger one, or set other sentinels."
            )
        if self._vocab_size is None:  # else it was known when they were opened
            for name in sources:
                _open(name, given[name], vocab_size, self._cache)
        return vocab_size


def check_positions(models: Sequence[Any], sequence_length: int) -> None:
    """Refuse samples that are longer than a model says it can take, which rotary embeddings compute without a word.

    Raises:
        ValueError: ``sequence_length`` is beyond ``max_position_embeddings``.
    """
    for model in models:
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(most, int) and 0 < most < sequence_length:
            raise ValueError(
                f"sequence_length={sequence_length}, and the model has max_position_embeddings={most}. Set sequence_length to "
                f"{most} or less, or in the model's configuration max_position_embeddings to {sequence_length} (and "
                "rope_parameters, where its weights were trained on shorter sequences)."
            )


def num_processed_batches(trainer: Any) -> int:
    """Return how many training batches a trainer has been through, in all its fits: one that failed is not counted."""
    count: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    return count


def _tokenizer_of(corpora: Mapping[str, Any]) -> Path | None:
    """Return the tokenizer of the first corpus that tells its own."""
    for corpus in corpora.values():
        place = corpus.get("path") if isinstance(corpus, Mapping) else corpus
        if isinstance(corpus, MadeCorpus) and corpus.tokenizer is not None:
            return Path(corpus.tokenizer)
        if isinstance(place, (str, os.PathLike)) and (found := find_tokenizer(os.fspath(place))) is not None:
            return found
    return None


def _open(name: str, corpus: Any, vocab_size: int | None, cache: Path | None = None) -> TokenSource:
    """Return a corpus that was given in any of the ways that ``TokenData`` takes."""
    if isinstance(corpus, MadeCorpus):
        return corpus.open(name, cache=cache, vocab_size=vocab_size)
    if isinstance(corpus, (str, os.PathLike)):
        return with_mask(open_corpus(os.fspath(corpus), name=name, vocab_size=vocab_size))
    if isinstance(corpus, Mapping):
        if not {"path"} <= set(corpus) <= {"path", "token_size", "vocab_size"}:
            raise ValueError(f"the corpus {name} has {', '.join(corpus) or 'nothing'}: give path, and token_size if need be.")
        return with_mask(open_corpus(**{"name": name, "vocab_size": vocab_size, **corpus}))
    if not isinstance(getattr(corpus, "num_tokens", None), int):
        raise ValueError(
            f"the corpus {name} is a {type(corpus).__name__}. Give the path of tokenised files, or a kenotron.data.TokenSource."
        )
    source: TokenSource = corpus
    if vocab_size is not None:
        _look_at_ids(source, vocab_size)
    return source


def _look_at_ids(source: TokenSource, vocab_size: int) -> None:
    for start in np.linspace(0, max(source.num_tokens - _IDS_AT_EACH, 0), _PLACES).astype(np.int64).tolist():
        ids = source.read(start, min(start + _IDS_AT_EACH, source.num_tokens))
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            raise ValueError(
                f"the corpus {source.name!r} has the token id {int(ids[wrong[0]])} at position {start + int(wrong[0])}, and "
                f"the vocabulary has {vocab_size}. Tokenise with the model's tokenizer, or build a model with a larger one."
            )


class TokenData(TokenDataBase, L.LightningDataModule):
    __doc__ = TokenDataBase.__doc__


@functools.cache
def token_data_class(package: str = "lightning.pytorch") -> type[TokenDataBase]:
    """Return the data module for one of Lightning's two packages: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    if package == "lightning.pytorch":
        return TokenData
    base = importlib.import_module(package).LightningDataModule
    return type("TokenData", (TokenDataBase, base), {"__module__": __name__, "__doc__": TokenDataBase.__doc__})
