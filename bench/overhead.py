"""Overhead: what a step costs beyond the same step without Kénotron.

Two contestants take turns in the same processes, one step each (A, B, A, B, ...), and each pair of steps gives one ratio of
times; a row shows their median and quartiles. A step is everything from the end of one batch to the end of the next: loading,
hooks, forward, backward, update, logging. In a row of several processes all of them begin each step together, and the slowest
counts. The column "cpu" is the ratio of processor time instead, which waiting does not enter: on a busy machine read that too.

    python bench/overhead.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratios import spread, verdict

from kenotron.testing import RankPool, RanksFailedError

VOCABULARY, MICROBATCHES, STAGES = 512, 8, 2
WARM_UP = 4

#: sizes of the models: about 50 to 100 ms a step of a row on one core of 2020, of which a fixed cost of 0.1 ms is little
CPU_MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
PIPELINE_MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
GPU_MODEL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}


@dataclass(frozen=True)
class Row:
    """One comparison: ``worker(budget_s)`` runs on ``ranks`` processes and returns the times of its steps.

    Args:
        bar: the most that the ratio may be. share: of the second contestant's time that the first is held against.
        within_error: two standard errors above the bar count as the bar.
    """

    name: str
    ranks: int
    worker: Callable[[float], Steps | None]
    bar: float
    share: float = 1.0
    within_error: bool = False


@dataclass
class Steps:
    """Seconds of each step of contestants A and B in one process."""

    wall: tuple[list[float], list[float]]
    cpu: tuple[list[float], list[float]]
    note: str = ""
    told: str = ""


# --------------------------------------------------------------------------------------------------------------- turns


class Contestant:
    """A thread that works one turn at a time: ``run(turn)`` calls ``turn()`` after each step, until that returns False."""

    def __init__(self, run: Callable[[Callable[[], bool]], None], settle: Callable[[], None]) -> None:
        self._run, self._settle = run, settle
        self._go, self._went = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._last = False
        self._start = (0.0, 0.0)
        self.took = (0.0, 0.0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def step(self, last: bool = False) -> tuple[float, float]:
        """Let it take one turn (``last``: and end). Returns the seconds on the clock and on the processor."""
        self._last = last
        self._go.release()
        self._went.acquire()
        if self._error is not None:
            raise self._error
        return self.took

    def _work(self) -> None:
        import torch

        torch.set_num_threads(1)  # each thread has a number of its own
        self._go.acquire()
        try:
            self._run(self._turn)
        except BaseException as error:
            self._error = error
        self._went.release()

    def _turn(self) -> bool:
        if self._last:
            return False
        self._settle()
        end = time.perf_counter(), time.process_time()
        self.took = end[0] - self._start[0], end[1] - self._start[1]
        self._went.release()
        self._go.acquire()
        self._start = time.perf_counter(), time.process_time()
        return not self._last


def take_turns(
    runs: Sequence[Callable[[Callable[[], bool]], None]], budget_s: float, settle: Callable[[], None] = lambda: None
) -> Steps:
    """Let two contestants step in turns on all ranks, for about ``budget_s`` seconds with their set-up."""
    import torch
    import torch.distributed as dist

    start = time.monotonic()
    contestants = [Contestant(run, settle) for run in runs]
    for _ in range(1 + WARM_UP):  # the first turn of each is its set-up
        for contestant in contestants:
            contestant.step()
    steps = Steps(([], []), ([], []))
    goes_on = torch.ones(())
    while goes_on:
        for i, contestant in enumerate(contestants):
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = contestant.step()
            steps.wall[i].append(wall)
            steps.cpu[i].append(cpu)
        if time.monotonic() - start > budget_s and len(steps.wall[0]) >= 5:
            goes_on.zero_()
        if dist.is_initialized():  # rank 0 decides
            dist.broadcast(goes_on, 0)
    for contestant in contestants:
        contestant.step(last=True)
    return steps


# --------------------------------------------------------------------------------------------------------- contestants


def build(sizes: dict[str, int]) -> Any:
    """Return a Llama with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, max_position_embeddings=4096, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def loader(batch: int, length: int, pinned: bool = False) -> Any:
    """Return batches of random tokens without end."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    ids = torch.randint(0, VOCABULARY, (256, length), generator=torch.Generator().manual_seed(7))

    class Tokens(Dataset[Any]):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> Any:
            return ids[index % 256]

    return DataLoader(Tokens(), batch_size=batch, pin_memory=pinned)


def trainer_run(
    strategy: Any, sizes: dict[str, int], batch: int, length: int, *, sharded_by_hand: bool = False, reshards: bool = True,
    every: int = 1, callbacks: Sequence[Any] = (), count: Callable[[Any], None] | None = None, **settings: Any,
) -> Callable[[Callable[[], bool]], None]:  # fmt: skip
    """Return a contestant: ``Trainer.fit`` with ``strategy`` on a LightningModule as anyone writes it.

    Args:
        sharded_by_hand: the module calls ``fully_shard`` on its blocks and its model; ``reshards``: after the forward pass.
        every: steps per turn.
        count: called with the trainer at the end.
    """
    import lightning as L
    import torch

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(sizes)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class ShardedModel(Model):
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
            fully_shard(self.model, mesh=mesh, reshard_after_forward=reshards)

    class Turns(L.Callback):
        def __init__(self, turn: Callable[[], bool]) -> None:
            self._turn = turn

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % every == 0 and not self._turn():
                trainer.should_stop = True
                if count is not None:
                    count(trainer)

    def run(turn: Callable[[], bool]) -> None:
        L.seed_everything(1, verbose=False)
        trainer = L.Trainer(
            **{
                "accelerator": "cpu",
                "devices": int(os.environ["WORLD_SIZE"]),
                "strategy": strategy() if callable(strategy) else strategy,
                "max_epochs": 1,
                "callbacks": [*callbacks, Turns(turn)],
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **settings,
            }
        )
        module = ShardedModel() if sharded_by_hand else Model()
        trainer.fit(module, loader(batch, length, pinned=settings.get("accelerator") == "cuda"))

    return run


def bare_run(
    sizes: dict[str, int],
    batch: int,
    length: int,
    *,
    microbatches: int = 1,
    device: str = "cpu",
    dtype: Any = None,
    every: int = 1,
) -> Callable[[Callable[[], bool]], None]:
    """Return a contestant: a loop in plain PyTorch."""
    import torch

    def run(turn: Callable[[], bool]) -> None:
        torch.manual_seed(1)
        model = build(sizes).to(device=device, dtype=dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for index, ids in enumerate(loader(batch, length, pinned=device == "cuda")):
            ids = ids.to(device, non_blocking=True)
            optimizer.zero_grad()
            for part in ids.chunk(microbatches):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
                (loss / microbatches).backward()
            optimizer.step()
            if (index + 1) % every == 0 and not turn():
                return

    return run


# ---------------------------------------------------------------------------------------------------------------- rows


def ddp(budget_s: float) -> Steps:
    """Replicas: Kénotron's against Lightning's."""
    shape = CPU_MODEL, 4, 64
    return take_turns([trainer_run("kenotron_ddp", *shape), trainer_run("ddp", *shape)], budget_s)


def zero_against_ddp(stage: int, budget_s: float) -> Steps:
    """ZeRO 1 or 2 against Lightning's DDP; and what it sends and keeps, counted."""
    sent = SentBytes()
    notes: list[str] = []

    def count(trainer: Any) -> None:
        params = list(trainer.lightning_module.parameters())
        whole = sum(param.nbytes for param in params)
        state = trainer.optimizers[0].state.values()
        moments = sum(value.nbytes for entry in state for value in entry.values() if value.ndim)
        notes.append(
            f"sent {sent.total / (trainer.global_step - 1) / whole:.3f}, moments {moments / whole:.3f} of the parameters"
        )

    shape = CPU_MODEL, 4, 64
    with sent:
        ours = trainer_run(f"kenotron_zero{stage}", *shape, count=count)
        steps = take_turns([sent.during(ours), trainer_run("ddp", *shape)], budget_s)
    steps.told = notes[0]
    return steps


def zero_against_fsdp(stage: int, budget_s: float) -> Steps:
    """ZeRO 1 or 2 against FSDP2 that keeps gathered parameters for the backward pass."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def by_hand() -> Any:
        return ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)

    shape = CPU_MODEL, 4, 64
    other = trainer_run(by_hand, *shape, sharded_by_hand=True, reshards=False)
    return take_turns([trainer_run(f"kenotron_zero{stage}", *shape), other], budget_s)


class SentBytes:
    """Counts what one contestant sends in collectives of more than a kilobyte, by the bytes that a ring sends of each."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = False
        self._before: list[tuple[str, Any]] = []

    def during(self, run: Callable[[Callable[[], bool]], None]) -> Callable[[Callable[[], bool]], None]:
        """Return a contestant whose collectives are counted, in its turns."""

        def counted(turn: Callable[[], bool]) -> None:
            def counted_turn() -> bool:
                self._counts = False
                goes_on = turn()
                self._counts = True  # from the second step on: set-up sends weights
                return goes_on

            run(counted_turn)
            self._counts = False

        return counted

    def __enter__(self) -> SentBytes:
        import torch.distributed as dist

        ranks = int(os.environ["WORLD_SIZE"])
        # What a rank sends of a tensor; of broadcasts on the average of the ranks.
        for name, factor in (("all_reduce", 2 * (ranks - 1) / ranks), ("isend", 1.0), ("broadcast", (ranks - 1) / ranks)):
            function = getattr(dist, name)
            self._before.append((name, function))

            def counting(tensor: Any, *args: Any, _function: Any = function, _factor: float = factor, **kwargs: Any) -> Any:
                if self._counts and tensor.nbytes > 1024:
                    self.total += _factor * tensor.nbytes
                return _function(tensor, *args, **kwargs)

            setattr(dist, name, counting)
        return self

    def __exit__(self, *_: Any) -> None:
        import torch.distributed as dist

        for name, function in self._before:
            setattr(dist, name, function)


def fsdp(budget_s: float) -> Steps:
    """ZeRO 3: Kénotron's of an unmodified module against ``fully_shard`` written by hand."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def by_hand() -> Any:
        return ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)

    shape = CPU_MODEL, 4, 64
    return take_turns([trainer_run("kenotron_zero3", *shape), trainer_run(by_hand, *shape, sharded_by_hand=True)], budget_s)


def one_process(budget_s: float) -> Steps:
    """One process against a bare loop."""
    shape = CPU_MODEL, 4, 64
    return take_turns([trainer_run("kenotron", *shape), bare_run(*shape)], budget_s)


def pipeline(budget_s: float) -> Steps:
    """Two stages against the bare loop over the same microbatches; both processes run that at once, as busy as the stages."""
    import kenotron

    def strategy() -> Any:
        return kenotron.KenotronStrategy(pp=STAGES, microbatches=MICROBATCHES)

    shape = PIPELINE_MODEL, MICROBATCHES, 64
    return take_turns([trainer_run(strategy, *shape), bare_run(*shape, microbatches=MICROBATCHES)], budget_s)


def gpu(budget_s: float) -> Steps | None:
    """One GPU in bf16 against the bare loop, ten steps a turn; then steps in which a host synchronisation raises."""
    import lightning as L
    import torch

    if not torch.cuda.is_available():
        return None
    shape = GPU_MODEL, 8, 1024
    settings: dict[str, Any] = {"accelerator": "cuda", "precision": "bf16-true"}
    steps = take_turns(
        [
            trainer_run("kenotron", *shape, every=10, **settings),
            bare_run(*shape, device="cuda", dtype=torch.bfloat16, every=10),
        ],
        budget_s,
        settle=torch.cuda.synchronize,
    )

    class NoSynchronisation(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 25:
                torch.cuda.set_sync_debug_mode("default")

    run = trainer_run("kenotron", *shape, callbacks=[NoSynchronisation()], max_steps=30, log_every_n_steps=1000, **settings)
    try:
        run(lambda: True)
    except RuntimeError as error:
        steps.note = f"a step synchronises with the GPU: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return steps


ROWS = [
    Row("kenotron_ddp / Lightning DDP, dp 2", 2, ddp, 1.03),
    *(
        Row(f"kenotron, zero {stage} / Lightning DDP, dp {ranks}", ranks, functools.partial(zero_against_ddp, stage), 1.00,
            within_error=True)
        for stage in (1, 2) for ranks in (2, 4)
    ),
    *(
        Row(f"kenotron, zero {stage} / FSDP2, dp 2", 2, functools.partial(zero_against_fsdp, stage), 0.90)
        for stage in (1, 2)
    ),
    Row("kenotron_zero3 / fully_shard by hand, dp 2", 2, fsdp, 1.03),
    Row("kenotron / bare loop, one process", 1, one_process, 1.03),
    Row(f"pp {STAGES}, {MICROBATCHES} microbatches / bubble formula", 2, pipeline, 1.15,
        share=(MICROBATCHES + STAGES - 1) / MICROBATCHES / STAGES),
    Row("kenotron / bare loop, one GPU, bf16", 1, gpu, 1 / 0.98),
]  # fmt: skip


def summarize(row: Row, ranks: list[Steps]) -> dict[str, Any]:
    """Return the figures of one row from what its ranks measured."""
    count = len(ranks[0].wall[0])
    a = [max(rank.wall[0][i] for rank in ranks) for i in range(count)]
    # The pipeline's contender has no ranks that wait for each other: its time is their mean.
    combine = statistics.fmean if row.worker is pipeline else max
    b = [combine([rank.wall[1][i] for rank in ranks]) for i in range(count)]
    ratios = [x / (y * row.share) for x, y in zip(a, b, strict=True)]
    figures = spread(ratios)
    # Processor time of all ranks. In a row of the pipeline each of them does the contender's whole step by itself.
    work = len(ranks) if row.worker is pipeline else 1
    used = [[sum(rank.cpu[side][i] for rank in ranks) for i in range(count)] for side in (0, 1)]
    cpu = [work * x / y for x, y in zip(*used, strict=True)]
    notes = [rank.note for rank in ranks if rank.note]
    return {
        "name": row.name, "ranks": row.ranks, "bar": row.bar, **figures, "cpu": statistics.median(cpu),
        "cpu_ms": 1e3 * statistics.median(used[0]), "cpu_ms_other": 1e3 * statistics.median(used[1]),
        "ms": 1e3 * statistics.median(a), "ms_other": 1e3 * statistics.median(b), "notes": notes,
        "told": ranks[0].told,
        "ok": figures["ratio"] <= row.bar + (2 * figures["error"] if row.within_error else 0) and not notes,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than three minutes in all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="rows whose name matches this pattern")
    options = parser.parse_args()
    budget_s = 35.0 if options.quick else 120.0
    found: list[dict[str, Any]] = []
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; step times in ms; quartiles of the ratio in brackets")
    print(f"{'row':<46} {'ours':>7} {'other':>7} {'ratio':>7} {'spread':>15} {'± of it':>8} {'cpu':>6} {'pairs':>6} {'bar':>6}")
    with RankPool(4) as pool:
        for row in ROWS:
            if not fnmatch.fnmatch(row.name, options.only):
                continue
            try:
                ranks = pool.run(row.worker, row.ranks, budget_s, timeout_s=budget_s + 180)
            except RanksFailedError as error:
                print(f"{row.name:<46} failed\n{error}", flush=True)
                found.append({"name": row.name, "ok": False, "error": str(error)})
                continue
            if ranks[0] is None:
                print(f"{row.name:<46} no GPU here", flush=True)
                found.append({"name": row.name, "ok": True, "notes": ["no GPU here"]})
                continue
            figures = summarize(row, ranks)
            found.append(figures)
            print(
                f"{row.name:<46} {figures['ms']:7.1f} {figures['ms_other']:7.1f} {figures['ratio']:7.3f} "
                f"[{figures['low']:6.3f},{figures['high']:6.3f}] {figures['error']:8.3f} {figures['cpu']:6.3f} "
                f"{figures['repetitions']:6} {row.bar:6.2f}   {verdict(figures)}",
                *figures["notes"],
                ranks[0].told,
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 1 if any(not row["ok"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
