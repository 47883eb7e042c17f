"""Modules that stand in for transformers' own, and what a plain forward showed of those.

A stand-in computes what the module computes, in fewer launches, or hands on a deferred value (`fusion_deferred.py`).
Nothing is known of a module's class or name: what one does is read off its inputs and outputs in a recorded forward,
and off its answers to inputs made up for the purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ropeway.kernels.fused_ops import Activation, Norm, activate, normalised, plain_normalised
from ropeway.kernels.fusion_deferred import Normed, Sum, Uses, plain

Undo = Callable[[], None]


@dataclass(slots=True)
class Recording:
    """What modules without children did during plain forwards, in their order."""

    calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Input and output of the first call, of modules with one tensor each."""
    others: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    """Every call of the other modules: arguments and output."""

    def watch(self, model: nn.Module) -> Undo:
        """Record from now on; returns what ends it."""
        leaves = [module for module in model.modules() if not any(module.children())]
        handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in leaves]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            self.calls.setdefault(module, (args[0], output))
        else:
            self.others.append((module, args, kwargs, output))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Give one module another forward; returns what takes it back."""
    vars(module)["forward"] = forward

    def undo() -> None:
        vars(module).pop("forward", None)

    return undo


def untouched(module: nn.Module) -> bool:
    """Whether the module runs its class's forward: nobody replaced it (accelerate does, and so do quantised layers)."""
    return "forward" not in vars(module) and not hasattr(module, "_hf_hook")


def close(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal but for a few roundings at the scale of the largest number."""
    if found.shape != right.shape or found.dtype != right.dtype:
        return False
    gap = (found.float() - right.float()).abs().max()
    return bool(gap <= 4 * torch.finfo(right.dtype).eps * right.float().abs().max())


# --- linear layers with one input


class Slice(nn.Module):
    """One of several linear layers that get the same input. The first to get it computes them all, as one product."""

    def __init__(self, shared: "_Shared", index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self.in_features = shared.in_features
        self.out_features = shared.widths[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., out_features], a view of the product of all."""
        return self._shared.parts(self._shared.product(x), -1)[self._index]

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, K], a view."""
        return self._shared.parts(self._shared.merged.weight, 0)[self._index]

    @property
    def bias(self) -> torch.Tensor | None:
        """[out_features], a view."""
        bias = self._shared.merged.bias
        return None if bias is None else self._shared.parts(bias, 0)[self._index]


class _Shared:
    """What the slices of one product share. The product lives until each slice was asked once for its input."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.widths = [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        self._home: Slice | None = None
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._left = 0

    def live_in(self, home: Slice, merged: nn.Linear) -> None:
        """The merged layer is a child of one slice, so that whoever walks over the model finds it, once."""
        self._home = home
        home.merged = merged

    @property
    def merged(self) -> Any:
        """The layer as it is now: it may have been replaced by one of the same shape."""
        assert self._home is not None
        return self._home.merged

    def parts(self, whole: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """Views of what belongs to each layer."""
        return torch.split(whole, self.widths, dim)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Of x with all weights; computed when x is another tensor than last time."""
        if x is not self._input or self._product is None:
            self._input, self._product, self._left = x, self.merged(x), len(self.widths)
        product = self._product
        self._left -= 1
        if self._left == 0:
            self._input = self._product = None
        return product


def siblings(model: nn.Module, recording: Recording) -> list[list[nn.Linear]]:
    """Plain linear layers of one parent that got the very same tensor."""
    groups: dict[tuple[int, int], list[nn.Linear]] = {}
    for parent in model.modules():
        for child in parent.children():
            if type(child) is nn.Linear and child in recording.calls and untouched(child):
                groups.setdefault((id(parent), id(recording.calls[child][0])), []).append(child)
    return [
        group
        for group in groups.values()
        if len(group) > 1 and len({(linear.bias is None, linear.weight.dtype) for linear in group}) == 1
    ]


@torch.no_grad()
def merge(model: nn.Module, linears: list[nn.Linear]) -> tuple[list[Slice], Undo]:
    """Put slices of one product in the layers' places; their weights become views of the merged one."""
    homes = {
        child: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child in linears
    }
    merged = nn.Linear(1, 1, bias=False, device="meta")
    merged.in_features, merged.out_features = linears[0].in_features, sum(linear.out_features for linear in linears)
    merged.weight = _merged([linear.weight for linear in linears])
    if linears[0].bias is not None:
        merged.bias = _merged([linear.bias for linear in linears])
    shared = _Shared(linears)
    slices = [Slice(shared, index) for index in range(len(linears))]
    shared.live_in(slices[0], merged.eval())
    for linear, piece in zip(linears, slices, strict=True):
        setattr(*homes[linear], piece.eval())
    if merged.weight.is_cuda:
        torch.cuda.empty_cache()  # the pieces just freed are too small for the next product

    def undo() -> None:
        for linear in linears:
            setattr(*homes[linear], linear)

    return slices, undo


def _merged(parameters: list[torch.Tensor]) -> nn.Parameter:
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return nn.Parameter(whole, requires_grad=False)


# --- norms and activations


def find_norm(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Norm | None:
    """How a module that gave y [..., D] for x normalises; None if it does something else, or has no weight."""
    parameters = list(module.parameters())
    if len(parameters) not in (1, 2) or y.dtype != x.dtype or y.shape != x.shape or any(True for _ in module.buffers()):
        return None
    if any(parameter.shape != x.shape[-1:] or parameter.dtype != x.dtype for parameter in parameters):
        return None
    epsilons = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.01]
    made_up = torch.cat([_made_up(x) * scale for scale in (1e-3, 1, 30)])
    cases = [(x, y), (made_up, module(made_up))]
    # The parameters themselves, which move with their module.
    weight, bias = parameters[0], parameters[1] if len(parameters) == 2 else None
    kinds = [(0.0, True, True), (1.0, True, True)]
    if bias is None:
        kinds += [(0.0, False, False), (0.0, True, False), (1.0, True, False)]
    found = []
    for eps in dict.fromkeys(epsilons):
        for offset, late, centred in kinds:
            norm = Norm(weight, eps, offset, late, centred, bias)
            answers = [(plain_normalised(given, norm)[0].float(), right.float()) for given, right in cases]
            found.append((sum(float((answer - right).abs().mean()) for answer, right in answers), norm))
    best = min(found, key=lambda pair: pair[0])[1] if found else None
    if best is None or not all(close(normalised(given, best)[0], right) for given, right in cases):
        return None
    return best


def _made_up(x: torch.Tensor) -> torch.Tensor:
    """[2, D], the same for every x of a width; rows of different size."""
    angle = torch.arange(2 * x.shape[-1], device=x.device, dtype=torch.float32).view(2, -1)
    return ((12.9898 * angle).sin() * 1.7).to(x.dtype)


def norm_forward(norm: Norm, uses: Uses) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm in one launch; of a `Sum` together with the addition, RMSNorm of heads only when somebody wants it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, Sum):
            return x.normed(norm)
        if x.dim() == 4 and not norm.centred:
            return Normed(plain(x), norm, uses)
        return normalised(plain(x), norm)[0]

    return forward


def find_activation(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Activation | None:
    """Which activation a module that gave y for x is; None if it is none of ours."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    made_up = _made_up(x) * 2
    kinds: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
    right = None if x.shape != y.shape or x.dtype != y.dtype else module(made_up)
    for kind in kinds:
        if isinstance(right, torch.Tensor) and close(activate(made_up, kind), right) and close(activate(x, kind), y):
            return kind
    return None
