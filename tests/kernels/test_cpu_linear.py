"""Packed linear layers against `F.linear`, alone and inside models of many families."""

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from torch import nn
from torch.nn.functional import linear

from ropeway.kernels import cpu_linear
from ropeway.kernels.cpu_linear import pack_linears, threads_for

pytestmark = [
    pytest.mark.skipif(pack_linears(nn.Linear(2, 2)) == 0, reason="no oneDNN kernels for this processor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.fixture(params=[False, True], ids=["packed", "small"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether layers count as small: they are packed if not."""
    monkeypatch.setattr(cpu_linear, "SMALL_WEIGHT", 1 << 18 if request.param else 0)
    return bool(request.param)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear(rows: int, dtype: torch.dtype, allowed: float, bias: bool, small: bool) -> None:
    """Guards the product: sizes that fill no block of the packed order, and numbers of rows it was not packed for."""
    torch.manual_seed(rows)
    layer, x = nn.Linear(75, 130, bias).to(dtype), torch.randn(rows, 75, dtype=dtype)
    right = linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    pack_linears(layer)
    assert (layer.weight.layout is torch.strided) == small
    out = layer(x)
    assert out.dtype == dtype
    assert ((out.double() - right).norm() / right.norm()).item() < allowed
    columns = layer(x.t().contiguous().t()[None])[0]  # a leading dimension, and rows that do not lie in one piece
    assert ((columns.double() - right).norm() / right.norm()).item() < allowed


@torch.inference_mode()
def test_no_rows(small: bool) -> None:
    """Guards steps that sample nothing: the head gets no token then, and oneDNN raises."""
    layer = nn.Linear(8, 5)
    pack_linears(layer)
    assert layer(torch.empty(1, 0, 8)).shape == (1, 0, 5)


@torch.inference_mode()
def test_a_tied_weight_stays_readable(small: bool) -> None:
    """Guards tied embeddings: a packed weight has no rows to look up, and a second copy would cost its size again."""
    embedding, head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    head.weight = embedding.weight
    x = torch.randn(3, 16)
    right = linear(x, head.weight)
    assert pack_linears(nn.ModuleList([embedding, head])) == 1
    assert head.weight is embedding.weight
    assert torch.allclose(head(x), right, atol=1e-5)
    assert embedding(torch.tensor([3])).shape == (1, 16)


@torch.inference_mode()
def test_only_plain_layers_are_touched() -> None:
    """Guards quantised layers (subclasses with weights of their own), layers that accelerate moves, and precision."""

    class Quantised(nn.Linear):
        pass

    moved = nn.Linear(4, 4)
    vars(moved)["forward"] = moved.forward
    assert pack_linears(nn.ModuleList([Quantised(4, 4), moved, nn.Linear(4, 4).double()])) == 0


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.common))
def test_families_run_on_packed_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards models that read a layer's weight past its forward: a packed one is of use to nobody else."""
    monkeypatch.setattr(cpu_linear, "SMALL_WEIGHT", 0)
    model = build(FAMILIES[name])
    ids = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    right = model(input_ids=ids, use_cache=False).logits
    assert pack_linears(model) > 0
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, right, rtol=0, atol=1e-5)


def test_small_models_get_one_thread() -> None:
    """Guards the demo and small machines: threads that wait for each other at every layer of 0.4 MB."""
    small, large = nn.Linear(256, 512), nn.Linear(1024, 1024)
    assert [threads_for(small, cores) for cores in (1, 16)] == [1, 1]
    assert [threads_for(large, cores) for cores in (1, 2, 16)] == [1, 2, 4]
    assert threads_for(nn.Embedding(8, 8), 16) == 16
