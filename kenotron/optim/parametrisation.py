"""Initial weights and learning rates that follow from a model's sizes, so that what is tuned on a small one holds for a large.

``"spectral_mup"`` is the maximal-update parametrisation in the form of Yang, Simon and Bernstein, *A Spectral Condition for
Feature Learning*, arXiv 2310.17813. For a matrix from n inputs to m outputs:

- initial standard deviation 1/√n · min(1, √(m/n))                                    (Parametrization 1)
- learning rate lr · m/n for SGD (Parametrization 1), lr · base_width/n for Adam: the elements of Adam's update are of size 1
  whatever the gradient's, so its spectral norm is about √(n·m), and 1/n brings it to the √(m/n) that the condition asks for.

Everything else is a matrix from one input to m outputs: embeddings (one-hot inputs; standard deviation 1), gains of norms and
biases (which begin as ones and zeros). Adam: lr. SGD: lr · m/base_width. At ``base_width`` inputs every rate is about lr, which
is therefore what a model of that width was tuned to. Layers in one matrix (queries, keys and values) have each their own m; so
has every expert. The scale of attention stays 1/√head_dim, since an exported model could not say otherwise: let widths differ
in the number of heads, not in their size.

Nothing depends on the layout: weights are made module by module at full size (see ``kenotron.parallel.init``), and factors of
rates are noted on the modules, where `parameter_groups` finds them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.models.mixer import OutProjection, TimeStep
from kenotron.optim.weights import LR_SCALES, Weight, find_weights
from kenotron.parallel.init import has_initialiser, set_initialiser

Scheme = Literal["standard", "spectral_mup"]
Updates = Literal["adam", "sgd"]

#: Names of the layers that write to the residual stream, in our models and in transformers'.
RESIDUAL = r"\.(o_proj|out_proj|down_proj|c_proj|wo|w2|fc2|fc_out|dense_4h_to_h|attention\.dense|output\.dense)(\.weight)?$"


@dataclass(frozen=True, kw_only=True)
class Parametrised:
    """What became of one weight.

    Args:
        stds: initial standard deviation of each layer in it; empty: its module initialises it as ever.
        scale: what depth scaling multiplies the initial weight with, included in ``stds``.
        lr_scale: factor of its learning rate.
    """

    stds: tuple[float, ...] = ()
    scale: float = 1.0
    lr_scale: float = 1.0


def spectral_std(fan_in: int, fan_out: int) -> float:
    """Return the initial standard deviation of a matrix, 1/√fan_in · min(1, √(fan_out/fan_in))."""
    return fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5)


def spectral_lr_scale(fan_in: int, fan_out: int, optimizer: Updates = "adam", base_width: int = 256) -> float:
    """Return the factor of the learning rate of a matrix: base_width / fan_in for Adam, fan_out / fan_in for SGD."""
    return base_width / fan_in if optimizer == "adam" else fan_out / fan_in


def parametrise(
    model: nn.Module,
    scheme: Scheme = "spectral_mup",
    *,
    optimizer: Updates = "adam",
    base_width: int = 256,
    depth_scaling: bool = False,
    residual: str = RESIDUAL,
) -> dict[str, Parametrised]:
    """Say how the weights of ``model`` begin and at which rates they learn. Call it right after building the model.

    Weights that exist are made anew at once; those on the meta device (``configure_model``) when the strategy makes them. Rates
    reach the optimizer through `parameter_groups` and `muon_groups`; Muon's own adjustment takes their place for its matrices.

    Args:
        model: any module; what matrices are, `kenotron.optim.weights` says.
        scheme: ``"standard"`` leaves weights and rates as the model has them.
        optimizer: ``"adam"`` for all that normalise their updates, or ``"sgd"``.
        base_width: the number of inputs at which rates are as given; of a Llama, the hidden size that they were tuned at.
        depth_scaling: multiply what writes to the residual stream by 1/√(number of branches), which is 1/√(2·layers) with
            attention and MLP (GPT-2, section 2.3). Initial weights only.
        residual: regular expression for the names of those weights.

    Returns:
        What became of each weight, by name.

    Raises:
        ValueError: an embedding tied to the head, whose two roles want two scales; layers in one matrix that want several
            rates (SGD); a model that has been sharded or parametrised before; depth scaling where nothing matches, or twice.
    """
    if scheme not in ("standard", "spectral_mup"):
        raise ValueError(f"scheme={scheme!r}: set 'standard' or 'spectral_mup'.")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer={optimizer!r}: set 'adam' (also for AdamW, Lion, Muon) or 'sgd'.")
    if not isinstance(base_width, int) or isinstance(base_width, bool) or base_width < 1:
        raise ValueError(f"base_width={base_width!r} is no number of inputs. Set an integer of 1 or more.")
    weights = find_weights(model)
    _check_fresh(model, weights)
    depth = _depth_scales(weights, residual) if depth_scaling else {}
    fills: dict[int, tuple[nn.Module, _Fill]] = {}
    found: dict[str, Parametrised] = {}
    for weight in weights:
        scale = depth.get(weight.name, 1.0)
        done = Parametrised(scale=scale)
        if scheme == "spectral_mup":
            done = _spectral(weight, scale, optimizer, base_width)
        elif scale != 1.0:
            _check_unscaled(weight)
        found[weight.name] = done
        for module, key in weight.uses:
            fill = fills.setdefault(id(module), (module, _Fill()))[1]
            fill.add(module, key, weight, done, zero=scheme == "spectral_mup")
            if scheme == "spectral_mup":
                module.__dict__.setdefault(LR_SCALES, {})[key] = done.lr_scale
    for module, fill in fills.values():
        if fill.steps:
            set_initialiser(module, fill)
    return found


def _check_fresh(model: nn.Module, weights: Sequence[Weight]) -> None:
    if any(has_initialiser(module) or LR_SCALES in module.__dict__ for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} has been parametrised before. Build it anew, and call parametrise once.")
    if "_kenotron" in model.__dict__ or any(isinstance(w.param, DTensor) or not w.param.numel() for w in weights):
        raise ValueError(
            f"this {type(model).__name__} has been sharded. Call parametrise where it is built: in __init__ or configure_model."
        )


# ---- Spectral ---------------------------------------------------------------------------------------------------------


def _spectral(weight: Weight, scale: float, optimizer: Updates, base_width: int) -> Parametrised:
    if weight.kind == "embedding" and _is_tied_head(weight):
        raise ValueError(
            f"{weight.name} is embedding and head in one: as the first it wants weights of size 1, as the second of size "
            "1/√width. Set tie_word_embeddings=False in the configuration, or scheme='standard'."
        )
    if weight.kind in ("matrix", "experts", "head"):
        fan_in, fans_out = _fans(weight)
        rates = {spectral_lr_scale(fan_in, fan_out, optimizer, base_width) for fan_out in fans_out}
        if len(rates) > 1:
            raise ValueError(
                f"{weight.name} is layers of {', '.join(map(str, fans_out))} outputs in one, for which optimizer='sgd' wants "
                "rates of their own. Set optimizer='adam', or use as many KV heads as heads, or transformers' own model."
            )
        return Parametrised(
            stds=tuple(scale * spectral_std(fan_in, fan_out) for fan_out in fans_out), scale=scale, lr_scale=rates.pop()
        )
    is_own = weight.kind == "other" and len(weight.shape) != 1  # scalars, convolutions, decays: of no width
    rate = 1.0 if optimizer == "adam" or is_own else weight.shape[-1] / base_width
    return Parametrised(stds=(1.0,) if weight.kind == "embedding" else (), lr_scale=rate)


def _is_tied_head(weight: Weight) -> bool:
    return any(not isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in weight.uses) and len(weight.uses) > 1


def _fans(weight: Weight) -> tuple[int, tuple[int, ...]]:
    """Return the inputs of a matrix, and the outputs of each layer in it."""
    outputs, inputs = weight.shape[-2:][::-1] if weight.transposed else weight.shape[-2:]
    return inputs, weight.parts or (outputs,)


# ---- Depth ------------------------------------------------------------------------------------------------------------


def _depth_scales(weights: Sequence[Weight], residual: str) -> dict[str, float]:
    """Return 1/√branches for each weight that writes to the residual stream."""
    try:
        pattern = re.compile(residual)
    except re.error as error:
        raise ValueError(f"residual={residual!r} is no regular expression: {error}.") from None
    names = [w.name for w in weights if w.kind in ("matrix", "experts") and pattern.search(w.name)]
    if not names:
        raise ValueError(
            f"depth_scaling=True: no weight's name matches residual={residual!r}. Set it to a regular expression for the "
            "layers that write to the residual stream."
        )
    # A branch is a child of a block; a mixture and the experts that all tokens pass are one.
    branches = {m.group(0) if (m := re.match(r".*?\.\d+\.[^.]+", "." + name)) else name for name in names}
    return dict.fromkeys(names, len(branches) ** -0.5)


def _check_unscaled(weight: Weight) -> None:
    if any(isinstance(module, OutProjection) and module.scale != 1.0 for module, _ in weight.uses):
        raise ValueError(
            f"depth_scaling=True, but {weight.name} is scaled with depth already: config.rescale_prenorm_residual=True. Set "
            "one of them to False."
        )


# ---- Filling ----------------------------------------------------------------------------------------------------------


@dataclass
class _Fill:
    """Changes the parameters of one module after its own initialiser: at full size, wherever that is done."""

    steps: list[tuple[str, str, tuple[float, ...], tuple[tuple[int, int, int], ...]]] = field(default_factory=list)

    def add(self, module: nn.Module, key: str, weight: Weight, done: Parametrised, *, zero: bool) -> None:
        """Note what becomes of one parameter."""
        if done.stds:
            dim = max(len(weight.shape) - (1 if weight.transposed or len(weight.shape) < 2 else 2), 0)
            parts = weight.parts if len(weight.parts) == len(done.stds) and weight.parts else (weight.shape[dim],)
            starts = itertools.accumulate(parts, initial=0)
            boxes = tuple((dim, start, length) for start, length in zip(starts, parts, strict=False))
            self.steps.append((key, "normal", done.stds, boxes))
        elif done.scale != 1.0:
            self.steps.append((key, "scale", (done.scale,), ()))
        elif zero and weight.kind == "bias" and isinstance(module, nn.Linear) and not isinstance(module, TimeStep):
            self.steps.append((key, "scale", (0.0,), ()))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Fill the parameters of ``module``, or of a copy of it."""
        for key, what, values, boxes in self.steps:
            param = module._parameters[key]
            assert param is not None
            if what == "scale":
                param.zero_() if values[0] == 0.0 else param.mul_(values[0])
                continue
            for std, box in zip(values, boxes, strict=True):
                param.narrow(*box).normal_(0.0, std)
            self._keep_padding(module, param)

    def _keep_padding(self, module: nn.Module, param: Tensor) -> None:
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and padding is not None:
            param[padding].zero_()
