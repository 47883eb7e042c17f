"""The fused kernels in Triton against their references in torch: ragged sizes, strides, conventions, dtypes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from e4m3 import mend_interpreter

pytest.importorskip("triton")

from ropeway.kernels import triton_mlp, triton_norm, triton_rope
from ropeway.kernels.fp8 import FP8
from ropeway.kernels.fp8_cache import Scales
from ropeway.kernels.fused_ops import (
    Activation,
    Frequencies,
    Layout,
    Norm,
    Rotation,
    Unrotated,
    activate,
    angle_tables,
    gated,
    normalised,
    rotate_and_write,
)
from ropeway.kernels.triton_norm import rows_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]  # the interpreter cuts bf16 off
NORMS = [(0.0, False), (0.0, True), (1.0, True)]
"""(offset, late) of RMSNorm."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, right: torch.Tensor) -> None:
    """Equal but for roundings of the dtype: sums go in another order."""
    assert found.dtype == right.dtype and found.shape == right.shape
    eps = torch.finfo(right.dtype).eps
    torch.testing.assert_close(found.cpu().float(), right.float(), rtol=2 * eps, atol=16 * eps)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that a place nobody wrote shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan)

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "late", "centred"), [*((*norm, False) for norm in NORMS), (0.0, True, True)])
@pytest.mark.parametrize("shape", [(1, 3, 40), (1, 1, 64), (2, 5, 7), (1, 70, 24)])
def test_normalise(shape: tuple[int, ...], offset: float, late: bool, centred: bool, dtype: torch.dtype) -> None:
    """Guards means over a width that is no power of two, both weight conventions and the order of roundings."""
    x, residual = 3 + random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[-1], dtype=dtype, seed=2), random(shape[-1], dtype=dtype, seed=3)
    norm = Norm(weight, 1e-3, offset, late, centred, bias if centred else None)
    moved = replace(norm, weight=weight.to(DEVICE), bias=bias.to(DEVICE) if centred else None)
    for other in (None, residual):
        right, total = normalised(x, norm, other)
        found = triton_norm.normalise(x.to(DEVICE), moved, None if other is None else other.to(DEVICE))
        assert_close(found[0], right)
        assert torch.equal(found[1].cpu(), total)


def test_the_reference_is_torchs_own() -> None:
    """Guards the reference of the kernel, which the test above takes for right."""
    x, weight, bias = random(3, 40), random(40, seed=1), random(40, seed=2)
    assert_close(normalised(x, Norm(weight, 1e-5, 0.0, True, True, bias))[0], F.layer_norm(x, (40,), weight, bias))
    assert_close(normalised(x, Norm(weight, 1e-5, 0.0, True))[0], F.rms_norm(x, (40,), weight, 1e-5))


def test_normalise_reads_strided_rows() -> None:
    """Guards heads that are slices of a merged projection: their rows are not one after the other."""
    merged = random(1, 3, 100).to(DEVICE)
    x = merged[..., 10:70].view(1, 3, 4, 15).transpose(1, 2)
    norm = Norm(random(15, seed=2), 1e-6, 0.0, True)
    found, _ = triton_norm.normalise(x, replace(norm, weight=norm.weight.to(DEVICE)), None)
    assert_close(found, normalised(x.cpu(), norm)[0])
    with pytest.raises(ValueError, match="rows"):
        rows_of(merged.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation: Activation, dtype: torch.dtype) -> None:
    """Guards widths beside the tile's, halves of one tensor, and the rounding between activation and product."""
    both = 3 * random(1, 3, 2 * 1030, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    right = gated(gate, up, activation)
    gate, up = both.to(DEVICE).chunk(2, dim=-1)
    found = triton_mlp.gated(gate, up, activation)
    torch.testing.assert_close(found.cpu().float(), right.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_activations_are_torchs_own() -> None:
    """Guards the reference: gelu has two forms, and they differ by less than a glance shows."""
    x = random(50)
    assert torch.equal(activate(x, "silu"), F.silu(x))
    assert torch.equal(activate(x, "gelu"), F.gelu(x))
    assert torch.equal(activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("layout", ["halves", "repeated", "once"])
def test_angle_tables(layout: Layout) -> None:
    """Guards large positions, where a cosine that is only approximate is off by more than a rounding."""
    positions = torch.tensor([[0, 1, 7], [900, 65_537, 131_071]])
    frequencies = Frequencies(1 / 10_000 ** (torch.arange(6) / 6), 1.5, layout)
    right = angle_tables(positions, frequencies, torch.float32)
    moved = Frequencies(frequencies.inverse.to(DEVICE), 1.5, layout)
    found = triton_rope.angle_tables(positions.to(DEVICE), moved, torch.float32)
    for table, expected in zip(found, right, strict=True):
        torch.testing.assert_close(table.cpu(), expected, rtol=0, atol=1e-6)


SIZES = [  # q heads, kv heads, head, head of v, pairs
    (4, 2, 16, 16, 8),
    (9, 3, 20, 12, 4),
    (16, 1, 64, 64, 32),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [None, 1.0])
def test_rotate_and_write_in_fp8(offset: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the roundings: norm, rotation and q in the model's dtype, then K and V by their scales."""
    mend_interpreter(monkeypatch)
    sizes = (4, 20), (2, 20), (2, 12)
    q, k, v = (random(5, *size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes))
    norm = None if offset is None else random(20, dtype=dtype, seed=3)
    cos, sin = random(5, 8, seed=4), random(5, 8, seed=5)
    results = []
    for device, run in (("cpu", rotate_and_write), (DEVICE, triton_rope.rotate_and_write)):
        norms = None if norm is None else Norm(norm.to(device), 1e-5, 1.0, False)
        pools = [torch.zeros(3, 4, 2, size, dtype=FP8, device=device) for size in (20, 12)]
        out = run(
            *(Unrotated(q.to(device), norms), Unrotated(k.to(device), norms), v.to(device)),
            *(cos.to(device), sin.to(device), Rotation(8, 1, False), torch.tensor([7, 2, 11, 0, 5], device=device)),
            *(*pools, Scales(2**-5, 2**-3)),
        )
        results.append((out, *pools))
    assert results[0][1].float().abs().max() > 32
    for found, right, rtol in zip(*reversed(results), (4 * torch.finfo(dtype).eps, 2**-3, 0), strict=True):
        torch.testing.assert_close(found.cpu().float(), right.float(), rtol=rtol, atol=8 * rtol)
    assert (results[0][1].float() != results[1][1].cpu().float()).float().mean() < 0.02  # a rotation's last bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_rotate_and_write(sizes: tuple[int, ...], interleaved: bool, dtype: torch.dtype) -> None:
    """Guards heads in two blocks, partial rotation, slices of a merged projection, slots nobody writes, and norms."""
    q_heads, kv_heads, head, head_v, pairs = sizes
    widths = [q_heads * head, kv_heads * head, kv_heads * head_v]
    merged = random(5, sum(widths), dtype=dtype)
    slots = torch.tensor([7, 2, 11, 0, 5])
    weights = [random(head, dtype=dtype, seed=seed) for seed in (3, 4)]
    for (offset, late), step in product([(None, False), *NORMS], (1, 2)):
        rotation = Rotation(pairs, step, interleaved)
        cos, sin = random(5, pairs * step, dtype=dtype, seed=1), random(5, pairs * step, seed=2)
        results = []
        for device, run in (("cpu", rotate_and_write), (DEVICE, triton_rope.rotate_and_write)):
            q, k, v = merged.to(device).split(widths, dim=-1)
            q_norm, k_norm = (
                None if offset is None else Norm(weight.to(device), 1e-5, offset, late) for weight in weights
            )
            pools = [torch.zeros(3, 4, kv_heads, size, dtype=dtype, device=device) for size in (head, head_v)]
            out = run(
                Unrotated(q.view(5, q_heads, head), q_norm),
                Unrotated(k.view(5, kv_heads, head), k_norm),
                v.view(5, kv_heads, head_v),
                *(cos.to(device), sin.to(device), rotation, slots.to(device), *pools),
            )
            results.append((out, *pools))
        for found, right in zip(results[1], results[0], strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found.cpu().float(), right.float(), rtol=2 * eps, atol=16 * eps)
        assert torch.equal(results[1][2], results[0][2].to(DEVICE))
