"""Matrix products of linear layers in float8, by torchao.

Weights, gradients and checkpoints stay what they are: inputs, weights and output gradients are scaled and cast for the three
products of a layer, each time anew (dynamic scaling, arXiv 2209.05433). The layer's own object stays in the module, with its
hooks; only its ``forward`` is replaced (of a row-wise linear with a bias the product alone), so ZeRO and pipelines know nothing
of it. On a tp rank scales are those of its part.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kenotron.models.autocast import compute_dtype
from kenotron.parallel.tensor import PRODUCT

#: The tensor cores want both sides of a matrix in multiples of it.
_MULTIPLE = 16
#: The first CUDA architectures with float8: Ada and Hopper.
_CAPABILITY = (8, 9)


@dataclass(frozen=True, kw_only=True)
class Float8:
    """Which products run in float8, and how they are scaled.

    Args:
        recipe: torchao's: ``"tensorwise"`` (one scale for a matrix: the fastest), ``"rowwise"`` (one for each row: closer), or
            ``"rowwise_with_gw_hp"`` (rows, and gradients of weights in the usual precision).
        skip: regular expressions; linear layers whose whole name within the block one of them matches stay as they are.
        emulate: compute with float8 numbers in the usual precision, anywhere: to try what they do to a training, not for speed.

    Raises:
        ValueError: an unknown recipe, or an expression that is none.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    skip: Sequence[str] = (r"(.*\.)?(gate|router)",)
    emulate: bool = False

    def __post_init__(self) -> None:
        recipes = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
        if self.recipe not in recipes:
            raise ValueError(f"float8 recipe={self.recipe!r} is unknown. Set one of {', '.join(map(repr, recipes))}.")
        for expression in self.skip:
            try:
                re.compile(expression)
            except re.error as error:
                problem = f"float8 skip={expression!r} is no regular expression: {error}. Escape it, or mend it."
                raise ValueError(problem) from None

    def check(self, device: torch.device) -> None:
        """Refuse hardware that has no float8.

        Raises:
            ValueError: it has none, or torchao is not installed.
        """
        if not self.emulate:
            found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
            if found is None or found < _CAPABILITY:
                what = "a CPU" if found is None else f"{torch.cuda.get_device_name(device)} ({found[0]}.{found[1]})"
                least = ".".join(map(str, _CAPABILITY))
                raise ValueError(
                    f"float8 needs a GPU of capability {least} or more (Ada, Hopper), and this is {what}. Leave it out, or try "
                    "its numbers by Float8(emulate=True)."
                )
        if importlib.util.find_spec("torchao") is None:
            raise ValueError("float8 runs on torchao, which is not installed: pip install 'kenotron[float8]'.")

    def apply(self, blocks: Sequence[nn.Module]) -> int:
        """Let the linear layers of blocks compute in float8. Returns how many do."""
        from torchao.float8 import Float8LinearConfig

        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=self.emulate)
        count = 0
        for block in blocks:
            for name, module in block.named_modules():
                if not self._takes(name, module):
                    continue
                if PRODUCT in module.__dict__:  # tensor parallelism sums what it gives, and adds the bias afterwards
                    module.__dict__[PRODUCT] = _in_float8(module, config, with_bias=False)
                else:
                    module.forward = _in_float8(module, config, with_bias=module.bias is not None)
                count += 1
        return count

    def _takes(self, name: str, module: nn.Module) -> bool:
        # Layers with a forward of their own (routers, convolutions) do more than multiply.
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            return False
        if "forward" in module.__dict__ and PRODUCT not in module.__dict__:
            return False
        fits = module.weight.numel() > 0 and all(size % _MULTIPLE == 0 for size in module.weight.shape)
        return fits and not any(re.fullmatch(expression, name) for expression in self.skip)


def _in_float8(module: nn.Linear, config: Any, *, with_bias: bool) -> Callable[[Tensor], Tensor]:
    from torchao.float8 import convert_to_float8_training

    stand_in = nn.Linear(module.in_features, module.out_features, with_bias, device="meta")
    layer = convert_to_float8_training(stand_in, config=config)

    def forward(x: Tensor) -> Tensor:
        product: Tensor = functional_call(layer, {"weight": module.weight}, (x.to(compute_dtype(x)),))
        return product

    def forward_with_bias(x: Tensor) -> Tensor:
        parameters = {"weight": module.weight, "bias": module.bias}
        product: Tensor = functional_call(layer, parameters, (x.to(compute_dtype(x)),))
        return product

    return forward_with_bias if with_bias else forward
