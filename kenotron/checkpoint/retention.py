"""Which checkpoints are removed, and when: in the order of the calls, and none before what takes its place is published."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from kenotron.checkpoint.manifest import is_checkpoint
from kenotron.checkpoint.removal import remove_checkpoint


class Retention:
    """Removes checkpoints; on the worker, which saves one after the other. Its methods return what could not be removed."""

    def __init__(self) -> None:
        self._last_published: Path | None = None
        self._kept: list[Path] = []  # to be removed when it is no longer the last one
        self._stayed: defaultdict[Path, list[Path]] = defaultdict(list)  # of a save that failed: what it was to replace

    def published(self, path: Path) -> list[Exception]:
        """A checkpoint was published."""
        self._last_published = path
        self._kept = [kept for kept in self._kept if kept != path]  # it is wanted again
        return self._remove_kept()

    def remove(self, path: Path, failed: Path | None, *, at_once: bool = False) -> list[Exception]:
        """Remove a checkpoint, and what is only there because its save failed.

        Args:
            failed: what was to take its place, if that could not be saved: then it stays.
            at_once: nothing is to take its place.
        """
        if at_once and path == self._last_published:
            self._last_published = Path()
        wanted = [path, *self._stayed.pop(path, [])]
        if failed is not None:
            self._stayed[failed] += [each for each in wanted if each != failed]
            return []
        self._kept += wanted
        return self._remove_kept()

    def forget(self, failed: Path) -> None:
        """What stayed because the save of ``failed`` did not succeed is somebody's again."""
        self._stayed.pop(failed, None)

    def _remove_kept(self) -> list[Exception]:
        """Remove all that was to be removed, save what is still the last one that was published."""
        not_removed: list[Exception] = []
        kept, self._kept = self._kept, []
        for path in kept:
            if path == self._last_published or (self._last_published is None and is_checkpoint(path)):
                self._kept.append(path)
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:
                not_removed.append(error)
        return not_removed
