"""Linear layers with weights in FP8: e4m3, a scale per output channel; inputs are rounded to e4m3 too, a scale per row.

Knows plain `torch.nn.Linear` modules, no file and no request. Every row of x is rounded by itself, and by the same rule
whether few or many rows are multiplied, so that a batch does not change what a row says. Products are exact, sums are
fp32; on the CPU the same numbers are multiplied in fp32 (a reference, not faster).
"""

import torch
from torch import nn

from ropeway.kernels.errors import UnsupportedSetting
from ropeway.kernels.triton_linear import few_rows_linear, max_rows, round_rows

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ROUTERS = ("gate", "router")
"""Names of modules whose few outputs choose experts: rounding them changes the choice."""


class Fp8Linear(nn.Module):
    """x @ weight.T + bias with the weight rounded to e4m3."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_to_fp8(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return fp8_linear(x, self.weight, self.scale, self.bias)


def round_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R,K] -> e4m3 [R,K] and scales [R] fp32, such that their product is x but for rounding: the largest of a row
    becomes the largest number of e4m3."""
    scale = (x.abs().amax(1).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K] e4m3, scale [N] fp32, bias [N] or None -> [..., N] in x's dtype, bf16 on a GPU."""
    rows = x.reshape(-1, x.shape[-1])
    if not x.is_cuda:
        rounded, row_scale = round_to_fp8(rows)
        out = (rounded.float() @ weight.float().T * scale * row_scale[:, None]).to(x.dtype)
        out = out if bias is None else out + bias
    elif len(rows) == 0:
        out = x.new_empty(0, len(weight))
    else:
        rounded, row_scale = round_rows(rows)
        if len(rows) <= max_rows(len(weight), FP8):
            out = few_rows_linear(rounded, weight, bias, scales=(row_scale, scale), dtype=x.dtype)
        else:
            out = torch._scaled_mm(
                rounded, weight.T, scale_a=row_scale[:, None], scale_b=scale[None], out_dtype=x.dtype
            )
            out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


def check_fp8(device: torch.device, dtype: torch.dtype, device_map: str) -> None:
    """Raises UnsupportedSetting where FP8 weights cannot be multiplied."""
    if device_map != "none":
        raise UnsupportedSetting("--quantization fp8 keeps all layers on one device: leave --device-map out.")
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedSetting("--quantization fp8 needs a GPU of compute capability 8.9 or newer.")
    if dtype != torch.bfloat16:
        raise UnsupportedSetting("--quantization fp8 multiplies in bfloat16: say --dtype bfloat16.")


@torch.no_grad()
def quantise_to_fp8(model: nn.Module) -> int:
    """Rounds the plain linear layers of a model's blocks, in their places; returns how many.

    Blocks = what stands in a `ModuleList`: neither embeddings nor the output layer. Layers that choose experts stay,
    merged with others or not, and those whose sizes are no multiples of 16."""
    routers = _router_weights(model)
    count = 0
    for parent in [m for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for m in blocks.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or "forward" in vars(child):
                continue
            start = child.weight.data_ptr()
            if any(start <= weight < start + child.weight.nbytes for weight in routers):
                continue
            if child.in_features % 16 == 0 and child.out_features % 16 == 0:
                setattr(parent, name, Fp8Linear(child).eval())
                count += 1
    return count


def _router_weights(model: nn.Module) -> set[int]:
    """Where in memory the weights of routers are; one that was merged with others is a view of what they became."""
    weights: set[int] = set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if name in ROUTERS:
                own = getattr(child, "weight", None)
                weights |= {weight.data_ptr() for weight in child.parameters()}
                weights |= {own.data_ptr()} if isinstance(own, torch.Tensor) else set()
    return weights
