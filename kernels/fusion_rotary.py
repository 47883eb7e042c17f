"""Stand-ins for rotary embeddings: tables of cos and sin, once per forward, and the rotation of q and k in every layer.

As in `fusion_modules.py`, each is found by what it did in a recorded forward.
"""

import inspect
from collections.abc import Callable
from itertools import product
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ropeway.kernels.fused_ops import (
    Frequencies,
    Layout,
    Rotation,
    Unrotated,
    angle_tables,
    plain_angle_tables,
    plain_rotated,
    rotate_and_write,
)
from ropeway.kernels.fusion_deferred import Angles, Rotated, Uses, plain
from ropeway.kernels.fusion_modules import Recording, Undo, close, replace_forward, untouched


class RotaryCall:
    """Stands for a model's function (q, k, cos, sin) -> rotated q and k in one module; defers once it knows how."""

    def __init__(self, function: Callable[..., tuple[torch.Tensor, torch.Tensor]], uses: Uses) -> None:
        self.rotation: Rotation | None = None
        self._function = function
        self._uses = uses
        self._seen: tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        usual = not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == 3
        if usual and self.rotation is not None and q.shape[0] == cos.shape[0] == 1 and q.shape[2] == cos.shape[1]:
            angles = Angles(q, k, cos, sin, self.rotation, self._function)
            return Rotated(q, angles, 0, None, self._uses), Rotated(k, angles, 1, None, self._uses)
        q, k = plain((q, k))
        result = self._function(q, k, cos, sin, *args, **kwargs)
        if usual and self._seen is None:
            self._seen = [q, k, cos, sin], result
        return result

    def learn(self) -> bool:
        """Find the rotation that does what the recorded call did; whether there is one."""
        if self._seen is None:
            return False
        (q, k, cos, sin), (q_right, k_right) = self._seen
        self._seen = None
        width, head = cos.shape[-1], q.shape[-1]
        if q.shape[0] != 1 or k.shape[1] == 0 or q_right.shape != q.shape or q_right.dtype != q.dtype:
            return False
        for pairs, step in ((width // 2, 1), (width // 2, 2), (width, 1)):
            for interleaved in (False, True):
                rotation = Rotation(pairs, step, interleaved)
                if not 0 < 2 * pairs <= head:
                    continue
                found = plain_rotated(Unrotated(q[0].transpose(0, 1), None), cos[0], sin[0], rotation)
                if close(found.transpose(0, 1), q_right[0]):
                    self.rotation = rotation if _rotates(rotation, (q, k, cos, sin), (q_right, k_right)) else None
                    return self.rotation is not None
        return False


def _rotates(
    rotation: Rotation,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    right: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Whether this rotation gives the right q and k."""
    q, k, cos, sin = (tensor[0] for tensor in given)
    tokens = q.shape[1]
    pools = [k.new_zeros(1, tokens, k.shape[0], k.shape[2]) for _ in range(2)]
    heads = Unrotated(q.transpose(0, 1), None), Unrotated(k.transpose(0, 1), None)
    slots = torch.arange(tokens, device=q.device)
    out = rotate_and_write(*heads, k.transpose(0, 1), cos, sin, rotation, slots, pools[0], pools[1])
    return close(out.transpose(0, 1), right[0][0]) and close(pools[0][0].transpose(0, 1), right[1][0])


def rotary_calls(model: nn.Module, uses: Uses) -> tuple[list[RotaryCall], Undo]:
    """Put a `RotaryCall` in the place of the rotation that a module's forward calls by a global name.

    Each such module gets a copy of its forward with globals of its own, so that nothing outside it changes.
    """
    calls, undos = [], []
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__") or not untouched(module):
            continue
        names = [name for name in forward.__code__.co_names if _is_rotation(forward.__globals__.get(name))]
        if len(names) != 1:
            continue
        call = RotaryCall(forward.__globals__[names[0]], uses)
        scope = forward.__globals__ | {names[0]: call}
        copy = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        undos.append(replace_forward(module, MethodType(copy, module)))
        calls.append(call)

    def undo() -> None:
        for each in undos:
            each()

    return calls, undo


def _is_rotation(value: Any) -> bool:
    return isinstance(value, FunctionType) and list(inspect.signature(value).parameters)[:4] == ["q", "k", "cos", "sin"]


# --- cos and sin


def table_forwards(recording: Recording, max_model_len: int) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards in one launch for modules (x, position_ids, ...) -> cos and sin; others are left out.

    max_model_len: tokens; each is tried at positions up to there.
    """
    known: dict[nn.Module, dict[Any, Frequencies]] = {}
    for module, args, kwargs, output in recording.others:
        positions, key = _table_call(args, kwargs)
        if positions is None or not untouched(module) or key in known.get(module, {}):
            continue
        frequencies = _find_frequencies(module, args, kwargs, output, max_model_len)
        if frequencies is not None:
            known.setdefault(module, {})[key] = frequencies
    return {module: _table_forward(module, found) for module, found in known.items()}


def _table_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, Any]:
    """Positions [B,N] of a call (None if it is of another kind), and what else it was told, which may change tables."""
    rest = dict(kwargs)
    positions = args[1] if len(args) > 1 else rest.pop("position_ids", None)
    told = (*args[2:], *rest.values())
    usual = len(args) > 0 and isinstance(args[0], torch.Tensor) and isinstance(positions, torch.Tensor)
    if not usual or positions.dim() != 2 or not all(value is None or isinstance(value, str) for value in told):
        return None, None
    return positions, told


def _find_frequencies(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, max_model_len: int
) -> Frequencies | None:
    if not isinstance(output, tuple) or len(output) != 2 or any(True for _ in module.parameters()):
        return None
    cos = output[0]
    spread = torch.linspace(0, max_model_len - 1, 64, device=cos.device).long()[None]
    if len(args) > 1:
        args = args[0], spread, *args[2:]
    else:
        kwargs = kwargs | {"position_ids": spread}
    right = module(*args, **kwargs)
    scalings = {1.0, *(value for value in vars(module).values() if isinstance(value, float))}
    for inverse in module.buffers():
        if inverse.dim() != 1 or inverse.dtype != torch.float32:
            continue
        layouts: tuple[Layout, ...] = ("once",) if len(inverse) == cos.shape[-1] else ("halves", "repeated")
        for layout, scaling in product(layouts, scalings):
            found = Frequencies(inverse, scaling, layout)
            if found.width == cos.shape[-1] and close(plain_angle_tables(spread, found, cos.dtype)[0], right[0]):
                tables = angle_tables(spread, found, cos.dtype)
                return found if all(map(close, tables, right)) else None
    return None


def _table_forward(module: nn.Module, known: dict[Any, Frequencies]) -> Callable[..., Any]:
    plainly = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        positions, key = _table_call(args, kwargs)
        if positions is None or key not in known:
            return plainly(*args, **kwargs)
        return angle_tables(positions, known[key], args[0].dtype)

    return forward
