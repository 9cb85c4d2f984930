"""Logits that stay split over the vocabulary under code that knows nothing of it.

Each tp rank's head computes ``[..., V/tp]`` logits. ``VocabParallelLogits`` shows them as one tensor ``[..., V]``, and
the user's code (a loss, soft-capping, metrics) goes on with it. What becomes of an operation is decided here:

1. Questions (shape, dtype, requires_grad, …) are answered for the whole tensor. No communication.
2. What acts on each logit alone, or leaves the vocabulary in one piece (casts, arithmetic, reshapes, transposes, slices
   of other dimensions), is done on the local slice and gives ``VocabParallelLogits`` again. No communication.
3. Cross entropy, softmax, logsumexp, argmax, max, sum, mean and gather over the vocabulary exchange numbers per token.
4. Everything else gathers the logits ``[..., V]`` and goes on with a plain tensor. Right for any operation, also one
   that torch will have tomorrow; the gathered tensor is kept for the next. What is changed in place in it goes back into
   the slices. Unlike a view of plain logits, a part of the vocabulary taken before does not see later changes.

Every rank runs the same code on the same batch, so all come to the same collectives in the same order. What one rank
does alone (``if rank == 0: print(logits)``) must not communicate: ``repr`` therefore shows no values.

Gradients. What leaves 3 and 4 is the same on every rank, and so is its gradient: each rank keeps its slice, without a
sum. The gradient of the head's *input* is then one rank's share, which the ``copy_to`` before the head sums. So is that
of a tensor that meets the logits (a learned temperature): see ``_operand``.

Autograd has two ways from the wrapper to the slice. The operations above take ``_local``, which carries its own graph.
C++ code that takes the wrapper for a plain tensor (a custom ``autograd.Function``) finds the node of ``_Wrap``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import GetSetDescriptorType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from kenotron.parallel.collectives import (
    Group,
    copy_to,
    gather_from,
    reduce_from,
    scatter_to,
)
from kenotron.parallel.vocab import argmax, log_normalizer, pick, vocab_parallel_cross_entropy, wide


class VocabParallelLogits(Tensor):
    """Logits ``[..., V]`` of which each rank of a group holds an equal slice of the vocabulary (see the module)."""

    _local: Tensor  # this rank's slice, with its graph: the truth
    _dim: int  # where the vocabulary is
    _group: ProcessGroup
    _whole: Tensor | None  # the gathered logits
    _gathered_at: tuple[int, int | None]  # the writes, and the version of _whole, when they were gathered
    _writes: list[int]  # how often slices were written; one list for all wrappers that may be views of one another

    @staticmethod
    def from_local(local: Tensor, group: Group, dim: int = -1) -> Tensor:
        """Return the logits that the ranks hold together; ``local`` itself where there is one rank.

        Args:
            local: this rank's slice ``[..., V/tp]``, in the order of the ranks; the graph is kept.
            dim: of the vocabulary.
        """
        return local if group is None or group.size() == 1 else _wrap(local, dim % local.ndim, group, [0])

    def to_local(self) -> Tensor:
        """Return this rank's slice, differentiable."""
        if torch.is_grad_enabled() and not self._local.requires_grad and self._requires_grad():
            # A custom Function made this wrapper (its forward runs without grad), and autograd gave it a history that
            # the slice knows nothing of.
            self._local = cast(Tensor, _Adopt.apply(self))
        if self._whole is not None and self._gathered_at[1] != _version(self._whole):
            self._write_back()
        return self._local

    def full_tensor(self) -> Tensor:
        """Return the whole logits as a plain tensor, differentiable. Collective unless they were gathered before."""
        local = self.to_local()
        # Gathered under no_grad (for a metric) they have no graph, and a loss needs one.
        graph = local.requires_grad and torch.is_grad_enabled()
        if self._whole is None or self._gathered_at[0] != self._writes[0] or (graph and not self._whole.requires_grad):
            self._whole = gather_from(local, self._dim, self._group, grad="slice")
            self._gathered_at = (self._writes[0], _version(self._whole))
        return self._whole

    def _write_back(self) -> None:
        """Copy into the slice what was changed in place in the gathered logits, or in a view of them."""
        whole, self._whole = cast(Tensor, self._whole), None
        # As it was gathered, not as now: what was written with a graph must keep it, what was written without has none.
        with torch.set_grad_enabled(whole.requires_grad):
            self._local.copy_(scatter_to(whole, self._dim, self._group))
            self._wrote()

    def _requires_grad(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad

    def _global_shape(self) -> tuple[int, ...]:
        shape = self._local.shape
        return (*shape[: self._dim], shape[self._dim] * self._group.size(), *shape[self._dim + 1 :])

    def _like(self, local: Tensor, dim: int) -> Tensor:
        return _wrap(local, dim, self._group, self._writes)

    def _wrote(self) -> VocabParallelLogits:
        """Note that the slice was changed in place, and point autograd's node to its new history."""
        self._writes[0] += 1
        return cast(VocabParallelLogits, _Rebase.apply(self, self._local))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:  # the one name that torch has for its first argument
            args = (kwargs.pop("input"),)
        handler = _ANYWHERE.get(func)
        if handler is None and args and isinstance(args[0], VocabParallelLogits):
            handler = _METHODS.get(func)
        result = NotImplemented if handler is None or "out" in kwargs else handler(func, args, kwargs)
        return _on_whole(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Serve C++ code, which sees no ``__torch_function__``; autograd has done its part already."""
        if func in (torch.ops.aten.view.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default):
            logits = args[0]
            if func is not torch.ops.aten.view.default or tuple(args[1]) == logits._global_shape():
                return _make_wrapper(logits.to_local().detach(), logits._dim, logits._group, logits._writes)
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} changes vocabulary-parallel logits in place: call logits.full_tensor().")
        with torch.no_grad():
            return func(*_map(_whole_of, args), **_map(_whole_of, kwargs or {}))


# ---- Between the slice and the wrapper, for autograd ----------------------------------------------------------------


def _make_wrapper(local: Tensor, dim: int, group: ProcessGroup, writes: list[int]) -> VocabParallelLogits:
    shape = list(local.shape)
    shape[dim] *= group.size()
    make = cast(Callable[..., VocabParallelLogits], Tensor._make_wrapper_subclass)
    wrapper = make(VocabParallelLogits, shape, dtype=local.dtype, device=local.device)
    wrapper._local, wrapper._dim, wrapper._group = local, dim, group
    wrapper._whole, wrapper._gathered_at, wrapper._writes = None, (0, None), writes
    return wrapper


def _wrap(local: Tensor, dim: int, group: ProcessGroup, writes: list[int]) -> Tensor:
    if not torch.is_grad_enabled():
        local = local.detach()  # views taken under no_grad claim requires_grad, and have no graph
    return cast(Tensor, _Wrap.apply(local, dim, group, writes))


class _Wrap(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: ProcessGroup, writes: list[int]) -> Tensor:
        ctx.dim, ctx.start, ctx.width = dim, group.rank() * local.shape[dim], local.shape[dim]
        return _make_wrapper(local, dim, group, writes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.narrow(ctx.dim, ctx.start, ctx.width), None, None, None


class _Rebase(Function):
    """Give a wrapper that exists the history of its slice."""

    @staticmethod
    def forward(ctx: Any, wrapper: VocabParallelLogits, local: Tensor) -> Tensor:
        ctx.mark_dirty(wrapper)
        ctx.bounds = wrapper._dim, wrapper._group.rank() * local.shape[wrapper._dim], local.shape[wrapper._dim]
        return wrapper

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad.narrow(*ctx.bounds)


class _Adopt(Function):
    """Give the slice the history of its wrapper."""

    @staticmethod
    def forward(ctx: Any, wrapper: VocabParallelLogits) -> Tensor:
        ctx.dim, ctx.group = wrapper._dim, wrapper._group
        return wrapper._local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gather_from(grad, ctx.dim, ctx.group, grad="slice")


# ---- 4. Everything else ---------------------------------------------------------------------------------------------


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func`` on the gathered logits; what it changed in place goes back into the slices."""
    met: list[tuple[VocabParallelLogits, Tensor]] = []

    def gather(value: Any) -> Any:
        if not isinstance(value, VocabParallelLogits):
            return value
        met.append((value, value.full_tensor()))
        return met[-1][1]

    result = func(*_map(gather, args), **_map(gather, kwargs))
    for logits, whole in met:
        if whole.is_inference() and logits is met[0][0] and _changes(func, kwargs):
            logits._write_back()
        logits.to_local()
        result = logits if result is whole and logits._whole is not whole else result
    return result


def _version(x: Tensor) -> int | None:
    """Return how often ``x``, or a view of it, was changed in place; ``None``: nobody knows."""
    return None if x.is_inference() else x._version


def _changes(func: Any, kwargs: Any) -> bool:
    """Return whether ``func`` changes its first argument, by its name; inference tensors count no versions."""
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _refuse(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    raise NotImplementedError(f"{name} cannot change vocabulary-parallel logits: call it on logits.full_tensor().")


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to what lies in nested tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    if type(value) is dict:
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _whole_of(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, VocabParallelLogits) else value


def _local_of(value: Any) -> Any:
    return value.to_local() if isinstance(value, VocabParallelLogits) else value


def _meta_of(value: Any) -> Any:
    """Return a contiguous tensor of the global shape without data, on which torch itself says what a view does."""
    if not isinstance(value, VocabParallelLogits):
        return value
    return torch.empty(value._global_shape(), dtype=value._local.dtype, device="meta")


def _arguments(args: Any, kwargs: Any, *names: str) -> dict[str, Any] | None:
    """Return the arguments of a call by name; ``None`` if there are others."""
    kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}
    if len(args) > len(names) or not kwargs.keys() <= set(names):
        return None
    return dict(zip(names, args, strict=False)) | kwargs


# ---- 1. Questions, and hooks ----------------------------------------------------------------------------------------


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _repr(func: Any, args: Any, kwargs: Any) -> str:
    logits = args[0]
    width, rank = logits._local.shape[logits._dim], logits._group.rank()
    return (
        f"VocabParallelLogits(shape={logits._global_shape()}, dtype={logits._local.dtype}, "
        f"device='{logits._local.device}'; here [{rank * width}, {(rank + 1) * width}) of dim {logits._dim}; "
        "full_tensor(), called on every rank, gathers them)"
    )


def _register_hook(func: Any, args: Any, kwargs: Any) -> Any:
    """Hook the slice; the function sees its gradient as vocabulary-parallel. FSDP hooks outputs in every step."""
    logits, hook = args[0], kwargs.get("hook", args[-1])
    dim, group = logits._dim, logits._group  # not logits itself: the hook would keep it alive

    def on_local(grad: Tensor) -> Tensor | None:
        result = hook(_wrap(grad, dim, group, [0]))
        if isinstance(result, VocabParallelLogits):
            return result.to_local()
        return None if result is None else scatter_to(result, dim, group)

    return logits.to_local().register_hook(on_local)


def _retain_grad(func: Any, args: Any, kwargs: Any) -> None:
    args[0].to_local().retain_grad()


def _grad(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    grad = args[0].to_local().grad
    return None if grad is None else args[0]._like(grad, args[0]._dim)


def _autograd_grad(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.autograd.grad`` with respect to logits: with respect to the slices, which the loss was made from."""
    kwargs = dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)) | kwargs
    inputs = [kwargs["inputs"]] if isinstance(kwargs["inputs"], Tensor) else kwargs["inputs"]
    kwargs["inputs"] = [_local_of(x) for x in inputs]
    grads = func(**_map(_whole_of, kwargs))
    return tuple(
        x._like(grad, x._dim) if isinstance(x, VocabParallelLogits) and grad is not None else grad
        for x, grad in zip(inputs, grads, strict=True)
    )


def _autograd_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """``backward`` from logits; reentrant checkpointing calls it inside a backward, where nothing is recorded."""
    with torch.enable_grad():
        return _on_whole(func, args, kwargs)


# ---- 2. What stays local --------------------------------------------------------------------------------------------


def _operand(leader: VocabParallelLogits, value: Any) -> Any:
    """Return what the slice of ``leader`` meets where that meets ``value``; ``NotImplemented`` if they do not fit."""
    if not isinstance(value, Tensor):
        return value
    behind = leader._local.ndim - leader._dim  # broadcasting counts dimensions from the end
    if isinstance(value, VocabParallelLogits):
        same = value._group is leader._group and value._local.ndim - value._dim == behind
        return value.to_local() if same else NotImplemented
    if value.ndim < behind or value.shape[-behind] == 1:
        # Each rank finds the share of its slice in this tensor's gradient.
        return copy_to(value, leader._group) if value.requires_grad else value
    if value.shape[-behind] == leader._global_shape()[leader._dim]:
        return scatter_to(value, value.ndim - behind, leader._group)
    return NotImplemented


def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    leader = next(value for value in (*args, *kwargs.values()) if isinstance(value, VocabParallelLogits))
    args = [_operand(leader, value) for value in args]
    kwargs = {key: _operand(leader, value) for key, value in kwargs.items()}
    if any(value is NotImplemented for value in (*args, *kwargs.values())):
        return NotImplemented
    result = func(*args, **kwargs)
    if result is leader._local:  # add_, or relu(inplace=True)
        return leader._wrote()
    if not isinstance(result, Tensor):  # logits == None
        return result
    return leader._like(result, result.ndim - (leader._local.ndim - leader._dim))


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies, casts, and ``x.to(logits)``, where the logits only say to what."""
    result = func(*_map(_local_of, args), **_map(_local_of, kwargs))
    logits = args[0]
    if not isinstance(logits, VocabParallelLogits) or not isinstance(result, Tensor):
        return result
    if result is logits._local:
        return logits
    return logits._like(result, logits._dim) if result.device == logits._local.device else NotImplemented


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*_map(_local_of, args), **kwargs)


def _reshape(func: Any, args: Any, kwargs: Any) -> Any:
    """Reshape by whatever name: torch says which shape comes out."""
    logits = args[0]
    meta = func(*_map(_meta_of, args), **_map(_meta_of, kwargs))
    shape, local = list(meta.shape), logits._local.shape
    for dim, size in enumerate(shape):
        # The vocabulary is still one dimension if as many elements stand before it as did.
        before = prod(shape[:dim]) == prod(local[: logits._dim])
        if before and size == logits._global_shape()[logits._dim] and meta.dtype == logits._local.dtype:
            shape[dim] = local[logits._dim]
            return logits._like(logits.to_local().reshape(shape), dim)
    return NotImplemented


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """Views that move dimensions or take a part of them: the vocabulary is known by its stride."""
    logits = args[0]
    meta = _meta_of(logits)
    size, stride = meta.shape[logits._dim], meta.stride(logits._dim)
    views = func(meta, *args[1:], **kwargs)
    many = isinstance(views, (tuple, list))
    dims = [
        next((dim for dim in range(view.ndim) if view.shape[dim] == size and view.stride(dim) == stride), None)
        for view in (views if many else [views])
    ]
    if None in dims:
        return NotImplemented
    result = func(logits.to_local(), *args[1:], **kwargs)
    wrapped = [logits._like(x, cast(int, dim)) for x, dim in zip(result if many else [result], dims, strict=True)]
    return tuple(wrapped) if many else wrapped[0]


def _iter(func: Any, args: Any, kwargs: Any) -> Any:
    rows = _view(Tensor.unbind, args, {})
    return rows if rows is NotImplemented else iter(rows)


def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    logits, index = args
    items = index if isinstance(index, tuple) else (index,)
    if all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items):
        return _view(func, args, kwargs)
    # Tensors as indices in front of the vocabulary: wherever torch puts their dimensions, what was last is last.
    ndim = logits._local.ndim
    taken = [_taken(item) for item in items]
    if None in taken or logits._dim != ndim - 1:
        return NotImplemented
    ellipsis = [at for at, item in enumerate(items) if item is Ellipsis]
    reaches_end = ellipsis[0] < len(items) - 1 if ellipsis else sum(cast(list[int], taken)) == ndim
    if reaches_end and not (isinstance(items[-1], slice) and items[-1] == slice(None)):
        return NotImplemented
    result = logits.to_local()[index]
    return logits._like(result, result.ndim - 1)


def _taken(item: Any) -> int | None:
    """Return how many dimensions an index takes; ``None`` for what is left to torch (lists, booleans, …)."""
    if isinstance(item, Tensor) and not isinstance(item, VocabParallelLogits):
        return (item.ndim or None) if item.dtype in (torch.bool, torch.uint8) else 1
    if item is None or item is Ellipsis:
        return 0
    return 1 if type(item) in (int, slice) else None


# ---- 3. Over the vocabulary -----------------------------------------------------------------------------------------


def _over_vocabulary(logits: VocabParallelLogits, call: dict[str, Any] | None) -> bool:
    dim = None if call is None else call.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return type(dim) is int and dim % logits._local.ndim == logits._dim


def _argmax_or_max(func: Any, args: Any, kwargs: Any) -> Any:
    logits, call = args[0], _arguments(args, kwargs, "input", "dim", "keepdim")
    if call is None or not _over_vocabulary(logits, call):
        return NotImplemented
    dim, keepdim = logits._dim, call.get("keepdim")
    index = argmax(logits.to_local(), dim, logits._group)
    if func.__name__ == "argmax":
        return index if keepdim else index.squeeze(dim)
    value = pick(logits.to_local(), dim, index, logits._group)
    return torch.return_types.max((value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim)))


def _gather(func: Any, args: Any, kwargs: Any) -> Any:
    logits, call = args[0], _arguments(args, kwargs, "input", "dim", "index")
    if call is None or not _over_vocabulary(logits, call):
        return NotImplemented
    return pick(logits.to_local(), logits._dim, call["index"], logits._group)


def _sum_or_mean(func: Any, args: Any, kwargs: Any) -> Any:
    """Over other dimensions than the vocabulary they are local."""
    logits, call = args[0], _arguments(args, kwargs, "input", "dim", "keepdim", "dtype")
    if call is None:
        return NotImplemented
    local, dim, keepdim, dtype = logits.to_local(), call.get("dim"), bool(call.get("keepdim")), call.get("dtype")
    dims = range(local.ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    dims = sorted({d % local.ndim for d in dims})
    if logits._dim not in dims:
        result = func(local, dims, keepdim=keepdim, dtype=dtype)
        return logits._like(result, logits._dim - (0 if keepdim else sum(d < logits._dim for d in dims)))
    rounded = dtype or (local.dtype if local.is_floating_point() else None)
    if dtype is None and rounded is not None:
        dtype = wide(local)  # what the ranks found is added before it is rounded
    result = reduce_from(func(local, dims, keepdim=keepdim, dtype=dtype), logits._group)
    result = result / logits._group.size() if func.__name__ == "mean" else result
    return result if rounded is None else result.to(rounded)


def _logsumexp(func: Any, args: Any, kwargs: Any) -> Any:
    logits, call = args[0], _arguments(args, kwargs, "input", "dim", "keepdim")
    if call is None or not _over_vocabulary(logits, call):
        return NotImplemented
    peak, log_sum = log_normalizer(logits.to_local(), logits._dim, logits._group)
    result = (peak + log_sum).to(logits._local.dtype)
    return result if call.get("keepdim") else result.squeeze(logits._dim)


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    """``softmax`` and ``log_softmax``, whose results stay split."""
    names = ("input", "dim", "_stacklevel", "dtype") if func in (F.softmax, F.log_softmax) else ("input", "dim", "dtype")
    logits, call = args[0], _arguments(args, kwargs, *names)
    if call is None or not _over_vocabulary(logits, call):
        return NotImplemented
    local = logits.to_local() if call.get("dtype") is None else logits.to_local().to(call["dtype"])
    peak, log_sum = log_normalizer(local, logits._dim, logits._group)
    # Each rank's slice uses the normaliser, and finds its share of that gradient.
    result = (local - peak) - copy_to(log_sum, logits._group)
    result = result if func.__name__ == "log_softmax" else result.exp()
    dtype = func(local.new_zeros(1), dim=0).dtype if torch.is_autocast_enabled(local.device.type) else local.dtype
    return logits._like(result.to(dtype), logits._dim)


def _cross_entropy(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    logits, call = args[0], _arguments(args, kwargs, *names)
    if call is None or any(call.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return NotImplemented
    target, shape, dim = call.get("target"), logits._global_shape(), logits._dim
    if not isinstance(target, Tensor) or isinstance(target, VocabParallelLogits) or target.dtype != torch.int64:
        return NotImplemented  # probabilities
    options = {name: call[name] for name in ("ignore_index", "reduction", "label_smoothing") if name in call}
    usual = options.get("reduction", "mean") in ("mean", "sum", "none") and 0.0 <= options.get("label_smoothing", 0.0) <= 1.0
    if dim != min(1, len(shape) - 1) or target.shape != (*shape[:dim], *shape[dim + 1 :]) or not usual:
        return NotImplemented  # classes that are not the vocabulary, or what torch has an error for
    local = logits.to_local()
    loss = vocab_parallel_cross_entropy(local, target, logits._group, dim=dim, **options)
    autocast = torch.is_autocast_enabled(local.device.type)
    return loss.to(func(local.new_zeros(1, 1), target.new_zeros(1)).dtype if autocast else local.dtype)


# ---- Which function is which ----------------------------------------------------------------------------------------

_QUESTIONS = """
    size dim ndimension numel nelement __len__ __hash__ __dir__ element_size get_device is_floating_point is_complex
    is_signed is_inference is_same_size is_conj is_neg is_contiguous can_cast result_type
"""
_CASTS = """
    to type type_as float double half bfloat16 bool int long clone contiguous detach data zeros_like ones_like
    empty_like  full_like
"""
_ELEMENTWISE = """
    add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow float_power neg
    negative positive abs absolute sign reciprocal square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos
    tan tanh atan asinh sigmoid logit erf relu relu6 gelu silu mish elu selu celu leaky_relu softplus softsign
    logsigmoid tanhshrink hardtanh hardsigmoid hardswish hardshrink softshrink threshold clamp clip clamp_min
    clamp_max round floor ceil trunc frac nan_to_num maximum minimum fmax fmin lerp addcmul addcdiv where
    masked_fill copysign hypot atan2 xlogy logaddexp eq ne gt ge lt le greater less isnan isinf isfinite isposinf
    isneginf isclose logical_not logical_and logical_or logical_xor bitwise_not __rsub__ __rdiv__ __rtruediv__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __eq__ __ne__ __pos__ __invert__ __and__ __or__
    __xor__
"""
_IN_PLACE = """
    add_ sub_ mul_ div_ pow_ neg_ exp_ tanh_ sigmoid_ relu_ clamp_ clamp_min_ clamp_max_ masked_fill_ nan_to_num_
"""
_RESHAPES = "view reshape flatten unflatten ravel squeeze unsqueeze view_as reshape_as"
_VIEWS = "transpose permute movedim moveaxis swapaxes swapdims t T mT select chunk split tensor_split unbind"
_NEW = "new_tensor new_zeros new_ones new_full new_empty"
_REFUSED = "requires_grad_ detach_ set_ resize_ resize_as_ share_memory_"


def _named(names: str, handler: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """Return the functions, methods and properties of these names, in the form that ``__torch_function__`` gets."""
    found = [getattr(place, name) for name in names.split() for place in (Tensor, torch, F) if name in dir(place)]
    return {(f.__get__ if isinstance(f, (GetSetDescriptorType, property)) else f): handler for f in found}


# Attributes that are about the tensor's values; all others are questions (and torch sets some of its own).
_VALUES = ("data", "grad", "T", "H", "mT", "mH", "real", "imag", "__cuda_array_interface__")
_ATTRIBUTES = [
    f for name in dir(Tensor) if isinstance(f := getattr(Tensor, name), GetSetDescriptorType) and name not in _VALUES
]

# Wherever the logits stand among the arguments, and where they are the first.
_ANYWHERE = _named(_QUESTIONS, _ask) | _named(_CASTS, _cast) | _named(_ELEMENTWISE, _elementwise)
_ANYWHERE |= {f.__get__: _ask for f in _ATTRIBUTES} | {f.__set__: _ask for f in _ATTRIBUTES}
_ANYWHERE |= {getattr(Tensor, name).__set__: _refuse for name in ("data", "requires_grad", "grad")}
_ANYWHERE |= {torch.autograd.grad: _autograd_grad, torch.autograd.backward: _autograd_backward}
_METHODS = (
    _named(_IN_PLACE, _elementwise)
    | _named(_RESHAPES, _reshape)
    | _named(_VIEWS, _view)
    | _named(_NEW, _new)
    | _named(_REFUSED, _refuse)
    | _named("__getitem__", _getitem)
    | _named("__iter__", _iter)
    | _named("__repr__ __str__ __format__", _repr)
    | _named("register_hook", _register_hook)
    | _named("retain_grad", _retain_grad)
    | _named("grad", _grad)
    | _named("argmax max", _argmax_or_max)
    | _named("gather", _gather)
    | _named("sum mean", _sum_or_mean)
    | _named("logsumexp", _logsumexp)
    | _named("softmax log_softmax", _softmax)
    | _named("cross_entropy", _cross_entropy)
)
