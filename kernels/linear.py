"""Linear layers: x @ weight.T + bias, by whatever is fastest for the number of rows.

Knows tensors and plain `torch.nn.Linear` modules, no model and no batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ropeway.kernels.triton_linear import few_rows_linear, max_rows

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [..., K], weight [N, K], bias [N] or None) -> [..., N]."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] or None, all of one dtype and device -> [..., N] in that dtype."""
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    halves = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    fits = x.is_cuda and halves and inputs % 16 == 0 and weight.is_contiguous()
    if fits and 1 <= rows <= max_rows(weight.shape[0], weight.dtype):
        return few_rows_linear(x.reshape(rows, inputs), weight, bias).view(*x.shape[:-1], -1)
    return nn.functional.linear(x, weight, bias)


def use_fast_linears(model: nn.Module, product: Product = linear) -> Callable[[], None]:
    """Lets the plain linear layers of a model run through `product`; returns what undoes it.

    Plain = of the class `torch.nn.Linear` itself, with a forward that nobody replaced: layers of quantised weights,
    and those that accelerate moves between devices, stay as they are. Weights are looked up at each call.
    """
    swapped = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for module in swapped:
        vars(module)["forward"] = partial(_forward, module, product)

    def undo() -> None:
        for module in swapped:
            vars(module).pop("forward", None)

    return undo


def _forward(module: nn.Linear, product: Product, x: torch.Tensor) -> torch.Tensor:
    return product(x, module.weight, module.bias)
