"""`linear` and the swap of plain layers, on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ropeway.kernels.linear as linear_module
from ropeway.kernels.linear import linear, use_fast_linears


class Other(nn.Linear):
    """A layer with a way of its own, as quantised ones have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), Other(12, 12), nn.Linear(12, 4, bias=False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
def test_shapes(shape: tuple[int, ...], bias: bool) -> None:
    """Guards leading dimensions: packed batches are [1,N,K], padded ones [B,T,K], and a step may have no rows."""
    layer = nn.Linear(8, 12, bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_only_halves_take_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards --dtype float64 on a GPU: the kernel sums in fp32."""
    seen: list[torch.dtype] = []

    def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.dtype)
        return x.new_empty(len(x), len(weight))

    monkeypatch.setattr(linear_module, "few_rows_linear", few_rows)
    with FakeTensorMode():
        x, weight = (torch.empty(rows, 32, dtype=dtype, device="cuda") for rows in (2, 64))
        assert linear(x, weight).shape == (2, 64)
    assert seen == [dtype] * (dtype.itemsize == 2)


def test_only_plain_layers_are_swapped() -> None:
    """Guards quantised layers, which are subclasses: their weights are no matrices."""
    plain = model()
    fast = copy.deepcopy(plain)
    use_fast_linears(fast)
    assert [("forward" in vars(module)) for module in fast] == [True, False, False, True]
    x = torch.randn(5, 8)
    torch.testing.assert_close(fast(x), plain(x))


def test_the_swap_can_be_undone() -> None:
    """Guards whoever needs the model as it was: the probe compares with the plain one."""
    made = model()
    undo = use_fast_linears(made)
    undo()
    undo()
    assert all("forward" not in vars(module) for module in made)


def test_a_replaced_forward_stays() -> None:
    """Guards accelerate's hooks, which move weights to the device before the layer's own forward."""
    made = model()
    made[0].forward = lambda x: torch.zeros(len(x), 12)
    undo = use_fast_linears(made)
    undo()
    assert not made[0](torch.randn(2, 8)).any()


def test_weights_are_looked_up_at_each_call() -> None:
    """Guards loading and tying after the swap: a layer must not keep the weight it had."""
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    use_fast_linears(layer)
    layer[0].weight = nn.Parameter(torch.zeros(4, 4))
    assert not layer(torch.randn(2, 4)).any()
