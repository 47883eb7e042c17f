"""Fused models on a GPU, with the real kernels: every packed family in fp32, some in bf16, and inside a CUDA graph."""

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import (
    BLOCK_SIZE,
    LENGTHS,
    NUM_BLOCKS,
    largest_difference,
    plain_logits,
    ragged_steps,
    token_rows,
    wanting_all_logits,
)
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.fusion import fuse
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.step import RowInput, StepInput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
CUDA = torch.device("cuda")
PACKED = [name for name, family in FAMILIES.items() if family.packed]
TOKENS = token_rows(LENGTHS, VOCAB_SIZE)


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def batched_on_gpu(model: PreTrainedModel) -> list[torch.Tensor]:
    """[T,V] fp32 per sequence on the CPU, all of them run together in chunks."""
    forward = PackedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan))
    logits = [torch.full((len(row), VOCAB_SIZE), torch.nan) for row in TOKENS]
    for ragged in ragged_steps(TOKENS, (1, 1, 1, 2, 5, 9)):
        batch = wanting_all_logits(LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CUDA))
        out = forward(replace(batch, logits_index=batch.logits_index.cuda())).float().cpu()
        lengths = [stop - start for _, start, stop in ragged.spans]
        for (index, start, stop), part in zip(ragged.spans, out.split(lengths), strict=True):
            logits[index][start:stop] = part
    return logits


@pytest.mark.parametrize("name", PACKED)
def test_equals_the_plain_model(name: str) -> None:
    """Guards the kernels as each family calls them: its heads, strides, norms and rotation."""
    model = build(FAMILIES[name])
    expected = plain_logits(model, TOKENS)
    model.cuda()
    report = fuse(model, 64)
    assert largest_difference(batched_on_gpu(model), expected) < 1e-3, report.sentence()
    assert "everything" not in report.sentence()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "glm", "phi", "cohere", "granite"])
def test_bf16_is_no_less_exact_than_plain(name: str) -> None:
    """Guards the order of roundings: against the model in fp32, fusing must not cost exactness."""
    model = build(FAMILIES[name]).bfloat16()
    expected = torch.cat(plain_logits(model.float(), TOKENS))
    model.bfloat16().cuda()
    plain = (torch.cat(batched_on_gpu(model)) - expected).abs().mean()
    report = fuse(model, 64)
    fused = (torch.cat(batched_on_gpu(model)) - expected).abs().mean()
    print(f"{name}: mean error plain {plain:.5f}, fused {fused:.5f}")
    assert report.rotations and fused < 1.1 * plain


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi"])
@torch.inference_mode()
def test_in_a_cuda_graph(name: str) -> None:
    """Guards capture: no wait, no value kept from the captured run, whatever the inputs are replaced with."""
    model = build(FAMILIES[name]).cuda()
    fuse(model, 64)
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    forward = PackedForward(model, pool)

    def step(shift: int) -> LeftPaddedBatch:
        rows = [RowInput(row, [(3 + shift + row) % VOCAB_SIZE], 0, [1 + row + shift]) for row in range(5)]
        return LeftPaddedBatch.build(StepInput(rows), BLOCK_SIZE, CUDA)

    static = step(0)
    torch.cuda.set_sync_debug_mode("error")
    forward(static)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(static)
    for shift in (7, 30):
        fresh = step(shift)
        right = PackedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan))(fresh)
        for name_ in ("token_ids", "positions", "slot", "block_table", "context_len"):
            getattr(static, name_).copy_(getattr(fresh, name_))
        out.fill_(torch.nan)
        graph.replay()
        assert largest_difference([out], [right]) < 1e-4
