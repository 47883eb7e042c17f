"""`linear` on a GPU at real sizes, against float64, in a graph. By hand."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from ropeway.kernels.fp8 import fp8_linear, round_to_fp8
from ropeway.kernels.linear import linear
from ropeway.kernels.triton_linear import round_rows
from ropeway.kernels.triton_matmul import steady_linear

pytestmark = pytest.mark.gpu
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128_256, 4096), (1024, 2048), (1024, 3072)]


def relative_error(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    parts = [x.double() @ part.double().T for part in weight.split(8192)]  # a head in float64 takes 4 GB
    expected = torch.cat(parts, -1)
    if bias is not None:
        expected += bias
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (1152, 896), (2048, 2064), (151_936, 896)])
def test_shapes(n: int, k: int, dtype: torch.dtype) -> None:
    """Guards both kernels, each row count at which something changes, bias, and K that is no multiple of a tile."""
    torch.manual_seed(n + k)
    weight = torch.randn(n, k, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype) * 10
    for rows in (1, 2, 8, 16, 17, 32, 33):
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        for b in (None, bias):
            assert relative_error(linear(x, weight, b), x, weight, b) < 4e-3


def test_in_a_cuda_graph_behind_what_it_reads() -> None:
    """Guards the early start: x is written by the launch in front, which may still run."""
    torch.manual_seed(0)
    weight = torch.randn(8, 4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    for rows in (1, 8):
        first = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)

        def chain(first: torch.Tensor = first) -> torch.Tensor:
            x = first
            for layer in weight:
                x = linear(x, layer)
            return x

        expected = first.double()
        for layer in weight:
            expected = expected @ layer.double().T
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain()
        results = []
        for _ in range(50):
            graph.replay()
            results.append(out.clone())
        assert all(torch.equal(result, results[0]) for result in results)
        assert (results[0].double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1024, 3072), (272, 912)])
def test_fp8(n: int, k: int) -> None:
    """Guards the rounding in Triton, the kernels for few rows and torch's for many: all multiply the same numbers."""
    torch.manual_seed(n)
    weight, scale = round_to_fp8(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for rows in (1, 2, 16, 32, 33, 300):
        x = (
            torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            * torch.logspace(-3, 3, rows, device="cuda")[:, None]
        )
        x = x.bfloat16()
        rounded, row_scale = round_to_fp8(x)
        found, found_scale = round_rows(x)
        torch.testing.assert_close(found_scale, row_scale, rtol=1e-6, atol=0)
        assert (found.float() != rounded.float()).float().mean() < 1e-3
        expected = (found.double() @ weight.double().T) * found_scale[:, None] * scale
        out = fp8_linear(x, weight, scale).double()
        assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < 4e-3
        out, plain = fp8_linear(x, weight, scale, bias).double(), expected + bias
        assert ((out - plain).norm(dim=1) / plain.norm(dim=1)).max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steady_bits(dtype: torch.dtype) -> None:
    """Guards what `triton_matmul.py` takes for granted of the matrix unit: each tile, for each number of rows and any
    place among them, gives an output the same bits. cuBLAS, and the products of few rows, do not."""
    torch.manual_seed(2)
    others = 0
    for n, k in [(28672, 1024), (4096, 4096), (1024, 3072), (1000, 1008)]:
        weight = torch.randn(n, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) * 10
        x = torch.randn(1300, k, device="cuda", dtype=dtype)
        whole = steady_linear(x, weight, bias)
        assert relative_error(whole, x, weight, bias) < (4e-3 if dtype.itemsize == 2 else 1e-5)
        for rows in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257):
            part = x[7 : 7 + rows]
            assert torch.equal(steady_linear(part, weight, bias), whole[7 : 7 + rows]), f"{n} x {k}, {rows} rows"
            others += int((linear(part, weight, bias) != whole[7 : 7 + rows]).sum())
    assert others
