"""The contestants of ``checkpoint.py``: the state that all of them save, and how each of them saves and loads it.

Each gets what it works best with, made once and before the clock runs: a flat dict of tensors (of DTensors for DCP on several
ranks), or our list of ``LocalTensor``. Who knows nothing of ranks writes one file per rank. Imports are inside, so that a
contestant that is not installed, or does not import with this torch, fails alone.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, POSITIONS, LAYERS = 32000, 1024, 12


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """Return the 300 tensors of a GPT in fp32 with both Adam moments, of about ``megabytes`` in all (within 2 %)."""
    a, b, c = 12 * LAYERS, VOCABULARY + POSITIONS + 4 * LAYERS + 2, megabytes * 1e6 / 12
    width = max(8, round((math.sqrt(b * b + 4 * a * c) - b) / (2 * a) / 8) * 8)
    found: dict[str, tuple[int, ...]] = {"wte": (VOCABULARY, width), "wpe": (POSITIONS, width)}
    found |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    for i in range(LAYERS):
        found |= {f"h.{i}.{name}": (width,) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
        found |= {f"h.{i}.qkv": (3 * width, width), f"h.{i}.proj": (width, width)}
        found |= {f"h.{i}.fc1": (4 * width, width), f"h.{i}.fc2": (width, 4 * width)}
    return {f"{name}{moment}": shape for name, shape in found.items() for moment in ("", ".exp_avg", ".exp_avg_sq")}


class State:
    """What one rank holds: its rows (or columns) of each tensor.

    Each value is an integer that tells tensor and place, plus the number of steps taken, below 2**24 and so exact in fp32:
    what a checkpoint must hold is known without a copy of it.

    Args:
        megabytes: of all ranks together. columns: cut along the last dimension instead of the first.
    """

    def __init__(self, megabytes: int, rank: int = 0, world: int = 1, *, columns: bool = False, device: str = "cpu") -> None:
        self.rank, self.world, self.device, self._columns = rank, world, device, columns
        self.shapes = shapes(megabytes)
        self._block = torch.randint(0, 1 << 20, (1 << 22,), generator=torch.Generator().manual_seed(7)).float()
        self.step = 0
        self.tensors = {name: part.to(device, copy=True) for name, part in self._parts_at_start()}
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def cut(self, name: str) -> tuple[int, int, int]:
        """Return along which dimension, from where and over what extent this rank's part lies."""
        dim = len(self.shapes[name]) - 1 if self._columns else 0
        extent = self.shapes[name][dim] // self.world
        return dim, self.rank * extent, extent

    def advance(self) -> None:
        """Change every value in place, as an optimizer step does."""
        torch._foreach_add_(list(self.tensors.values()), 1.0)
        self.step += 1

    def spoil(self) -> None:
        """Fill all tensors with what no checkpoint holds."""
        torch._foreach_zero_(list(self.tensors.values()))
        torch._foreach_sub_(list(self.tensors.values()), 1.0)

    def wrong(self, step: int) -> list[str]:
        """Return the tensors that do not hold exactly what they held after ``step`` steps."""
        parts = self._parts_at_start()
        return [name for name, part in parts if not torch.equal(self.tensors[name].cpu(), part.add_(float(step)))]

    @cached_property
    def sharded(self) -> dict[str, Any]:
        """The tensors for DCP: DTensors that share their memory, plain ones on a single rank."""
        if self.world == 1:
            return dict(self.tensors)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (self.world,))
        return {
            name: DTensor.from_local(tensor, mesh, [Shard(self.cut(name)[0])], run_check=False)
            for name, tensor in self.tensors.items()
        }

    def _parts_at_start(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of each tensor before the first step; it is overwritten by the next one."""
        # Mapped, so that it goes back: memory that stays in the heap would serve contestants whose memory is measured.
        memory = mmap.mmap(-1, 4 * max(math.prod(shape) for shape in self.shapes.values()))
        scratch = torch.frombuffer(memory, dtype=torch.float32)
        for number, (name, shape) in enumerate(self.shapes.items()):
            whole, filled, start = scratch[: math.prod(shape)], 0, number * 7919
            while filled < len(whole):
                piece = self._block[(start + filled) % len(self._block) :][: len(whole) - filled]
                whole[filled : filled + len(piece)] = piece
                filled += len(piece)
            yield name, whole.view(shape).narrow(*self.cut(name))


@dataclass
class Pending:
    """A save under way.

    Args:
        done: returns when the contestant says that it is saved. fence: returns when tensors may change.
        fence_is_done: they may not change before it is saved.
    """

    done: Callable[[], object] = lambda: None
    fence: Callable[[], object] = lambda: None
    fence_is_done: bool = False


class Saver:
    """No checkpoint at all, which shows the noise of the measurement; the base of those that save."""

    def __init__(self, state: State, settings: dict[str, Any]) -> None:
        self.state = state

    def save(self, path: Path) -> Pending:
        """Save to ``path``, which does not exist."""
        return Pending()

    def load(self, path: Path) -> None:
        """Fill the state's tensors in place."""

    def close(self) -> None:
        """Let go of threads, processes and memory."""

    def _fill(self, loaded: Any) -> None:
        for name, tensor in self.state.tensors.items():
            if loaded[name] is not tensor:
                tensor.copy_(loaded[name])

    def _file(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        return path / f"rank-{self.state.rank}"


# ---------------------------------------------------------------------------------------------------------------- ours


class Synchronous(Saver):
    """``kenotron.checkpoint.save``, which returns when the checkpoint is published."""

    def __init__(self, state: State, settings: dict[str, Any], **extra: Any) -> None:
        super().__init__(state, settings)
        from kenotron.checkpoint import LocalTensor, Piece

        self._run, self._tensors = settings["run"], []
        for name, tensor in state.tensors.items():
            dim, start, _ = state.cut(name)
            zeros, local = (0,) * tensor.dim(), tuple(tensor.shape)
            piece = Piece(local=zeros, offset=tuple(start if i == dim else 0 for i in range(tensor.dim())), shape=local)
            self._tensors.append(
                LocalTensor(
                    name=name,
                    tensor=tensor,
                    global_shape=state.shapes[name],
                    pieces=(piece,),
                    owners=(state.rank,),
                    **extra,
                )
            )

    def save(self, path: Path) -> Pending:
        from kenotron.checkpoint import save

        save(path, self._tensors, {"step": self.state.step}, **self._who(path))
        return Pending()

    def load(self, path: Path) -> None:
        from kenotron.checkpoint import load_into

        load_into(path, self._tensors)

    def _who(self, path: Path) -> dict[str, Any]:
        return {"rank": self.state.rank, "world_size": self.state.world, "save_id": f"{self._run}-{path.name}"}


class Asynchronous(Synchronous):
    """The engine."""

    def __init__(self, state: State, settings: dict[str, Any]) -> None:
        try:
            from kenotron.checkpoint import Checkpointer, EngineSettings
        except ImportError as error:
            raise ImportError(f"the checkpoint engine is not built ({error}); build it with `make`") from error
        super().__init__(state, settings, lazy=True)
        self._checkpointer = Checkpointer(EngineSettings(pool_bytes=settings["pool_bytes"]))
        self._checkpointer.prepare(state.num_bytes)

    def save(self, path: Path) -> Pending:
        pending = self._checkpointer.save(path, self._tensors, {"step": self.state.step}, **self._who(path))

        def wait() -> None:  # from another thread, and without `Checkpointer.wait`, which begins with a fence
            while not pending.done():
                time.sleep(0.002)
            if pending.error is not None:
                raise pending.error

        return Pending(done=wait, fence=self._checkpointer.fence)

    def close(self) -> None:
        self._checkpointer.close()


# --------------------------------------------------------------------------------------------------------------- peers


class TorchSave(Saver):
    def save(self, path: Path) -> Pending:
        torch.save({"tensors": self.state.tensors, "step": self.state.step}, self._file(path))
        return Pending()

    def load(self, path: Path) -> None:
        self._fill(torch.load(self._file(path), mmap=True, weights_only=True)["tensors"])


class Safetensors(Saver):
    def save(self, path: Path) -> Pending:
        from safetensors.torch import save_file

        save_file(self.state.tensors, self._file(path), {"step": str(self.state.step)})
        return Pending()

    def load(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(self._file(path), "pt") as file:
            for name, tensor in self.state.tensors.items():
                tensor.copy_(file.get_tensor(name))


class Lightning(Saver):
    """``TorchCheckpointIO``, alone or behind ``AsyncCheckpointIO``."""

    def __init__(self, state: State, settings: dict[str, Any], *, background: bool) -> None:
        super().__init__(state, settings)
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._io = AsyncCheckpointIO(TorchCheckpointIO()) if background else TorchCheckpointIO()

    def save(self, path: Path) -> Pending:
        self._io.save_checkpoint({"tensors": self.state.tensors, "step": self.state.step}, str(self._file(path)))
        return Pending(done=self._io.teardown)  # the public way to wait; the next save sets it up again

    def load(self, path: Path) -> None:
        self._fill(self._io.load_checkpoint(str(self._file(path)))["tensors"])


class Dcp(Saver):
    """``torch.distributed.checkpoint.save``; DTensors on several ranks. Its files are fsynced unless one says otherwise."""

    def __init__(self, state: State, settings: dict[str, Any], *, threads: int = 1, hugging_face: bool = False) -> None:
        super().__init__(state, settings)
        self._threads, self._hugging_face, self._alone = threads, hugging_face, state.world == 1
        # The writer of safetensors takes tensors only.
        self._state = dict(state.sharded) if hugging_face else {"tensors": state.sharded, "step": state.step}

    def save(self, path: Path) -> Pending:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state, storage_writer=self._writer(path), no_dist=self._alone)
        return Pending()

    def load(self, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(path)) if self._hugging_face else dcp.FileSystemReader(path)
        dcp.load(self._state, storage_reader=reader, no_dist=self._alone)

    def _writer(self, path: Path) -> Any:
        import torch.distributed.checkpoint as dcp

        if not self._hugging_face:
            return dcp.FileSystemWriter(path, thread_count=self._threads)
        files = {name: 1 + i % self._threads for i, name in enumerate(self._state)}  # a thread writes whole files
        return dcp.HuggingFaceStorageWriter(
            str(path), fqn_to_index_mapping=files, thread_count=self._threads, save_distributed=not self._alone
        )


#: how tensors are staged -> `StagingOptions`: pinned memory, shared memory, async staging, non-blocking copy. Without any,
#: `async_save` makes a stager for each save, unless it is passed a writer of files, which then stages by itself.
STAGING: dict[str, tuple[bool, bool, bool, bool] | None] = {
    "default": None,
    "writer's": None,
    "reused": (False, False, False, False),
    "async": (False, False, True, False),
    "shared": (False, True, False, False),
    "shared async": (False, True, True, False),
    "pinned async": (True, False, True, True),
    "pinned shared async": (True, True, True, True),
}


class DcpAsync(Dcp):
    """``torch.distributed.checkpoint.async_save`` in a thread or in a process of its own."""

    def __init__(
        self, state: State, settings: dict[str, Any], *, staging: str, process: bool = False, plans: bool = False, **more: Any
    ) -> None:
        super().__init__(state, settings, **more)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        options = STAGING[staging]
        self._stager = DefaultStager(StagingOptions(*options)) if options else None
        self._by_path = staging == "default"
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self._process, self._plans = process, plans

    def save(self, path: Path) -> Pending:
        import torch.distributed.checkpoint as dcp

        response = dcp.async_save(
            self._state,
            **({"checkpoint_id": path} if self._by_path else {"storage_writer": self._writer(path)}),
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True) if self._plans else None,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
            no_dist=self._alone and not self._process,
        )
        if isinstance(response, dcp.state_dict_saver.AsyncSaveResponse):
            return Pending(done=response.upload_completion.result, fence=response.staging_completion.result)
        return Pending(done=response.result)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class TorchSnapshot(Saver):
    def __init__(self, state: State, settings: dict[str, Any], *, background: bool) -> None:
        super().__init__(state, settings)
        from torchsnapshot import Snapshot, StateDict

        self._snapshot, self._background = Snapshot, background
        self._app = {"state": StateDict(**state.tensors)}

    def save(self, path: Path) -> Pending:
        if self._background:
            return Pending(done=self._snapshot.async_take(str(path), self._app).wait)
        self._snapshot.take(str(path), self._app)
        return Pending()

    def load(self, path: Path) -> None:
        self._snapshot(str(path)).restore(self._app)
        self._fill(self._app["state"])


class NvrxTorch(TorchSave):
    """NVIDIA's ``torch.save`` in a process of its own.

    Release 0.4.1 moves CPU tensors into shared memory and writes from there: what changes before it is done is stored
    changed. Its fence is therefore its end, although it promises more.
    """

    def __init__(self, state: State, settings: dict[str, Any]) -> None:
        super().__init__(state, settings)
        from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import TorchAsyncCheckpoint

        if state.device == "cpu":
            torch.cuda.synchronize = lambda *args: None  # it synchronises with a GPU even where there is none
        self._io = TorchAsyncCheckpoint(persistent_queue=True)

    def save(self, path: Path) -> Pending:
        self._io.async_save({"tensors": self.state.tensors, "step": self.state.step}, str(self._file(path)))
        return Pending(done=partial(_drain, self._io._async_calls_queue), fence_is_done=True)


class NvrxDcp(Dcp):
    """NVIDIA's writer of DCP's format, the one that Megatron uses; see ``NvrxTorch`` about its fence."""

    def __init__(self, state: State, settings: dict[str, Any], **more: Any) -> None:
        super().__init__(state, settings, **more)
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue

        self._queue = AsyncCallsQueue(persistent=True)

    def save(self, path: Path) -> Pending:
        from nvidia_resiliency_ext.checkpointing.async_ckpt import core, state_dict_saver
        from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync

        path.mkdir(exist_ok=True)
        writer = FileSystemWriterAsync(path, thread_count=self._threads)
        planned = state_dict_saver.save_state_dict_async_plan(self._state, writer)
        write, preload, arguments = writer.get_save_function_and_args()
        if self.state.device == "cpu":  # the same without synchronising with a GPU
            preload = partial(FileSystemWriterAsync.preload_tensors, writer.write_buckets, False)
        finish = partial(state_dict_saver.save_state_dict_async_finalize, *planned)
        self._queue.schedule_async_request(core.AsyncRequest(write, arguments, [finish], preload_fn=preload))
        return Pending(done=partial(_drain, self._queue), fence_is_done=True)


def _drain(queue: Any) -> None:
    """Finish all calls of NVIDIA's queue; its own blocking wait looks only ten times a second."""
    while queue.get_num_unfinalized_calls():
        queue.maybe_finalize_async_calls(blocking=False, no_dist=True)
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------- list


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Args:
        kind: "ours", "async", "sync", or "" for a row that is only shown.
        make: makes its saver from a state and settings (``run``: a name that no other run has; ``pool_bytes``).
        modules: imported before memory is looked at for the first time.
        alone: each rank writes and finishes by itself; with the others rank 0 is done when all are.
        group: it needs a process group even on one rank. durable: it fsyncs and publishes all by itself.
        pip: what installs it. note: printed below the tables.
    """

    name: str
    kind: str
    make: Callable[[State, dict[str, Any]], Saver]
    modules: tuple[str, ...] = ("torch.distributed.checkpoint", "torch.distributed.tensor")
    alone: bool = False
    group: bool = False
    durable: bool = False
    quick: bool = False
    pip: str = ""
    note: str = ""


def _dcp_contestants() -> Iterable[Contestant]:
    for threads in (1, 2):
        yield Contestant(f"dcp.save, t{threads}", "sync", partial(Dcp, threads=threads), quick=threads == 2)
    yield Contestant("dcp.save HuggingFace, t2", "sync", partial(Dcp, threads=2, hugging_face=True))
    variants: list[tuple[str, bool, str, dict[str, Any]]] = [
        ("thread, default stager, t1", False, "default", {}),
        ("thread, writer's stager, t2", False, "writer's", {"threads": 2}),
        ("thread, reused stager, t1", False, "reused", {}),
        ("thread, reused stager, t2", False, "reused", {"threads": 2}),
        ("thread, async staging, t1", False, "async", {}),
        ("thread, async staging, t2", False, "async", {"threads": 2}),
        ("thread, async staging, cached plans, t2", False, "async", {"threads": 2, "plans": True}),
        ("thread, async staging, HuggingFace, t2", False, "async", {"threads": 2, "hugging_face": True}),
        ("process, default stager, t1", True, "default", {}),
        ("process, shm, t1", True, "shared", {}),
        ("process, shm, t2", True, "shared", {"threads": 2}),
        ("process, shm, async staging, t1", True, "shared async", {}),
        ("process, shm, async staging, t2", True, "shared async", {"threads": 2}),
        ("process, shm, async, cached plans, t2", True, "shared async", {"threads": 2, "plans": True}),
    ]
    for label, process, staging, more in variants:
        make = partial(DcpAsync, process=process, staging=staging, **more)
        quick = label in ("thread, async staging, t2", "process, shm, async staging, t2")
        yield Contestant(f"dcp.async {label}", "async", make, group=process, quick=quick)


_LIGHTNING = ("lightning.pytorch.plugins.io",)
_OURS = ("kenotron.checkpoint",)
_SNAPSHOT: dict[str, Any] = {"modules": ("torchsnapshot",), "pip": 'torchsnapshot "importlib-metadata<9"'}
_NVRX: dict[str, Any] = {
    "modules": ("nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",),
    "group": True,
    "pip": "nvidia-resiliency-ext",
    "note": "stores what changes before it is done, in spite of its promise; here its fence is therefore its end",
}

CONTESTANTS = [
    Contestant("kenotron", "ours", Asynchronous, _OURS, durable=True, quick=True),
    Contestant("kenotron, synchronous save", "", Synchronous, _OURS, durable=True),
    Contestant("no checkpoint", "", Saver, ()),
    Contestant("torch.save", "sync", TorchSave, (), alone=True),
    Contestant("safetensors.save_file", "sync", Safetensors, ("safetensors.torch",), alone=True, quick=True),
    Contestant("Lightning TorchCheckpointIO", "sync", partial(Lightning, background=False), _LIGHTNING, alone=True),
    Contestant("Lightning AsyncCheckpointIO", "async", partial(Lightning, background=True), _LIGHTNING, alone=True),
    *_dcp_contestants(),
    Contestant("torchsnapshot.take", "sync", partial(TorchSnapshot, background=False), **_SNAPSHOT),
    Contestant("torchsnapshot.async_take", "async", partial(TorchSnapshot, background=True), **_SNAPSHOT),
    Contestant("NVRx TorchAsyncCheckpoint", "async", NvrxTorch, alone=True, **_NVRX),
    Contestant("NVRx FileSystemWriterAsync, t2", "async", partial(NvrxDcp, threads=2), **_NVRX),
]

#: with tensors on a GPU
GPU_CONTESTANTS = [
    CONTESTANTS[0],
    *(
        Contestant(
            f"dcp.async {'process' if process else 'thread'}, {staging} staging, t2",
            "async",
            partial(DcpAsync, process=process, staging=staging, threads=2),
            group=process,
        )
        for process, staging in ((False, "pinned async"), (True, "pinned shared async"))
    ),
]
