"""Cut a module into pipeline stages in place, so that the code around it runs unchanged on every stage.

Every stage keeps the whole module tree: names, attributes and ``isinstance`` never change. What changes is what a *unit*
(see ``stages``) does when it is called while a microbatch flies through stage ``k``:

1. A unit of an earlier stage returns a placeholder of the hidden state's shape; the code between units runs on it.
2. The last unit of stage ``k - 1`` returns the activation that was received from that stage.
3. A unit of stage ``k`` runs. The output of the last one leaves the step: it is carried out by a ``StageExit``, so that the
   rest of the step, the head and the loss run on the last stage alone.
4. A unit of a later stage can't be reached.

Nothing but the output of a stage's last unit travels. A step that carries more past it (a residual connection around the
blocks) would go on with a placeholder's zeros; the first flight of each shape therefore has NaN for them, which no own unit
may get. What comes after the last block must not use them either: there the loss's graph tells, in the first training flight.
Nor may a step compute with weights of other stages: an ``AbsentParameter`` stands for each.

The cut is at the *output* of a unit, outside of ``__call__`` and so outside of every hook, compiled graph and
recompute wrapper on it. While a recomputed block runs again in the backward pass no microbatch flies, and units just run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from kenotron.parallel.shards import attributes, canonical, set_part, take_over


class StageExit(BaseException):
    """Carries the output of a stage's last unit out of the user's step. Not an ``Exception``: no user code swallows it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True)
class BoundaryMeta:
    """What travels over one boundary: the structure of the unit's output, its tensors' shapes and dtypes, its constants."""

    spec: TreeSpec
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    constants: tuple[tuple[int, Any], ...]

    @staticmethod
    def of(value: Any) -> BoundaryMeta:
        leaves, spec = tree_flatten(value)
        tensors = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
        constants = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        if not tensors:
            raise ValueError(
                f"the last block of a pipeline stage returned no tensor, but {type(value).__name__}: nothing can travel to the "
                "next stage. Let blocks return the hidden state."
            )
        return BoundaryMeta(spec, tensors, constants)

    def tensors_of(self, value: Any) -> tuple[Tensor, ...]:
        """Return the tensors of ``value`` in order, contiguous (they are sent as they are)."""
        return tuple(leaf.contiguous() for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Return the unit's output with ``tensors`` in it."""
        constants, remaining = dict(self.constants), iter(tensors)
        count = len(self.tensors) + len(constants)
        return tree_unflatten([constants[i] if i in constants else next(remaining) for i in range(count)], self.spec)


@dataclass(kw_only=True)
class Flight:
    """One microbatch in one stage.

    Args:
        stage: the stage that it flies through.
        received: what the stage before sent, as its last unit returned it; ``None`` on the first stage.
        on_enter: called once, before the first own unit runs (the random streams change there).
        is_trial: find out whether a placeholder's numbers come to own units; it ends before the last of all blocks.
        is_traced: find out whether what the step returns depends on a placeholder.
        with_grad: whether gradients are recorded where the flight starts.
    """

    stage: int
    received: Any = None
    on_enter: Callable[[], None] | None = None
    with_grad: bool = field(default_factory=torch.is_grad_enabled)
    is_trial: bool = False
    is_traced: bool = False
    taken: bool = False
    _called: set[str] = field(default_factory=set)
    _placeholders: dict[bool, Any] = field(default_factory=dict)
    _is_finite: bool = True  # own units have returned no NaN so far
    _origin: Tensor | None = None  # what placeholders are made of, where they are traced

    def take(self) -> Any:
        """Return the received activation, once."""
        if self.taken:
            raise _called_twice()
        self.taken = True
        return self.received

    def placeholder(self, name: str, *, like_block: bool) -> Any:
        """Return what a unit of an earlier stage stands for: zeros of the hidden state's shape.

        A block returns the structure that crossed the boundary, any other unit its first tensor.
        """
        if self.taken and name in self._called:
            raise _called_twice()
        self._called.add(name)
        if self.taken:
            raise ValueError(
                f"{name!r} is on an earlier pipeline stage, but the step calls it after the blocks of that stage: units must "
                "be registered in the order in which they run. Register it after the blocks, or name the units of each stage "
                "in their order with plan=ParallelPlan(stages=[[...], ...])."
            )
        if like_block not in self._placeholders:
            leaves, spec = tree_flatten(self.received)
            # New memory: code that changes a placeholder in place must not reach the received activation.
            filled = [self._filled(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            first = next(leaf for leaf in filled if isinstance(leaf, Tensor))
            self._placeholders[like_block] = tree_unflatten(filled, spec) if like_block else first
        return self._placeholders[like_block]

    def _filled(self, like: Tensor) -> Tensor:
        if self.is_trial and like.is_floating_point():
            return torch.full_like(like, torch.nan, requires_grad=False)
        zeros = torch.zeros_like(like, requires_grad=False)
        if self.is_traced and like.is_floating_point():
            with torch.enable_grad():
                if self._origin is None:
                    self._origin = torch.zeros((), device=like.device, requires_grad=True)
                return zeros + self._origin.to(like.dtype)
        return zeros

    def enter(self) -> None:
        if self.on_enter is not None:
            self.on_enter()
            self.on_enter = None

    def check_inputs(self, name: str, inputs: Any) -> None:
        """Raise ``ValueError`` where a unit would get a placeholder's numbers. What was received and the batch have no NaN."""
        if self.stage > 0 and self._is_finite and has_nan(inputs):
            raise ValueError(
                f"{name!r} on pipeline stage {self.stage} would get numbers of an earlier stage other than what that stage's "
                "last block returned. Nothing else travels between stages: put residual and skip connections that go around "
                "blocks inside of them, let blocks return all that later ones need, or set pp=1."
            )

    def check_result(self, result: Any) -> None:
        """Raise ``ValueError`` where the loss was computed from a placeholder."""
        if self._origin is not None and isinstance(result, Tensor) and _leads_to(result, self._origin):
            raise ValueError(
                "the loss depends on what an earlier pipeline stage computed, other than what that stage's last block returned "
                "(losses of each block that are summed, a connection from the embedding to the head). Nothing else travels "
                "between stages: let each block take it, add its own and return it beside the hidden state, or set pp=1."
            )

    def note_output(self, output: Any) -> None:
        """Look at what an own unit made: a NaN of its own says nothing of placeholders."""
        self._is_finite = self._is_finite and not has_nan(output)


def has_nan(value: Any) -> bool:
    """Return whether there is a NaN in the tensors of ``value``; the host waits for them."""
    tensors = (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(bool(tensor.isnan().any()) for tensor in tensors)


def _leads_to(result: Tensor, leaf: Tensor) -> bool:
    """Return whether the graph of ``result`` has ``leaf`` in it."""
    pending, seen = [result.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return False


def _called_twice() -> ValueError:
    return ValueError(
        "the step called the pipelined module twice. With pp > 1 a step calls it once per microbatch: concatenate the inputs, "
        "or set pp=1."
    )


class Cut:
    """The units of a module, the stage of each, and the microbatch in flight.

    Args:
        root: the module that was cut; its units change class in place (to a subclass of the same name).
        units: unit names in execution order. stages: the stage of each.
        blocks: the name of the block list.
        local_stages: the stages of this rank.
    """

    def __init__(
        self, root: nn.Module, units: Sequence[str], stages: Sequence[int], blocks: str, local_stages: Sequence[int]
    ) -> None:
        self.root = root
        self.units = tuple(units)
        self.stages = tuple(stages)
        self.blocks = blocks
        self.local_stages = tuple(local_stages)
        self.num_stages = max(stages) + 1
        self.last_block = next(name for name in reversed(self.units) if name.startswith(blocks + "."))
        self.flight: Flight | None = None
        for i, (name, stage) in enumerate(zip(self.units, self.stages, strict=True)):
            ends_stage = i + 1 == len(self.units) or self.stages[i + 1] != stage
            _make_unit(root.get_submodule(name), _UnitRole(self, name, stage, ends_stage))

    def stage_of(self, name: str) -> int | None:
        """Return the stage of a parameter or module called ``name``; ``None`` if it lies in no unit (every stage has it)."""
        for unit, stage in zip(self.units, self.stages, strict=True):
            if name == unit or name.startswith(unit + "."):
                return stage
        return None

    def is_elsewhere(self, name: str) -> bool:
        """Whether a parameter or module belongs to stages that this rank does not have."""
        stage = self.stage_of(name)
        return stage is not None and stage not in self.local_stages

    def units_of(self, stage: int) -> list[str]:
        return [name for name, s in zip(self.units, self.stages, strict=True) if s == stage]

    def blocks_of(self, stage: int) -> list[str]:
        return [name for name in self.units_of(stage) if name.startswith(self.blocks + ".")]

    def fly(self, flight: Flight, step: Callable[[], Any]) -> tuple[bool, Any]:
        """Run ``step`` with ``flight`` in the air.

        Returns:
            ``(True, output of the stage's last unit)`` where the step left at the boundary, ``(False, what step returned)``
            where it ran to its end.
        """
        self.flight, AbsentParameter.cut = flight, self
        try:
            result = step()
        except StageExit as leaving:
            return True, leaving.value
        finally:
            self.flight = AbsentParameter.cut = None
        if flight.stage < self.num_stages - 1 or (flight.stage > 0 and not flight.taken):
            raise ValueError(
                f"the step returned without running {self.blocks!r}. With pp > 1 every step must call the pipelined module "
                "(on every rank): return None only after it, or set pp=1."
            )
        flight.check_result(result)
        return False, result

    def refuse(self, param: AbsentParameter) -> ValueError:
        """Return the error of a step that computes with a weight of another stage."""
        named = self.root.named_parameters(remove_duplicate=False)
        name = next((repr(canonical(name)) for name, found in named if found is param), "a copy of a weight")
        assert self.flight is not None
        return ValueError(
            f"the step computes with {name} while pipeline stage {self.flight.stage} runs, which does not have it. Use weights "
            "by calling the modules that hold them: tie a head by giving it the parameter (head.weight = embed.weight), "
            "leave penalties on weights to the optimizer's weight decay, or set pp=1."
        )


class AbsentParameter(nn.Parameter):
    """Stands for a parameter of another stage: it has no elements, and a step that computes with it gets an error.

    Same dtype, number of dimensions and ``requires_grad``: rules which group parameters by name or by ``ndim`` give the same
    groups on every stage, and an optimizer never has an empty list.
    """

    #: the one through which a microbatch flies now
    cut: ClassVar[Cut | None] = None

    @staticmethod
    def like(param: nn.Parameter) -> AbsentParameter:
        shape = (0, *param.shape[1:]) if param.ndim else (0,)
        return AbsentParameter(torch.empty(shape, dtype=param.dtype, device="cpu"), requires_grad=param.requires_grad)

    @staticmethod
    def of(param: nn.Parameter, *, is_used_here: bool) -> AbsentParameter:
        """Return what stands for a parameter: the object itself, emptied, unless this rank has another use for it (a tie)."""
        absent = AbsentParameter.like(param)
        if is_used_here or type(param) is not nn.Parameter:
            absent.__dict__.update(attributes(param))
            return absent
        if param.is_meta:
            take_over(param, absent)
            return absent
        param.__class__ = AbsentParameter
        set_part(param, absent.detach().to(param.device))
        assert isinstance(param, AbsentParameter)
        return param

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        computes = cls.cut is not None and func.__name__ not in ("__get__", "detach")
        try:
            out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        except (RuntimeError, IndexError):  # of its shape
            if not computes:
                raise
        else:
            if not computes or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
                return out
        assert cls.cut is not None
        raise cls.cut.refuse(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))) from None


@dataclass(frozen=True)
class _UnitRole:
    cut: Cut
    name: str
    stage: int
    ends_stage: bool

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flight = self.cut.flight
        if flight is None:
            if self.stage in self.cut.local_stages:
                return forward(*args, **kwargs)
            raise RuntimeError(
                f"{self.name!r} lives on pipeline stage {self.stage}; this rank has stage(s) "
                f"{', '.join(map(str, self.cut.local_stages))}. Outside of training, validation, test and predict steps (or in "
                "a recomputed segment of several blocks that spans two stages) only own units can be called."
            )
        if self.stage < flight.stage:
            if self.ends_stage and self.stage == flight.stage - 1:
                return flight.take()
            return flight.placeholder(self.name, like_block=self.name.startswith(self.cut.blocks + "."))
        if self.stage > flight.stage:
            raise ValueError(
                f"{self.name!r} is on pipeline stage {self.stage}, but the step calls it while stage {flight.stage} runs, "
                "before the last block: units must be registered in the order in which they run. Register it before the "
                "blocks, or name the units of each stage in their order with plan=ParallelPlan(stages=[[...], ...]). The last "
                "block of a stage can't be left out of a step (layer drop)."
            )
        flight.enter()
        if flight.is_trial:
            flight.check_inputs(self.name, (args, kwargs))
            if self.name == self.cut.last_block:
                raise StageExit(None)
        output = forward(*args, **kwargs)
        if flight.is_trial:
            flight.note_output(output)
        if self.ends_stage and flight.stage < self.cut.num_stages - 1 and self.cut.flight is flight:
            if flight.with_grad and not torch.is_grad_enabled():
                raise ValueError(
                    f"{self.name!r} ends a pipeline stage and was called inside a reentrant activation checkpoint, which hides "
                    "its gradient. Pass use_reentrant=False to torch.utils.checkpoint."
                )
            raise StageExit(output)
        return output


class _Unit:
    """Mixed into the class of every unit: asks its role what a call means."""

    _pipeline_role: _UnitRole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipeline_role.call(super().__call__, args, kwargs)  # type: ignore[misc]


def _make_unit(module: nn.Module, role: _UnitRole) -> None:
    kind = type(module)
    if issubclass(kind, _Unit):
        raise ValueError(f"{role.name!r} appears twice among the units: a block can't be on two pipeline stages.")
    # A subclass of the same name, as FSDP2 does it: isinstance, repr and super() keep their meaning, and __call__ (which
    # Python looks up on the class) is ours, outside of every hook and of transformers' own checkpointing __call__.
    module.__class__ = type(kind.__name__, (_Unit, kind), {"__module__": kind.__module__})
    module.__dict__["_pipeline_role"] = role
