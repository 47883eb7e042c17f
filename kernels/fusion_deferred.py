"""Tensors whose value is not computed yet: what is done with them next decides which kernel computes them.

A fused module returns one of these instead of launching a kernel of its own. transformers' code goes on with it as with
any tensor; the operation that completes a known pair runs both in one launch, and every other operation gets the value,
computed as it would have been:

    Sum         a + b                      then a norm: one launch gives the sum and its norm
    Activated   activation(gate)           then * up: one launch
    Normed      RMSNorm of each head       then a rotation, by `Rotated`
    Rotated     q or k with its angles     then our attention: rotation and KV write in one launch

So nothing needs to be known of the code in between, and code that does something else stays right. Knows operations,
no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ropeway.kernels.fused_ops import Activation, Norm, Rotation, Unrotated, activate, gated, normalised

_METADATA = frozenset(
    {
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "is_cuda", "ndim", "requires_grad")
        ),
        *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point),
    }
)
"""What is known without the value."""
_ADD = frozenset({torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__})
_MULTIPLY = frozenset({torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__})


@dataclass(slots=True)
class Uses:
    """How often one kind of deferred value ended in a fused launch, and how often in plain operations."""

    fused: int = 0
    plain: int = 0


class Deferred(torch.Tensor):
    """A value to come, with the shape, dtype and device of the tensor `like`. It has no storage."""

    _value: torch.Tensor | None
    _uses: Uses

    @staticmethod
    def __new__(cls, like: torch.Tensor, *args: Any) -> "Deferred":
        # torch does not type this one
        new: Deferred = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        return new

    def compute(self) -> torch.Tensor:
        """The value, by plain operations."""
        raise NotImplementedError

    def then(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that this one fuses with; NotImplemented for any other."""
        return NotImplemented

    def value(self) -> torch.Tensor:
        """The value, computed once."""
        if self._value is None:
            self._uses.plain += 1
            self._value = self.compute()
        return self._value

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args)
            kwargs = kwargs or {}
            for arg in args[0] if args and isinstance(args[0], (tuple, list)) else args:
                result = arg.then(function, args, kwargs) if isinstance(arg, Deferred) else NotImplemented
                if result is not NotImplemented:
                    return result
            return function(*plain(args), **plain(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is no class method
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*plain(args), **plain(kwargs or {}))


def plain(values: Any) -> Any:
    """Arguments of any nesting with the deferred tensors in them computed."""
    if isinstance(values, Deferred):
        return values.value()
    if type(values) in (tuple, list):
        return type(values)(plain(value) for value in values)
    if type(values) is dict:
        return {name: plain(value) for name, value in values.items()}
    return values


class Sum(Deferred):
    """a + b, of one shape and dtype. One whose value is known starts the chain: adding to it gives another Sum."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor | None, uses: Uses) -> None:
        self._value = a if b is None else None
        self._terms = None if b is None else (a, b)
        self._uses = uses

    def compute(self) -> torch.Tensor:
        assert self._terms is not None
        a, b = self._terms
        self._terms = None
        return a + b

    def then(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function not in _ADD or kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
            return NotImplemented
        a, b = plain(args)
        if a.shape != b.shape or a.dtype != b.dtype:
            return NotImplemented
        return Sum(a, b, self._uses)

    def normed(self, norm: Norm) -> torch.Tensor:
        """The norm of the value; computes the value on the way if it is still to come."""
        if self._terms is None:
            return normalised(self.value(), norm)[0]
        self._uses.fused += 1
        result, self._value = normalised(self._terms[0], norm, self._terms[1])
        self._terms = None  # they are not wanted any more, and large
        return result


class Activated(Deferred):
    """activation(gate)."""

    def __init__(self, gate: torch.Tensor, activation: Activation, uses: Uses) -> None:
        self._value = None
        self._gate = gate
        self._activation = activation
        self._uses = uses

    def compute(self) -> torch.Tensor:
        return activate(self._gate, self._activation)

    def then(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function not in _MULTIPLY or kwargs or self._value is not None:
            return NotImplemented
        up = args[1] if args[0] is self else args[0]
        if not isinstance(up, torch.Tensor) or up.shape != self._gate.shape or up.dtype != self._gate.dtype:
            return NotImplemented
        self._uses.fused += 1
        return gated(self._gate, plain(up), self._activation)


class Normed(Deferred):
    """RMSNorm over the last of x's four dimensions, for heads that are about to be rotated."""

    def __init__(self, x: torch.Tensor, norm: Norm, uses: Uses) -> None:
        self._value = None
        self.x = x
        self.spec = norm
        self._uses = uses

    def compute(self) -> torch.Tensor:
        return normalised(self.x, self.spec)[0]

    def then(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is not torch.Tensor.transpose or args[1:] != (1, 2):
            return NotImplemented
        return Normed(self.x.transpose(1, 2), self.spec, self._uses)


@dataclass(slots=True)
class Angles:
    """One call of a model's rotation: both q and k of a layer."""

    q: torch.Tensor
    """[1,Hq,N,D], perhaps `Normed`."""
    k: torch.Tensor
    """[1,Hkv,N,D], likewise."""
    cos: torch.Tensor
    """[1,N,W]."""
    sin: torch.Tensor
    rotation: Rotation
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """The model's own."""
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def plainly(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both rotated by the model's own function, once."""
        if self.outputs is None:
            self.outputs = self.function(*plain((self.q, self.k, self.cos, self.sin)))
        return self.outputs


class Rotated(Deferred):
    """q (side 0) or k (side 1) of `angles`; `rest` are numbers of each head that were set aside and come after them."""

    def __init__(self, like: torch.Tensor, angles: Angles, side: int, rest: torch.Tensor | None, uses: Uses) -> None:
        self._value = None
        self.angles = angles
        self._side = side
        self._rest = rest
        self._like = like
        self._uses = uses

    def compute(self) -> torch.Tensor:
        rotated = self.angles.plainly()[self._side]
        return rotated if self._rest is None else torch.cat((rotated, self._rest), dim=-1)

    def then(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is not torch.cat or len(args[0]) != 2 or args[0][0] is not self or kwargs != {"dim": -1}:
            return NotImplemented
        return self._widened(args[0][1])

    def _widened(self, rest: torch.Tensor) -> Any:
        """Together with the numbers that follow in memory, if these are them."""
        x = self._like
        if isinstance(x, Deferred) or isinstance(rest, Deferred) or self._rest is not None:
            return NotImplemented
        follows = rest.data_ptr() == x.data_ptr() + x.shape[-1] * x.element_size()
        if not follows or rest.stride() != x.stride() or rest.shape[:-1] != x.shape[:-1]:
            return NotImplemented
        whole = x.as_strided((*x.shape[:-1], x.shape[-1] + rest.shape[-1]), x.stride(), x.storage_offset())
        return Rotated(whole, self.angles, self._side, rest, self._uses)

    def pairs_with(self, k: "Rotated") -> bool:
        """Whether these are q and k of one call, so that one launch can rotate both."""
        if self.angles is not k.angles or (self._side, k._side) != (0, 1):
            return False
        mine, other = self._unrotated(), k._unrotated()
        alike = mine.norm is other.norm if mine.norm is None or other.norm is None else mine.norm.like(other.norm)
        return alike and mine.x.shape[2] == other.x.shape[2] and mine.x.stride(2) == other.x.stride(2) == 1

    def taken(self) -> Unrotated:
        """What a fused launch starts from; the launch is counted."""
        self._uses.fused += 1
        return self._unrotated()

    def _unrotated(self) -> Unrotated:
        x, norm = (self._like.x, self._like.spec) if isinstance(self._like, Normed) else (self._like, None)
        return Unrotated(plain(x)[0].transpose(0, 1), norm)
