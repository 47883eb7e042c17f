"""Linear layers on the CPU through oneDNN, their weights packed once in the order in which its kernels read them.

`F.linear` in fp32 goes to MKL, which on some processors has no kernels for their vectors, and packs the weight anew at
each call: a product of few rows then takes two to three times as long. Knows plain `torch.nn.Linear` modules, no model
and no batch.
"""

import platform
from collections import Counter
from types import MethodType

import torch
from torch import nn

PACKED_FOR_ROWS = 32
"""The order of a packed weight depends on a number of rows. Measured with 1 to 256: this one is the best for all but 1,
where it is as good as any; a weight packed for 1 row is 1.5 times as slow at 32."""

SMALL_WEIGHT = 1 << 18
FEW_ROWS = 16
"""Each of oneDNN's products has a price of its own, 12 us. A weight of fewer than `SMALL_WEIGHT` elements is left as it
is, and multiplied by fewer than so many rows in the ordinary way."""

BYTES_PER_THREAD = 1 << 20
"""Of the average weight: a core reads that in 50-100 us, and waking a thread that sleeps takes about half of it."""


def pack_linears(model: nn.Module) -> int:
    """Lets the plain linear layers of a model on the CPU run through oneDNN; returns how many.

    Plain = of the class `torch.nn.Linear` itself, with a forward that nobody replaced, in fp32, or bf16 where oneDNN
    has it. A weight is packed in place, one by one, so that no more than one is held twice; from then on it is an
    opaque tensor: only the layer's own forward can use it. A weight that somebody else reads too, as the embedding does
    with a tied one, stays as it is, and oneDNN reads it unpacked: at 4-32 rows 1.3-1.8 times as slow as packed, twice
    as fast as MKL. Elsewhere than on x86 nothing changes: nobody has measured it there.
    """
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    if not on_x86 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    readers = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    plain = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    for module in plain:
        small = module.weight.numel() < SMALL_WEIGHT
        if not small and readers[id(module.weight)] == 1:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), PACKED_FOR_ROWS)
            module.weight = nn.Parameter(packed, requires_grad=False)
        vars(module)["forward"] = MethodType(_forward_small if small else _forward, module)
    return len(plain)


def _is_plain(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.layout is torch.strided
        and (
            module.weight.dtype == torch.float32
            or (module.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features]; no rows are legal."""
    if x.numel() == 0:  # oneDNN knows no such product
        return x.new_empty(*x.shape[:-1], module.out_features)
    return _product(x, module.weight, module.bias, "none", [], "")  # type: ignore[no-any-return]


def _forward_small(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.numel() < FEW_ROWS * module.in_features:
        return nn.functional.linear(x, module.weight, module.bias)
    return _forward(module, x)


def threads_for(model: nn.Module, cores: int) -> int:
    """How many of the cores a decode step of this model is best computed on, at least 1.

    Small layers are computed in less time than it takes to share them out: on two cores that client and server use
    too, a step of 3.6 M parameters took 7-10 ms on two threads and 5 on one.
    """
    sizes = [module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear)]
    return max(1, min(cores, sum(sizes) // (BYTES_PER_THREAD * len(sizes)))) if sizes else cores


_product = torch.ops.mkldnn._linear_pointwise.default
