"""The order in which parallelism is applied to a module. It is written here, once.

cut (PP) → experts (EP) → tensor (TP/SP) → context (CP) → float8 → recompute → compile → shard (DP) → materialise → load

Of what is not sharded gradients are averaged, once it is made.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from kenotron.layout import ParallelLayout
from kenotron.parallel import context, expert, init, overlap, pipeline, sequence, stages, tensor
from kenotron.parallel._torch import flatten
from kenotron.parallel.context import ContextKind, ContextParallel
from kenotron.parallel.cut import AbsentParameter, Cut
from kenotron.parallel.data import FullySharded, SharedBuffers, layers_to_shard
from kenotron.parallel.expert import ExpertParallel
from kenotron.parallel.expert_load import ExpertLoads
from kenotron.parallel.float8 import Float8
from kenotron.parallel.grads import GradientNorm, OwedSums, nowhere
from kenotron.parallel.plain import enclosing
from kenotron.parallel.plan import ParallelPlan, find_plan, pipeline_hints
from kenotron.parallel.random import OwnStream
from kenotron.parallel.recompute import Recompute, compile_blocks
from kenotron.parallel.reducer import Divider, GradientReducer
from kenotron.parallel.shards import Shards, attributes, canonical
from kenotron.parallel.shares import ShareCheck
from kenotron.parallel.vocab_weight import stepping


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be applied.

    Args:
        layout: resolved. plan: the user's, if any. blocks: the user's name of the block list, if any.
        schedule, virtual_stages, sequence_parallel: as in ``KenotronStrategy``.
        capacity_factor: as in ``ExpertParallel``. context: as ``ContextParallel.kind``.
        float8: which products run in it, if any. recompute: what blocks keep for the backward pass. compile: whether they are
            compiled. async_tp: transfers of sequence parallelism overlap with products, in compiled blocks.
        gather_bf16: as in ``FullySharded``. manual_optimization: updates happen inside the step.
        device: of this rank. seed: for weights that are made here.
    """

    layout: ParallelLayout
    device: torch.device
    seed: int = 0
    plan: ParallelPlan | None = None
    blocks: str | None = None
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    capacity_factor: float | None = None
    context: ContextKind = "ring"
    float8: Float8 | None = None
    recompute: Recompute = field(default_factory=Recompute)
    compile: bool = False
    async_tp: bool = False
    gather_bf16: bool = False
    manual_optimization: bool = False


@dataclass(kw_only=True)
class Parallelized:
    """A module after everything was applied, and what a step needs to know of it.

    Args:
        root: the module. shards: what this rank holds of each parameter.
        cut: the pipeline cut, if ``pp > 1``. experts: the ep axis, if ``ep > 1``. loads: of experts, if there are any.
        sharded: FSDP2's part (ZeRO 3); reducers: those of replicas, whose parameters are whole.
        num_parameters: of the whole module. last_pp_rank: the pipeline rank of the last stage.
        is_plain: no layer or parameter was replaced or wrapped: all can be applied anew.
    """

    root: nn.Module
    layout: ParallelLayout
    shards: Shards
    norm: GradientNorm
    aliases: dict[str, str]
    cut: Cut | None = None
    experts: ExpertParallel | None = None
    loads: ExpertLoads | None = None
    sharded: FullySharded | None = None
    reducers: list[GradientReducer] = field(default_factory=list)
    owed: OwedSums | None = None
    shares: ShareCheck | None = None
    buffers: SharedBuffers | None = None
    num_parameters: int = 0
    last_pp_rank: int = 0
    is_plain: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether every rank has all of the module, and runs it by itself."""
        layout = self.layout
        return self.sharded is None and layout.tp == layout.pp == layout.cp == layout.ep == 1

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by canonical name (that of the whole module), without those of other stages."""
        found: dict[str, nn.Parameter] = {}
        for name, param in self.root.named_parameters(remove_duplicate=False):
            name = canonical(name)
            if name not in self.shards.absent:
                found.setdefault(self.aliases.get(name, name), param)
        return found

    def names(self) -> dict[int, str]:
        """Return the canonical name of each parameter object, with the empty ones that stand for those of other stages."""
        named = ((canonical(name), param) for name, param in self.root.named_parameters(remove_duplicate=False))
        return {id(param): self.aliases.get(name, name) for name, param in named}

    def sizes_alike(self) -> dict[int, int]:
        """Return about how much of each parameter a rank has (by ``id``): the same on all that update it together."""
        ranks = self.layout.tp * (self.layout.dp_shard * self.layout.cp if self.layout.zero_stage else 1)
        params = self.named_parameters().items()
        return {id(param): math.prod(self.shards.of(name, param).global_shape) // ranks for name, param in params}

    def enclose(self, call: Callable[[], Any]) -> Any:
        """Run ``call()``, a step, with the root's own parameters at hand."""
        is_seen_through = self.shares is None or not self.shares.needs_graph
        stance: Any = contextlib.nullcontext() if is_seen_through else torch.compiler.set_stance("force_eager")
        with stepping(), stance:
            return call() if self.sharded is None else self.sharded.enclose(call)

    def before_backward(self, *, last_microbatch: bool, sync: bool, stage: int = 0) -> None:
        """Prepare the next backward pass.

        Args:
            last_microbatch: it is the last one of this step on this rank.
            sync: the step ends with an update (it is not one of several that accumulate). stage: of the pipeline.
        """
        if self.sharded is not None:
            self.sharded.before_backward(last_microbatch=last_microbatch)
        for reducer in self.reducers:
            reducer.arm(stage, last=last_microbatch and sync)

    def divide_gradients(self, divider: Divider | None, *, each_pass: bool = False) -> None:
        """From now on each rank keeps its part of gradients only, see ``GradientReducer.divide``."""
        for reducer in self.reducers:
            reducer.divide(divider, each_pass=each_pass)
        self.norm.placed = divider.placed if divider is not None else nowhere
        if self.owed is not None:
            self.owed.placed = self.norm.placed

    def end_backward(self) -> None:
        """After the backward passes of a step without an update: what was sent has arrived."""
        for reducer in self.reducers:
            reducer.close()

    def look_for_shares(self, outputs: Iterable[Any]) -> None:
        """Before a backward pass from ``outputs``: find parameters whose gradients will be owed a sum over tp."""
        if self.shares is not None and not self.shares.is_done:
            self.shares.look(outputs, self.named_parameters(), self.root)

    @contextlib.contextmanager
    def kept_apart(self) -> Iterator[None]:
        """Keep gradients of earlier backward passes out of the sums that this one owes.

        For manual optimization, where every backward pass ends with `finish_gradients` and may add to what is there.
        """
        params = self.owed.members(self.named_parameters()) if self.owed else []
        before = [param.grad for param in params]
        for param in params:
            param.grad = None
        yield
        for param, grad in zip(params, before, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else param.grad + grad

    def finish_gradients(self) -> None:
        """After the last backward pass before an update: make every gradient that of the whole global batch."""
        for reducer in self.reducers:
            reducer.finish()
        if self.sharded is not None:
            self.sharded.gathered.finish()
        if self.owed:
            self.owed.pay(self.named_parameters())


def untouched(root: nn.Module, layout: ParallelLayout) -> Parallelized:
    """Return a module to which nothing has been applied: its parameters are whole."""
    shards = Shards(tp=layout.tp)
    return Parallelized(
        root=root,
        layout=layout,
        shards=shards,
        norm=GradientNorm(layout, shards),
        aliases=_aliases(root),
        num_parameters=sum(p.numel() for p in root.parameters()),
    )


def parallelize(
    root: nn.Module, mesh: DeviceMesh | None, request: Request, expert_mesh: DeviceMesh | None = None
) -> Parallelized:
    """Apply ``request`` to ``root`` in place.

    Args:
        mesh: of the layout; ``None`` for one process, where nothing is applied but the making of weights.
        expert_mesh: of the layout, if ``ep > 1``.

    Raises:
        ValueError: the module can't be cut as asked.
    """
    layout = request.layout
    places = init.places_of(root)
    done = untouched(root, layout)
    shards, aliases = done.shards, done.aliases
    done.is_plain = layout.keeps_whole_parameters and not (request.recompute or request.compile or request.float8)
    plan = find_plan(root, request.plan)
    experts = expert.find_experts(root)
    if expert_mesh is not None:
        expert.check_experts(root, experts, layout.ep)
    calls = {canonical(name): expert.call_of(module) for name, module in experts.items()}
    blocks = _blocks(root, plan, request)
    if layout.cp > 1:
        context.look(root, layout.cp, request.context)
    if mesh is not None:
        init.broadcast_weights(root, request.device)
        init.check_alike(places)
        pp_groups = _cut(done, mesh, plan, blocks, request)
        _expert_parallel(done, expert_mesh, list(experts), request)
        kv_groups = _tensor_parallel(done, mesh, plan, blocks, request)
        _context_parallel(done, mesh, request)
    _float8(done, blocks, request)
    _recompute_and_compile(done, mesh, blocks, request)
    if mesh is not None:
        _data_parallel(done, mesh, expert_mesh, blocks, request)
        done.owed = OwedSums(shards, mesh["tp"].get_group(), kv_groups, pp_groups)
    init.materialize(root, shards, aliases, places, request.seed, request.device)
    _move(root, request.device)
    if mesh is not None:
        _average_gradients(done, mesh, expert_mesh)
    if experts:
        done.loads = ExpertLoads(root, calls, request.device)
    if done.experts is not None:
        done.experts.loads = done.loads
    if mesh is not None and layout.dp_size * layout.cp > 1:
        done.buffers = SharedBuffers(root, data_group(mesh))
    return done


def _blocks(root: nn.Module, plan: ParallelPlan | None, request: Request) -> str | None:
    """Return the name of the block list where an axis needs it (and for ZeRO where it is known)."""
    named = request.blocks or (plan.blocks if plan else None)
    hints = pipeline_hints(root)
    if request.layout.pp > 1 or request.sequence_parallel or request.recompute or request.compile or request.float8:
        return stages.find_blocks(root, named, hints)
    return stages.find_blocks(root, named, hints) if named or hints else None


def _cut(
    done: Parallelized, mesh: DeviceMesh, plan: ParallelPlan | None, blocks: str | None, request: Request
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Pipeline: this rank keeps the parameters of its stages. Returns the groups that share a weight."""
    layout, root = request.layout, done.root
    if layout.pp == 1:
        return {}
    assert blocks is not None
    units, num_stages = stages.find_units(root, blocks), layout.pp * request.virtual_stages
    if plan is not None and plan.stages is not None:
        if len(plan.stages) != num_stages:
            raise ValueError(f"stages has {len(plan.stages)} entries for {num_stages} stages (pp × virtual_stages).")
        names, owner = stages.stages_from_user(units, plan.stages)
    else:
        names, owner = units.names, stages.balance(units, num_stages)
    pp_rank = mesh["pp"].get_local_rank()
    local = pipeline.local_stages(request.schedule, layout.pp, request.virtual_stages, pp_rank)
    done.cut = Cut(root, names, owner, blocks, local)
    ranks = {stage: pipeline.rank_of_stage(request.schedule, layout.pp, stage) for stage in range(num_stages)}
    done.last_pp_rank = ranks[num_stages - 1]
    _find_holders(done, ranks)
    _drop_other_stages(done)
    return _groups_of_holders(done.shards, mesh)


def _find_holders(done: Parallelized, rank_of_stage: dict[int, int]) -> None:
    """Note which pipeline ranks use a weight that lies on several stages, or on none in particular."""
    assert done.cut is not None
    users: dict[str, set[int]] = {}
    for name, _ in done.root.named_parameters(remove_duplicate=False):
        name = canonical(name)
        stage = done.cut.stage_of(name)
        ranks = set(rank_of_stage.values()) if stage is None else {rank_of_stage[stage]}
        users.setdefault(done.aliases.get(name, name), set()).update(ranks)
    done.shards.holders = {name: tuple(sorted(ranks)) for name, ranks in users.items() if len(ranks) > 1}


def _drop_other_stages(done: Parallelized) -> None:
    assert done.cut is not None
    places = [
        (canonical(f"{prefix}.{key}" if prefix else key), module, key, param, tuple(param.shape))
        for prefix, module in done.root.named_modules() for key, param in module._parameters.items() if param is not None
    ]  # fmt: skip
    here = {id(param) for name, _, _, param, _ in places if not done.cut.is_elsewhere(name)}
    for name, module, key, param, shape in places:
        if done.cut.is_elsewhere(name):
            module._parameters[key] = AbsentParameter.of(param, is_used_here=id(param) in here)
            done.shards.absent[name] = shape


def _groups_of_holders(shards: Shards, mesh: DeviceMesh) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Make a group for every set of pipeline ranks that share a weight; all ranks make all groups, in one order."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    columns = mesh.mesh.reshape(mesh["pp"].size(), -1)
    mine = mesh.get_rank()
    for holders in sorted(set(shards.holders.values())):
        for column in range(columns.shape[1]):
            ranks = [int(columns[pp, column]) for pp in holders]
            group = dist.new_group(ranks)
            if mine in ranks:
                groups[holders] = group
    return groups


def _expert_parallel(done: Parallelized, mesh: DeviceMesh | None, names: Sequence[str], request: Request) -> None:
    """Experts: this rank keeps its part of each stack."""
    if mesh is None:
        return
    done.experts = expert.ExpertParallel(
        group=mesh["ep"].get_group(),
        rank=mesh["ep"].get_local_rank(),
        size=request.layout.ep,
        shards=done.shards,
        capacity_factor=request.capacity_factor,
    )
    done.experts.apply(done.root, [name for name in names if not (done.cut and done.cut.is_elsewhere(canonical(name)))])
    done.shards.use_canonical_names(done.aliases)


def _tensor_parallel(
    done: Parallelized, mesh: DeviceMesh, plan: ParallelPlan | None, blocks: str | None, request: Request
) -> dict[int, dist.ProcessGroup]:
    """Tensor and sequence parallelism. Returns the groups of tp ranks that share this rank's KV heads, by their size."""
    tp_size, root = request.layout.tp, done.root
    if tp_size == 1:
        return {}
    if plan is None or not plan.tensor:
        raise ValueError(
            (plan.unreadable if plan else "")
            or f"tp={tp_size}, but no plan says what becomes of {type(root).__name__}'s modules. transformers models bring one "
            "(base_model_tp_plan). For others write it, e.g. plan={'model.layers.*.attn.qkv': 'colwise', "
            "'model.layers.*.attn.out': 'rowwise', 'model.layers.*.mlp.up': 'colwise', 'model.layers.*.mlp.down': 'rowwise'}, "
            "or set tp=1 and more dp."
        )
    styles = plan.resolve(root)
    _check_ties(done, styles)
    styles = {name: style for name, style in styles.items() if not (done.cut and done.cut.is_elsewhere(canonical(name)))}
    group = mesh["tp"].get_group()
    tp = tensor.TensorParallel(
        group=group, rank=mesh["tp"].get_local_rank(), size=tp_size, shards=done.shards, device=request.device
    )
    regions: dict[str, sequence.SequenceRegions] = {}
    runs: list[list[str]] = []
    if request.sequence_parallel:
        assert blocks is not None
        names = [f"{blocks}.{key}" for key, _ in root.get_submodule(blocks).named_children()]
        runs = [done.cut.blocks_of(stage) for stage in done.cut.local_stages] if done.cut else [names]
        regions = {name: sequence.regions_of(root.get_submodule(name), name, styles) for run in runs for name in run}
    tp.apply(root, styles, itertools.chain.from_iterable(found.split for found in regions.values()))
    sequence.apply_sequence_parallel(root, regions, runs, tp)
    done.shards.use_canonical_names(done.aliases)
    parents = {canonical(enclosing(name)) for name, style in styles.items() if style in ("rowwise", "packed_rowwise")}
    done.shares = ShareCheck(group, done.shards, parents, map(canonical, dict(root.named_parameters())))
    return _groups_of_shared_heads(done.shards, mesh)


def _check_ties(done: Parallelized, styles: dict[str, str]) -> None:
    """Tied weights must be cut alike; under pp each stage would only see its own end."""
    cuts = {canonical(name): style for name, style in styles.items()}
    by_vocabulary = {"vocab_embedding", "vocab_head"}
    for alias, first in done.aliases.items():
        found = [cuts.get(name.rpartition(".")[0]) for name in (first, alias)]
        if found[0] != found[1] and not set(found) <= by_vocabulary:
            raise ValueError(
                f"{alias} is tied to {first}, but the plan cuts one as {found[1]!r} and the other as {found[0]!r}. Cut both by "
                "vocabulary ('vocab_head' and 'vocab_embedding'), or leave both out of the plan."
            )


def _groups_of_shared_heads(shards: Shards, mesh: DeviceMesh) -> dict[int, dist.ProcessGroup]:
    """Make the groups of neighbouring tp ranks that hold the same rows of something, for each number of them."""
    sizes: list[Any] = [None] * dist.get_world_size()
    here = {len(ranks) for name in shards.shared_kv for ranks in shards.by_name[name].holders}
    dist.all_gather_object(sizes, here - {1})
    mine, found = mesh.get_rank(), {}
    for sharing in sorted(set().union(*sizes)):
        for ranks in mesh.mesh.reshape(-1, sharing).tolist():
            group = dist.new_group(ranks)
            if mine in ranks:
                found[sharing] = group
    return found


def _context_parallel(done: Parallelized, mesh: DeviceMesh, request: Request) -> None:
    """Sequences: this rank works on its part of each."""
    layout = request.layout
    if layout.cp == 1:
        return
    axis = mesh["cp"]
    parts = ContextParallel(
        group=axis.get_group(), rank=axis.get_local_rank(), size=layout.cp, kind=request.context, tp=layout.tp, pp=layout.pp,
        # A pipeline's stream of the model is of one's own already.
        random=None if layout.pp > 1 else OwnStream(axis.get_local_rank(), request.device),
    )  # fmt: skip
    parts.apply(done.root)


def _float8(done: Parallelized, blocks: str | None, request: Request) -> None:
    """Linear layers of blocks: products in float8."""
    if request.float8 is None:
        return
    assert blocks is not None
    request.float8.check(request.device)
    count = request.float8.apply(list(done.root.get_submodule(blocks).children()))
    if not count and any(p.numel() for p in done.root.get_submodule(blocks).parameters()):
        raise ValueError(
            f"float8 found no linear layer in {blocks!r} whose sizes, on this rank, are multiples of 16. Leave float8 out, or "
            "use fewer tp ranks."
        )


def _recompute_and_compile(done: Parallelized, mesh: DeviceMesh | None, blocks: str | None, request: Request) -> None:
    """Blocks: what they keep for the backward pass, and graphs of them."""
    if not request.recompute and not request.compile:
        return
    assert blocks is not None
    children = list(done.root.get_submodule(blocks).children())
    request.recompute.apply(children)
    if request.compile:
        options = None
        if request.async_tp:
            assert mesh is not None
            overlap.check_async_tp(request.device, request.layout.tp)
            options = overlap.compile_options(mesh["tp"].get_group())
        compile_blocks([block for block in children if any(p.numel() for p in block.parameters())], options)


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the ranks over which gradients are averaged."""
    group: dist.ProcessGroup = flatten(mesh, "dp_replicate", "dp_shard", "cp", name="dp_cp").get_group()
    return group


def share_groups(
    done: Parallelized, mesh: DeviceMesh, expert_mesh: DeviceMesh | None
) -> Callable[[nn.Parameter], dist.ProcessGroup]:
    """Return a function: a parameter -> the ranks over which its optimizer state is sharded (those of one replica)."""
    group: dist.ProcessGroup = flatten(mesh, "dp_shard", "cp", name="dp_shard_cp").get_group()
    if expert_mesh is None:
        return lambda _: group
    spread, same = _expert_parameters(done), expert_mesh["expert_shard"].get_group()
    return lambda param: same if param in spread else group


def _data_parallel(
    done: Parallelized, mesh: DeviceMesh, expert_mesh: DeviceMesh | None, blocks: str | None, request: Request
) -> None:
    layout = request.layout
    if layout.dp_size * layout.cp == 1:
        return
    if request.schedule in pipeline.SPLITS_BACKWARD and layout.pp > 1 and layout.zero_stage == 3 and layout.dp_shard > 1:
        raise ValueError(
            f"schedule={request.schedule!r} computes weight gradients outside of autograd, where FSDP2 does not see them. Set "
            "zero_stage to 2 or less, or schedule='interleaved_1f1b'."
        )
    if layout.zero_stage == 3 and layout.dp_shard * layout.cp > 1:
        _fully_shard(done, mesh, expert_mesh, blocks, request)


def _average_gradients(done: Parallelized, mesh: DeviceMesh, expert_mesh: DeviceMesh | None) -> None:
    """Average the gradients of what FSDP2 does not shard. The parameters must be those that will be trained."""
    layout, root = done.layout, done.root
    replicas = layout.dp_size * layout.cp
    if replicas == 1:
        return
    if done.sharded is not None:
        scalars = [p for p in root.parameters() if p.ndim == 0]
        if scalars:
            done.reducers.append(GradientReducer(scalars, data_group(mesh)))
        return
    spread, stage_of = _expert_parameters(done), _stages_of(done)
    dense = [p for p in root.parameters() if p.numel() and p not in spread]
    copies = mesh["dp_replicate"].get_group() if layout.dp_replicate > 1 else None
    done.reducers.append(GradientReducer(dense, data_group(mesh), copies=copies, stage_of=stage_of))
    if expert_mesh is not None:
        same = flatten(expert_mesh, "dp_replicate", "expert_shard", name="expert_dp").get_group()
        copies = expert_mesh["dp_replicate"].get_group() if layout.dp_replicate > 1 else None
        done.reducers.append(GradientReducer(spread, same, divisor=replicas, copies=copies, stage_of=stage_of))


def _stages_of(done: Parallelized) -> Callable[[nn.Parameter], int | None]:
    """Return a function: a parameter -> the one pipeline stage of this rank that uses it; ``None``: several may."""
    if done.cut is None:
        return lambda _: 0
    here = set(done.cut.local_stages)
    users: dict[int, set[int]] = {}
    for name, param in done.root.named_parameters(remove_duplicate=False):
        stage = done.cut.stage_of(canonical(name))
        users.setdefault(id(param), set()).update(here if stage is None else {stage})
    return lambda param: next(iter(users[id(param)])) if len(users.get(id(param), ())) == 1 else None


def _fully_shard(
    done: Parallelized, mesh: DeviceMesh, expert_mesh: DeviceMesh | None, blocks: str | None, request: Request
) -> None:
    """ZeRO 3."""
    layout, root = request.layout, done.root
    # Scalars can't be sharded; empty ones belong to other stages.
    ignored = {p for p in root.parameters() if p.numel() == 0 or p.ndim == 0}
    shard = flatten(mesh, "dp_shard", "cp", name="dp_shard_cp")
    fsdp_mesh = mesh["dp_replicate", "dp_shard_cp"] if layout.dp_replicate > 1 else shard
    layers = layers_to_shard(root, blocks, request.manual_optimization)
    inside = {p for layer in layers for p in layer.parameters()}
    loose = [name for name, p in root.named_parameters() if p not in ignored and p not in inside]
    if request.manual_optimization and loose:
        raise ValueError(
            f"zero_stage={layout.zero_stage} with manual optimization can't shard parameters of the LightningModule itself, or "
            f"of a list or dict in it ({', '.join(loose)}). Move them into a child module with a forward, or set zero_stage=0 "
            "(strategy='kenotron_ddp')."
        )
    tied = _tied_across(layers, root)
    experts, over = [], None
    if done.experts is not None and expert_mesh is not None:
        experts = list(done.experts.modules.values())
        over = expert_mesh["dp_replicate", "expert_shard"] if layout.dp_replicate > 1 else expert_mesh["expert_shard"]
    layers = [layer for layer in layers if layer not in tied]
    done.sharded = FullySharded(
        root, layers, fsdp_mesh, ignored, data_group(mesh), experts, over, gather_bf16=request.gather_bf16
    )


def _expert_parameters(done: Parallelized) -> dict[nn.Parameter, None]:
    """Return the parameters that expert parallelism cuts, in order."""
    modules = done.experts.modules.values() if done.experts is not None else ()
    return {p: None for module in modules for p in module.parameters(recurse=False)}


def _tied_across(layers: Sequence[nn.Module], root: nn.Module) -> list[nn.Module]:
    """Return the layers that share a parameter with anything outside of them: they stay in the root's group."""
    uses: dict[int, int] = {}
    for module in root.modules():
        for param in module._parameters.values():
            if param is not None:
                uses[id(param)] = uses.get(id(param), 0) + 1
    tied = []
    for layer in layers:
        inside: dict[int, int] = {}
        for module in layer.modules():
            for param in module._parameters.values():
                if param is not None:
                    inside[id(param)] = inside.get(id(param), 0) + 1
        if any(uses[key] != count for key, count in inside.items()):
            tied.append(layer)
    return tied


def _move(root: nn.Module, device: torch.device) -> None:
    """Move what is left elsewhere to the device; parameters of other stages stay empty."""
    before = [(param, attributes(param)) for param in root.parameters()]
    root.to(device)
    for param, found in before:  # torch swaps the content of a DTensor, and its attributes with it
        param.__dict__.update(found)


def _aliases(root: nn.Module) -> dict[str, str]:
    """Return the canonical (first) name of every further name of a tied parameter."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, param in root.named_parameters(remove_duplicate=False):
        name = canonical(name)
        if id(param) in first:
            aliases[name] = first[id(param)]
        else:
            first[id(param)] = name
    return aliases
