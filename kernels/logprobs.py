"""Log-softmax in fp32 of the chosen token and of the most likely ones, for the lines that want them."""

from collections.abc import Sequence

import torch

from ropeway.kernels.triton_jit import upload


def most_likely(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [R, k] int64 of the largest logprobs [R, V] fp32, none above 0; best first, equals by lower id."""
    # One integer per token that orders by logprob, then by id; a plain topk leaves the order of equals open.
    vocabulary = torch.arange(logprobs.shape[1], device=logprobs.device)
    order = (logprobs.abs().view(torch.int32).to(torch.int64) << 32) | vocabulary
    return order.topk(k, largest=False).values & 0xFFFFFFFF


def chosen_logprobs(
    scores: torch.Tensor, token_ids: torch.Tensor, wanted: Sequence[int | None]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(chosen [L], top ids [L, K], their logprobs [L, K]) of scores [>=L, V]; by line, how many top ones are wanted,
    None for no logprobs at all: what stands there is undefined. None instead of what nobody wants."""
    asked = [line for line, count in enumerate(wanted) if count is not None]
    if not asked:
        return None, None, None
    rows = upload(torch.tensor(asked), scores.device)
    logprobs = scores[rows].float().log_softmax(-1)
    chosen = scores.new_zeros(len(wanted), dtype=torch.float32)
    chosen[rows] = logprobs.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1)
    k = min(max(count or 0 for count in wanted), scores.shape[1])
    if not k:
        return chosen, None, None
    best = most_likely(logprobs, k)
    top_ids = torch.zeros(len(wanted), k, dtype=torch.int64, device=scores.device)
    top_logprobs = chosen.new_zeros(len(wanted), k)
    top_ids[rows], top_logprobs[rows] = best, logprobs.gather(1, best)
    return chosen, top_ids, top_logprobs
