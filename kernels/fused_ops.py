"""The operations that fused modules call: one launch each on a GPU, plain torch elsewhere, which is their reference.

Knows tensors; which module of a model does what is `fusion.py`'s.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ropeway.kernels import triton_mlp, triton_norm, triton_rope
from ropeway.kernels.fp8_cache import Scales, put

Activation = Literal["silu", "gelu", "gelu_tanh"]
Layout = Literal["halves", "repeated", "once"]


@dataclass(slots=True, frozen=True)
class Norm:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), and the conventions in which models differ."""

    weight: torch.Tensor
    """[D], contiguous."""
    eps: float
    offset: float
    """1 where the weight is stored as its difference from one (Gemma), else 0."""
    late: bool
    """Rounded to the input's dtype only after the weight; else before it as well."""
    centred: bool = False
    """LayerNorm: the mean is taken away first."""
    bias: torch.Tensor | None = None
    """[D], contiguous; added after the weight. Only where `late`."""

    def like(self, other: "Norm") -> bool:
        """Whether the two differ in their weights alone."""
        return (self.eps, self.offset, self.late) == (other.eps, other.offset, other.late)


@dataclass(slots=True, frozen=True)
class Frequencies:
    """Angles of the rotation: position * inverse[i], whose cos and sin are then scaled (YaRN, arXiv:2309.00071)."""

    inverse: torch.Tensor
    """[P] fp32."""
    scaling: float
    layout: Layout
    """Columns of pair i: i and P + i, or 2 i and 2 i + 1, or i alone."""

    @property
    def width(self) -> int:
        """Columns of the tables."""
        return len(self.inverse) * (1 if self.layout == "once" else 2)


@dataclass(slots=True, frozen=True)
class Rotation:
    """Which numbers of a head form pairs, and where their angles stand in cos and sin (RoPE, arXiv:2104.09864)."""

    pairs: int
    """The first 2 * pairs numbers of a head are rotated."""
    step: int
    """cos and sin of pair i stand in column i * step."""
    interleaved: bool
    """Pair i is numbers 2 i and 2 i + 1; else i and pairs + i."""


@dataclass(slots=True, frozen=True)
class Unrotated:
    """Queries or keys as the rotation finds them."""

    x: torch.Tensor
    """[N,heads,D]."""
    norm: Norm | None
    """Still to be applied to each head."""


def normalised(x: torch.Tensor, norm: Norm, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x + residual, x + residual); x [..., D] and residual of one dtype. Without a residual the sum is x."""
    if _on_gpu(x):
        return triton_norm.normalise(x, norm, residual)
    return plain_normalised(x, norm, residual)


def plain_normalised(
    x: torch.Tensor, norm: Norm, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `normalised`, in torch."""
    total = x if residual is None else x + residual
    wide = total.float()
    if norm.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if not norm.late:
        wide = wide.to(x.dtype).float()
    wide = wide * (norm.offset + norm.weight.float())
    return (wide if norm.bias is None else wide + norm.bias.float()).to(x.dtype), total


def angle_tables(
    positions: torch.Tensor, frequencies: Frequencies, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), [B,N,width] each, of positions [B,N] int64; computed in fp32, rounded to dtype once."""
    if _on_gpu(positions):
        return triton_rope.angle_tables(positions, frequencies, dtype)
    return plain_angle_tables(positions, frequencies, dtype)


def plain_angle_tables(
    positions: torch.Tensor, frequencies: Frequencies, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `angle_tables`, in torch."""
    angles = positions[..., None].float() * frequencies.inverse
    if frequencies.layout != "once":
        halves = frequencies.layout == "halves"
        angles = torch.cat((angles, angles), dim=-1) if halves else angles.repeat_interleave(2, dim=-1)
    cos, sin = ((table * frequencies.scaling).to(dtype) for table in (angles.cos(), angles.sin()))
    return cos, sin


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up, [..., I] each."""
    if _on_gpu(gate):
        return triton_mlp.gated(gate, up, activation)
    return activate(gate, activation) * up


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation alone, in x's dtype."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def rotate_and_write(
    q: Unrotated,
    k: Unrotated,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation: Rotation,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scales: Scales = Scales(),  # noqa: B008  # frozen
) -> torch.Tensor:
    """Normalise and rotate q and k, store k and v.

    Args:
        q: N tokens.
        k: the same tokens, of q's dtype and head size.
        v: [N,Hkv,Dv].
        cos: [N,W], of any floating dtype.
        sin: like cos.
        rotation: how.
        slots: [N] int64, where in the pools each token's K and V go.
        k_pool: [num_blocks,block_size,Hkv,D], contiguous.
        v_pool: [num_blocks,block_size,Hkv,Dv], contiguous.
        scales: of the pools, if they are in FP8.

    Returns:
        The rotated q [N,Hq,D], contiguous. Pairs are rotated in fp32 and rounded once.
    """
    if _on_gpu(q.x):
        return triton_rope.rotate_and_write(q, k, v, cos, sin, rotation, slots, k_pool, v_pool, scales)
    put(k_pool, slots, plain_rotated(k, cos, sin, rotation), scales.k)
    put(v_pool, slots, v, scales.v)
    return plain_rotated(q, cos, sin, rotation)


def plain_rotated(new: Unrotated, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """q or k [N,heads,D] as `rotate_and_write` rotates it, in torch."""
    x = new.x if new.norm is None else plain_normalised(new.x, new.norm)[0]
    columns = torch.arange(rotation.pairs, device=x.device)
    left = columns * 2 if rotation.interleaved else columns
    right = left + 1 if rotation.interleaved else columns + rotation.pairs
    cosine, sine = (table[:, None, columns * rotation.step].float() for table in (cos, sin))
    a, b = x[..., left].float(), x[..., right].float()
    out = x.clone(memory_format=torch.contiguous_format)
    out[..., left] = (a * cosine - b * sine).to(x.dtype)
    out[..., right] = (b * cosine + a * sine).to(x.dtype)
    return out


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda
