"""The packed layout against the plain model, every position, teacher-forced."""

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import (
    BLOCK_SIZE,
    CPU,
    LENGTHS,
    NUM_BLOCKS,
    batched_logits,
    largest_difference,
    plain_logits,
    token_rows,
)
from transformers import AttentionInterface

from ropeway.kernels import packed
from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import UnsupportedAttention
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import ATTENTION, PackedForward
from ropeway.kernels.step import RowInput, StepInput

# qk norm; window shorter than the sequences; softcap; learned positions; sinks; K and V of different size; no kwargs
NAMES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "stablelm")
CHUNKS = {"whole": (99,), "single": (1,), "mixed": (1, 1, 1, 2, 5, 9)}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_model(name: str, chunks: tuple[int, ...]) -> None:
    """Guards everything between ids and logits: masks, positions, slots, pool reads, whatever the neighbours do."""
    model = build(FAMILIES[name])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    forward = PackedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan))
    logits = batched_logits(forward, tokens, chunks)
    assert largest_difference(logits, plain_logits(model, tokens)) < 1e-4


def test_the_comparison_sees_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: with tiny random models even attention that returns zeros may pass unseen."""
    model = build(FAMILIES["llama"])
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    monkeypatch.setattr(packed, "paged_attention", lambda q, *args, **kwargs: torch.zeros_like(q))
    logits = batched_logits(PackedForward(model, KVPool(NUM_BLOCKS, BLOCK_SIZE)), tokens, (99,))
    assert largest_difference(logits, plain_logits(model, tokens)) > 0.1


def step() -> LeftPaddedBatch:
    rows = [
        RowInput(0, [5, 6, 7], 0, [1], sample=False),
        RowInput(1, [8, 9], 0, [2]),
        RowInput(2, [3], 0, [3]),
    ]
    return LeftPaddedBatch.build(StepInput(rows), BLOCK_SIZE, CPU)


def test_only_wanted_logits_are_computed() -> None:
    """Guards the head's cost (a vocabulary per token) and the order of its rows."""
    model = build(FAMILIES["llama"])
    logits = PackedForward(model, KVPool(8, BLOCK_SIZE))(step())
    assert logits.shape == (2, VOCAB_SIZE)
    plain = plain_logits(model, [[8, 9], [3]])
    assert largest_difference(list(logits), [plain[0][1], plain[1][0]]) < 1e-5


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.packed and family.common])
def test_the_head_runs_on_wanted_tokens_alone(name: str) -> None:
    """Guards the head's cost in every family: one that takes no index of tokens would multiply all of a prompt's."""
    model = build(FAMILIES[name])
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    PackedForward(model, KVPool(8, BLOCK_SIZE))(step())
    assert seen == [(1, 2, 64)]


def test_a_step_of_unfinished_chunks_has_no_logits() -> None:
    """Guards steps that sample nothing: an empty index must not mean all."""
    row = RowInput(0, [5, 6, 7], 0, [1], sample=False)
    batch = LeftPaddedBatch.build(StepInput([row]), BLOCK_SIZE, CPU)
    assert PackedForward(build(FAMILIES["llama"]), KVPool(8, BLOCK_SIZE))(batch).shape == (0, VOCAB_SIZE)


def test_windows_are_reported() -> None:
    """Guards the probe: it must see a layer that leaves its sliding window to the mask."""
    forward = PackedForward(build(FAMILIES["gemma2"]), KVPool(8, BLOCK_SIZE))
    forward(step())
    assert forward.windows == {0: 8, 1: None}


def test_no_places_are_wasted() -> None:
    """Guards padding_ratio: packed computes real tokens alone."""
    assert PackedForward(build(FAMILIES["llama"]), KVPool(8, BLOCK_SIZE)).computed_slots(step()) == 6


def test_models_without_the_interface_are_refused() -> None:
    """Guards bloom and its like: they accept any name and go on with their own attention, which yields garbage."""
    with pytest.raises(UnsupportedAttention, match="attention interface"):
        PackedForward(build(FAMILIES["bloom"]), KVPool(8, BLOCK_SIZE))(step())


@pytest.mark.parametrize(
    "extra",
    [{"position_bias": torch.zeros(1)}, {"indices": torch.zeros(1)}, {"is_causal": False}],
    ids=lambda extra: next(iter(extra)),
)
def test_attention_that_we_do_not_do_is_refused(extra: dict[str, Any]) -> None:
    """Guards against silently ignoring an argument that changes what attention means."""
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedAttention):
        AttentionInterface()[ATTENTION](torch.nn.Module(), q, q, q, None, **extra)
    with pytest.raises(UnsupportedAttention, match="attention_mask"):
        AttentionInterface()[ATTENTION](torch.nn.Module(), q, q, q, torch.zeros(1, 1, 3, 3))


def test_a_failed_forward_leaves_nothing_behind() -> None:
    """Guards the context variable: a step after an exception must not see the failed one's batch."""
    model = build(FAMILIES["llama"])
    forward = PackedForward(model, KVPool(2, BLOCK_SIZE))  # block 3 is not there
    with pytest.raises(IndexError):
        forward(step())
    with pytest.raises(LookupError, match="ropeway_step"):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
