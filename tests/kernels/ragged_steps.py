"""Rows that join at different steps in chunks of different sizes, over scattered blocks; and what is right for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import plain_attention, use_attention
from ropeway.kernels.step import RowInput, StepInput

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 128
LENGTHS = (23, 9, 40, 1, 17)


@dataclass(slots=True)
class RaggedStep:
    """One step and which tokens [start, stop) of which sequence each of its rows computes."""

    step: StepInput
    spans: list[tuple[int, int, int]]


def token_rows(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """One random sequence per length."""
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(length)] for length in lengths]


def ragged_steps(tokens: list[list[int]], chunks: Sequence[int], seed: int = 0) -> Iterator[RaggedStep]:
    """Every token of every sequence exactly once; the order of rows, joins, chunks and blocks is random."""
    random = Random(seed)
    free = list(range(1, NUM_BLOCKS))
    random.shuffle(free)
    joins = [random.randrange(4) for _ in tokens]
    done = [0] * len(tokens)
    tables: list[list[int]] = [[] for _ in tokens]
    for now in range(10_000):
        rows, spans = [], []
        for index in random.sample(range(len(tokens)), len(tokens)):
            size = min(random.choice(chunks), len(tokens[index]) - done[index])
            if now < joins[index] or size == 0:
                continue
            start, stop = done[index], done[index] + size
            while len(tables[index]) * BLOCK_SIZE < stop:
                tables[index].append(free.pop())
            rows.append(RowInput(index, tokens[index][start:stop], start, list(tables[index])))
            spans.append((index, start, stop))
            done[index] = stop
        if rows:
            yield RaggedStep(StepInput(rows), spans)
        elif now > max(joins):
            return


def wanting_all_logits(batch: LeftPaddedBatch) -> LeftPaddedBatch:
    """The same batch, with the logits of every token wanted."""
    every = tuple(range(sum(batch.query_lens)))
    return replace(batch, logits_index=torch.tensor(every), logits_tokens=every)


def batched_logits(
    forward: Callable[[LeftPaddedBatch], torch.Tensor], tokens: list[list[int]], chunks: Sequence[int], seed: int = 0
) -> list[torch.Tensor]:
    """[T,V] per sequence, all of them run together."""
    logits = [torch.full((0, 0), torch.nan)] * len(tokens)
    for ragged in ragged_steps(tokens, chunks, seed):
        out = forward(wanting_all_logits(LeftPaddedBatch.build(ragged.step, BLOCK_SIZE, CPU)))
        assert out.dtype == torch.float32
        for (index, start, stop), part in zip(
            ragged.spans, out.split([stop - start for _, start, stop in ragged.spans]), strict=True
        ):
            if start == 0:
                logits[index] = torch.full((len(tokens[index]), out.shape[1]), torch.nan)
            logits[index][start:stop] = part
    return logits


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, tokens: list[list[int]]) -> list[torch.Tensor]:
    """[T,V] per sequence: each alone through the model as transformers runs it."""
    use_attention(model, plain_attention(model))
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in tokens]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Over all positions; inf where there is a NaN."""
    gaps = [(a - b).abs().nan_to_num(nan=torch.inf).max() for a, b in zip(left, right, strict=True)]
    return float(torch.stack(gaps).max())
