"""How the ranks of one save find each other: small files in the unpublished directory, and no collective.

A save may be made where other ranks are dead (on an exception) or busy (in the background), so nothing here waits
without a limit and nothing needs a process group. In ``.<name>.<save id>.partial/control/`` stand:

- ``lock``: locked by every rank for as long as it lives and saves, so that a later start can tell what died.
- ``begun-NNNNN``: rank N takes part. It becomes ``left-NNNNN`` when that rank has given up and removed its files.
- ``report-NNNNN.json``: what rank N has written, durably.
- ``verdict.json``: made by a hard link, so that there is exactly one: rank 0's "publish" once all has been checked, or
  the failure of whichever rank came first. All ranks raise that failure, with its text.

Where nodes share no file system, the ranks of each node meet so in a folder of their own, with the first of them in rank
0's place, and these agree as ``nodes.py`` tells.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from kenotron.checkpoint.errors import CoverageError, RanksMissingError, SaveFailedError
from kenotron.checkpoint.format import MANIFEST, unpublished, unpublished_name
from kenotron.checkpoint.manifest import head
from kenotron.durable import make_directories, write_durably
from kenotron.files import NotAFileError, read_regular

CONTROL = "control"
_LOCK = "lock"
_VERDICT = "verdict.json"
PUBLISH: dict[str, str] = {"publish": "yes"}
_PERHAPS = "perhaps"  # this node gives up, others may have published: nothing is removed
_FAILURES = {error.__name__: error for error in (SaveFailedError, CoverageError, RanksMissingError)}
_SHORTEST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.1
#: Of the time since the save began: nobody learns of another rank's part much later than it could.
_LONGEST_PAUSE_SHARE = 0.02
#: A process that has ended may have published before, which a network file system shows a little later.
_GRACE_S = 1.5


class FolderLock:
    """Marks an unpublished directory as that of a living process. Made with the directory; ends with the process.

    Args:
        folder: the directory, which is made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = -1
        make_directories(folder / CONTROL)
        self._descriptor = os.open(folder / CONTROL / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # without locks a leftover would have to be removed by hand
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the directory."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # nothing was written to it: no reason for a complete save to fail
                os.close(descriptor)

    def remove(self) -> None:
        """Remove the mark from the directory, which is about to be published, and let go."""
        shutil.rmtree(self.folder / CONTROL, ignore_errors=True)
        self.release()


class Meeting:
    """One rank's view of one save.

    Args:
        path: the final, absolute path.
        save_id: names this save and no other.
        rank: this one. ranks: who takes part; the first leads, as rank 0 does where all see the folder.
        timeout_s: how long the whole save may take, from now on.
        start_timeout_s: how long it may take until all ranks have begun; None not to wait for that.
        may_be_taken_back: the leader may undo the publication, until it has cleared the control files.
        ended: tells which ranks' processes are gone, where that is known.
    """

    def __init__(
        self,
        path: Path,
        save_id: str,
        *,
        rank: int,
        ranks: Sequence[int],
        timeout_s: float,
        start_timeout_s: float | None,
        may_be_taken_back: bool = False,
        ended: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.path = path
        self._ended = ended
        self.folder = unpublished(path, save_id)
        self._control = self.folder / CONTROL
        self._save_id = save_id
        self._rank = rank
        self._ranks = ranks
        self.leads = rank == ranks[0]
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._start = time.monotonic()
        self._hurried, self._patience_s = 0.0, math.inf
        self._has_reported = False
        self._may_be_taken_back = may_be_taken_back
        self._lock: FolderLock | None = None

    def hurry(self, within_s: float) -> None:
        """Some ranks may be dead: once this one has done its part, give the others as long as that took, and ``within_s``.

        From any thread.
        """
        self._hurried, self._patience_s = time.monotonic(), within_s

    def begin(self) -> None:
        """Make the unpublished directory and say that this rank takes part.

        Raises:
            ValueError: the save id was used before.
            OSError: the directory cannot be made.
        """
        self._start = time.monotonic()
        if self._published_by_rank_0():
            raise ValueError(f"save_id={self._save_id!r} is published as {self.path}; use a new one for each save")
        self._lock = FolderLock(self.folder)
        try:
            (self._control / f"begun-{self._rank:05d}").touch(exist_ok=False)
        except FileExistsError:
            problem = f"save_id={self._save_id!r} was used before for {self.path}; use a new one for each save"
            raise ValueError(problem) from None

    def wait_for_start(self) -> None:
        """Return when all ranks have begun; ``RanksMissingError``, which names the others, when the time is up."""
        if self._start_timeout_s is not None:
            self.wait_until(lambda: not self._missing("begun"), self._start_timeout_s, self._who_never_began)

    def report(self, content: dict[str, Any]) -> None:
        """Hand rank 0 what this rank has written."""
        self._has_reported = True  # from here on rank 0 may publish, so that the files are no longer ours to remove
        write_durably(self._control / f"report-{self._rank:05d}.json", json.dumps(content, allow_nan=False).encode())

    def wait_for_reports(self) -> list[dict[str, Any]]:
        """Return the reports of all ranks, in their order; ``RanksMissingError`` when the time is up."""
        self.wait_until(lambda: not self._missing("report"), self._timeout_s, self._who_is_late)
        return [json.loads(read_regular(file)) for file in sorted(self._control.glob("report-*.json"))]

    def decide_to_publish(self) -> None:
        """Close the save to failures of other ranks; raise the one that came first, if one did."""
        raise_failure(self._decide(PUBLISH))

    def wait_for_publication(self) -> None:
        """Return when rank 0 has renamed the directory and cleared it; raise the failure that any rank has told."""
        self.wait_until(self._is_settled, self._timeout_s, self._who_is_late)

    def withdraw(self, error: BaseException, own_files: Iterable[str], *, keep: bool = False) -> SaveFailedError:
        """End a save that ``error`` stopped: tell the others why, remove files, and return what all ranks raise.

        A rank removes its own files, rank 0 those of all (some may be dead), the last one the directory: the last of
        the world, so that a rank that comes late finds the verdict, or, where all wait only so long for a start, the
        last of those that came. What stays is swept by the next save to this path.

        Args:
            keep: remove nothing, since other nodes may have published their parts.
        """
        own = self.describe(error)
        if self._published_by_rank_0():  # under the unpublished name may now stand the former checkpoint
            return own
        with contextlib.suppress(OSError):
            if not self._has_reported:  # so rank 0 cannot be publishing them; and a full disk gets room for the verdict
                self._discard(own_files)
            if keep:
                self._overrule(failing(own) | {"publish": _PERHAPS})
                return own
            verdict = self._decide(failing(own))
            if verdict["publish"] == _PERHAPS:
                return _failure(verdict)
            if verdict == PUBLISH:
                if not self.leads:
                    return own
                verdict = failing(own)  # the rename itself failed: only who decided can take it back
                self._overrule(verdict)
            self._discard(own_files)
            os.rename(self._control / f"begun-{self._rank:05d}", self._control / f"left-{self._rank:05d}")
            if not self._missing("left") or (self._start_timeout_s is not None and not self._present("begun")):
                shutil.rmtree(self.folder)
            return _failure(verdict)
        return own

    def sweep(self) -> None:
        """Remove what dead saves to the same path have left (on the rank that leads, before it begins)."""
        if not self.path.parent.is_dir():
            return
        for leftover in self.path.parent.iterdir():
            if unpublished_name(leftover.name) != self.path.name or leftover == self.folder:
                continue
            if leftover.suffix == ".replaced" and not os.path.lexists(self.path):
                os.rename(leftover, self.path)  # a crash came between the two renames: see put_in_place
            else:
                shutil.rmtree(leftover, ignore_errors=True)

    def clear(self) -> None:
        """Remove the control files from the published checkpoint, where nobody minds them."""
        with contextlib.suppress(OSError):  # `ignore_errors` of Python 3.11 does not cover closing
            shutil.rmtree(self.path / CONTROL, ignore_errors=True)

    def end(self) -> None:
        """Let go of what lasts as long as the save."""
        if self._lock is not None:
            self._lock.release()

    def _discard(self, own_files: Iterable[str]) -> None:
        names = [path.name for path in self.folder.iterdir() if path.is_file()] if self.leads else own_files
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def describe(self, error: BaseException) -> SaveFailedError:
        """Return what the others raise when this rank fails with ``error``."""
        if isinstance(error, SaveFailedError):
            return error
        return SaveFailedError(f"saving {self.path} failed on rank {self._rank}: {type(error).__name__}: {error}")

    def wait_until(
        self,
        is_done: Callable[[], bool],
        within_s: float | None,
        who_is_missing: Callable[[], str],
        *,
        may_extend: bool = True,
    ) -> None:
        """Return when ``is_done``, raise the failure that any rank has told, or ``RanksMissingError`` when time is up.

        Args:
            within_s: how long it may take since the save began; None for as long as the whole save.
            may_extend: allow as long again where the save is decided and only a rename is left.
        """
        within_s = self._timeout_s if within_s is None else within_s
        own_part_s = time.monotonic() - self._start
        began, deadline, pause = time.monotonic(), self._start + within_s, _SHORTEST_PAUSE_S
        is_extended, alone_since = False, math.inf
        while not is_done():
            verdict = self._read_verdict()
            raise_failure(verdict)
            if self._is_gone() and not is_done():
                raise SaveFailedError(
                    f"the files of the save of {self.path} (save id {self._save_id}) are gone: "
                    f"another save to the same path has begun, or they were removed"
                )
            now = time.monotonic()
            alone_since = min(alone_since, now) if (gone := self._gone()) else math.inf
            if now >= alone_since + _GRACE_S:
                raise RanksMissingError(f"saving {self.path} was given up: the processes of the ranks {gone} have ended")
            if now >= min(deadline, max(began, self._hurried) + own_part_s + self._patience_s):
                if verdict != PUBLISH or is_extended or not may_extend:
                    waited_s = within_s if now >= deadline else now - self._start
                    raise RanksMissingError(f"saving {self.path} was given up after {waited_s:.3g} s: {who_is_missing()}")
                # All is written and checked: a rename is left.
                deadline, is_extended = now + min(within_s, self._patience_s), True
                self._patience_s = math.inf
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_SHARE * (now - self._start)))

    def _gone(self) -> list[int]:
        """Return the ranks without which nothing is published any more: their processes have ended before their part."""
        ended = [rank for rank in self._ended() if rank in self._ranks or rank == 0]
        if not ended:
            return []
        missing = {*self._missing("report"), self._ranks[0], 0}  # who leads has more to do than its own part
        return sorted(missing.intersection(ended))

    def _who_never_began(self) -> str:
        return f"ranks {self._missing('begun')} never began (do all ranks see {self.path.parent}?)"

    def _who_is_late(self) -> str:
        absent = self._missing("begun")
        unfinished = [rank for rank in self._missing("report") if rank not in absent]
        reasons = [f"ranks {unfinished} began and did not finish"] if unfinished else []
        reasons += [self._who_never_began()] if absent else []
        return " and ".join(reasons) or "rank 0 had all reports and did not publish"

    def _missing(self, kind: str) -> list[int]:
        present = self._present(kind)
        return [rank for rank in self._ranks if rank not in present]

    def _present(self, kind: str) -> set[int]:
        with contextlib.suppress(FileNotFoundError):
            names = [name.removesuffix(".json") for name in os.listdir(self._control) if name.startswith(kind + "-")]
            return {int(name.removeprefix(kind + "-")) for name in names if not name.endswith(".tmp")}
        return set()

    def _is_gone(self) -> bool:
        # The second look: it may have been published and taken back since the first.
        return not self._control.is_dir() and not self._published_by_rank_0() and not self._control.is_dir()

    def _is_settled(self) -> bool:
        if not self._published_by_rank_0():
            return False
        # Cleared when no other node can make the leader take it back. The second look: it may have done so meanwhile.
        return not self._may_be_taken_back or (not (self.path / CONTROL).exists() and self._published_by_rank_0())

    def _published_by_rank_0(self) -> bool:
        start = head(self._save_id)
        try:
            return read_regular(self.path / MANIFEST, len(start)) == start
        except (FileNotFoundError, NotADirectoryError, NotAFileError):
            return False

    def _decide(self, verdict: dict[str, str]) -> dict[str, str]:
        """Make ``verdict`` the one of this save, or return the one that came before it. May raise ``OSError``."""
        draft = self._control / f"verdict-{self._rank:05d}.json"
        draft.write_text(json.dumps(verdict))
        try:
            os.link(draft, self._control / _VERDICT)  # fails where it exists, and is never seen half written
        except FileExistsError:
            return self._read_verdict() or verdict
        finally:
            draft.unlink()
        return verdict

    def _overrule(self, verdict: dict[str, str]) -> None:
        write_durably(self._control / _VERDICT, json.dumps(verdict).encode())

    def _read_verdict(self) -> dict[str, str] | None:
        try:
            verdict: dict[str, str] = json.loads(read_regular(self._control / _VERDICT))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return verdict


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what saves and removals that died have left in ``folder``, whatever their path; return what was removed.

    What a living process holds stays. So does what cannot be told from that, for want of locks on the file system.
    """
    removed = []
    for leftover in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = unpublished_name(leftover.name)
        if name is None or not leftover.is_dir() or not is_dead(leftover):
            continue
        if leftover.suffix == ".replaced" and not os.path.lexists(folder / name):
            os.rename(leftover, folder / name)  # a crash came between the two renames: see put_in_place
            continue
        shutil.rmtree(leftover, ignore_errors=True)
        removed.append(leftover)
    return removed


def is_dead(leftover: Path) -> bool:
    """Tell whether no living process holds an unpublished directory."""
    try:
        descriptor = os.open(leftover / CONTROL / _LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:  # somebody else's, or a file system that is read-only: it could not be removed either
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def failing(error: SaveFailedError) -> dict[str, str]:
    """Return the verdict that makes others raise ``error``."""
    return {"publish": "no", "error": type(error).__name__, "message": str(error)}


def raise_failure(verdict: dict[str, str] | None) -> None:
    """Raise what a verdict tells, if there is one and it does not tell to publish."""
    if verdict is not None and verdict != PUBLISH:
        raise _failure(verdict)


def _failure(verdict: dict[str, str]) -> SaveFailedError:
    """Return what a failing verdict makes others raise."""
    return _FAILURES.get(verdict["error"], SaveFailedError)(verdict["message"])
