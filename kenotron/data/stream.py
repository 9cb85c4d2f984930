"""The training samples of a run, by their global index: a pure function of the settings, and so of constant cost anywhere.

The global sample g is of the segment that holds it, whose blend tells its corpus and that it is the corpus' i-th sample
there. Counted on through all segments in which the corpus has the same sequence length, i is the place in an endless order:
pass after pass over the corpus, each shuffled by a permutation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from kenotron.data.blend import Blend
from kenotron.data.fim import Infiller
from kenotron.data.packing import Packing
from kenotron.data.permutation import Permutation, digest
from kenotron.data.rows import Rows, Samples
from kenotron.data.source import TokenSource
from kenotron.data.stages import Segment, at_sample
from kenotron.data.windows import Windows

Kind = Literal["windows", "documents"]

_AT_ONCE = 1024  # samples whose places in a pass are computed together: one alone takes nearly as long


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How corpora become samples.

    Args:
        samples: ``"windows"``: a corpus is one text, cut every ``sequence_length`` tokens; ``"documents"``: whole documents
            are packed.
        mask_documents: windows only: documents do not see each other within one, and no pair of tokens of two is trained.
        shuffle: each pass has an order of its own; otherwise the corpus' own order.
        shift_windows: windows only: each pass cuts the corpus at other places.
        pad_token_id: stands where a sample has no token; never learned.
        seed: of the orders and places.
        corpus_ids: batches also have ``corpus``, int64 of shape (samples,): the number of each sample's corpus, in the order in
            which they are named. Models take no such argument: it is for your ``training_step`` to take out.

    Raises:
        ValueError: an unknown kind of samples, or a negative id.
    """

    samples: Kind = "windows"
    mask_documents: bool = False
    shuffle: bool = True
    shift_windows: bool = True
    pad_token_id: int = 0
    seed: int = 0
    corpus_ids: bool = False

    def __post_init__(self) -> None:
        if self.samples not in ("windows", "documents"):
            raise ValueError(f"samples={self.samples!r} is unknown. Set samples to 'windows' or 'documents'.")
        if self.pad_token_id < 0:
            raise ValueError(f"pad_token_id={self.pad_token_id}: set an id of the vocabulary, 0 or more.")

    def cut(self, source: TokenSource, sequence_length: int, cache: Path | None = None) -> Samples:
        """Return a corpus as samples; ``cache`` is a folder where packing keeps its counts."""
        if self.samples == "documents":
            return Packing(source, sequence_length, cache=cache)
        return Windows(source, sequence_length, mask_documents=self.mask_documents)

    def rows(self, count: int, sequence_length: int, *, mark_documents: bool = False) -> Rows:
        """Return a batch to be filled; ``mark_documents``: also where they may see each other."""
        apart = self.samples == "documents" or self.mask_documents
        return Rows(count, sequence_length, self.pad_token_id, apart or mark_documents, apart)


@dataclass(frozen=True)
class Consumed:
    """What a run has taken of a corpus.

    Args:
        samples: their number. tokens: their positions, padding included. epochs: tokens over those of the corpus.
    """

    samples: int
    tokens: int
    epochs: float


class Stream:
    """All samples of a run.

    Args:
        sources: the corpora by name. segments: of the run. sampling: how they become samples.
        first: the sample from which on batches are wanted; what is before it is only counted.
        cut: returns a corpus, by its name, as samples of a length; ``None``: as ``sampling`` does.
        infiller: rearranges documents in samples.

    Raises:
        ValueError: a segment names a corpus that is not there, or a corpus has nothing to train on.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        segments: Sequence[Segment],
        sampling: Sampling,
        first: int = 0,
        cut: Callable[[str, int], Samples] | None = None,
        infiller: Infiller | None = None,
    ) -> None:
        ahead = segments[at_sample(segments, first) :]
        for segment in ahead:
            unknown = sorted(set(segment.weights) - set(sources))
            if unknown:
                raise ValueError(
                    f"the stage from step {segment.start_step} on uses {', '.join(unknown)}, but the corpora are "
                    f"{', '.join(sources)}. Name it among the corpora."
                )
        self.segments, self.sampling = tuple(segments), sampling
        self._sources, self._infiller = dict(sources), infiller
        self._blends = [Blend(list(segment.weights.values())) for segment in segments]
        wanted = {(name, segment.sequence_length) for segment in ahead for name in segment.weights}
        cut = cut or (lambda name, length: sampling.cut(sources[name], length))
        self._samples = {key: cut(*key) for key in sorted(wanted)}
        self._before = [self._counted_before(index) for index in range(len(segments))]
        self._make_caches()

    def _make_caches(self) -> None:
        self._shuffled = lru_cache(maxsize=64)(_shuffled)
        self._phase = lru_cache(maxsize=64)(_phase)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shuffled", "_phase")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def batch(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Return the global samples [first, first + count), all of one segment's sequence length: int64 arrays (count, length).

        See :meth:`kenotron.data.rows.Rows.batch` for the names; ``corpus`` is told by :class:`Sampling`.
        """
        index = at_sample(self.segments, first)
        segment = self.segments[index]
        out = self.sampling.rows(count, segment.sequence_length, mark_documents=self._infiller is not None)
        names = list(segment.weights)
        corpora, places = self._blends[index].locate(np.arange(first, first + count) - segment.mix_start)
        for corpus in set(corpora.tolist()):
            name, rows = names[corpus], np.flatnonzero(corpora == corpus)
            self._fill(out, rows, name, segment.sequence_length, places[rows] + self._before[index][name])
        if self._infiller is not None:
            self._infiller.apply(out, first)
        batch = out.batch()
        if self.sampling.corpus_ids:
            numbers = {name: number for number, name in enumerate(self._sources)}
            batch["corpus"] = np.array([numbers[name] for name in names])[corpora]
        return batch

    def corpora_of(self, first: int, count: int) -> list[str]:
        """Return the names of the corpora that the samples [first, first + count) come from."""
        index = at_sample(self.segments, first)
        corpora, _ = self._blends[index].locate(np.arange(first, first + count) - self.segments[index].mix_start)
        return [name for number, name in enumerate(self.segments[index].weights) if number in corpora]

    def _fill(self, out: Rows, rows: np.ndarray, name: str, length: int, places: np.ndarray) -> None:
        """Write the samples at ``places`` in a corpus' endless order."""
        samples, seed = self._samples[name, length], self.sampling.seed
        passes, numbers = np.divmod(places, samples.num_samples)
        for one in set(passes.tolist()):
            here = passes == one
            key = seed, name, length, one
            chosen = self._order(samples.num_samples, numbers[here], key) if self.sampling.shuffle else numbers[here]
            samples.fill(out, rows[here], chosen, self._phase(*key) if self.sampling.shift_windows else 0)

    def _order(self, num_samples: int, places: np.ndarray, key: tuple[int | str, ...]) -> np.ndarray:
        """Return which samples of a corpus stand at ``places`` of a pass. A run asks for neighbours, which come together."""
        blocks, rests = np.divmod(places, _AT_ONCE)
        found = np.empty_like(places)
        for block in set(blocks.tolist()):
            here = blocks == block
            found[here] = self._shuffled(num_samples, block, *key)[rests[here]]
        return found

    # -------------------------------------------------------------------------------------------------- consumption

    def _mixes(self) -> list[tuple[int, int]]:
        """Return each mix once: the index of its first segment, and the sample where it ends (-1: never)."""
        found: list[tuple[int, int]] = []
        for index, segment in enumerate(self.segments):
            if index and self.segments[index - 1].mix_start == segment.mix_start:
                continue
            if found:
                found[-1] = found[-1][0], segment.mix_start
            found.append((index, -1))
        return found

    def _counts(self, sample: int) -> dict[tuple[str, int], int]:
        """Return how many of the first samples of the run are of each corpus and sequence length."""
        counts: dict[tuple[str, int], int] = {}
        for index, end in self._mixes():
            segment = self.segments[index]
            stop = sample if end < 0 else min(sample, end)
            if stop <= segment.mix_start:
                break
            for name, count in zip(segment.weights, self._blends[index].counts(stop - segment.mix_start), strict=True):
                key = name, segment.sequence_length
                counts[key] = counts.get(key, 0) + int(count)
        return counts

    def _counted_before(self, index: int) -> dict[str, int]:
        """Return how many samples each corpus of a segment had, at this sequence length, where the segment's mix began."""
        segment = self.segments[index]
        counts = self._counts(segment.mix_start)
        return {name: counts.get((name, segment.sequence_length), 0) for name in segment.weights}

    def consumed(self, sample: int) -> dict[str, Consumed]:
        """Return what the first ``sample`` samples have taken of each corpus."""
        counts = self._counts(sample)
        found = {}
        for name, source in self._sources.items():
            of_name = [(length, count) for (other, length), count in counts.items() if other == name]
            tokens = sum(length * count for length, count in of_name)
            found[name] = Consumed(sum(count for _, count in of_name), tokens, tokens / max(source.num_tokens - 1, 1))
        return found


def _shuffled(num_samples: int, block: int, *key: int | str) -> np.ndarray:
    """Return a block of the order of a pass: int64 of shape (1024,), less at the end."""
    places = np.arange(block * _AT_ONCE, min((block + 1) * _AT_ONCE, num_samples))
    return Permutation(num_samples, *key)(places)


def _phase(*key: int | str) -> int:
    """Return where a pass cuts windows."""
    return int.from_bytes(digest("phase", *key)[:8], "little")
