"""Runs steps: `launch` puts one on the device, `Flight.read` waits for what it gave. Knows no request.

A flight may be read after the next launch: a row's token that is still unread then goes from one launch to the next
on the device. `launch` waits for no result; on CUDA its copies of the batch to the device, from pageable memory, still
wait for what the stream was given before them.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.errors import NotEnoughMemory
from ropeway.kernels.forward import Forward
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.loader import Progress, load_model
from ropeway.kernels.memory import kv_budget, plan_blocks
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.probe import Layout, choose_layout
from ropeway.kernels.rope import fix_rope
from ropeway.kernels.sampler import Sampled, Sampler
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowInput, StepInput, StepOutput, TokenLogprobs
from ropeway.kernels.triton_sampler import TritonSampler


@dataclass(slots=True, frozen=True)
class Flight:
    """A step on its way."""

    rows: int
    sampled_rows: list[int]
    """Rows of the step that sample, in the order of `sampled`."""
    top_counts: list[int | None]
    """Per sampled row: most likely tokens to report, 0 = only the chosen one, None = no logprobs."""
    sampled: Sampled | None
    computed_slots: int

    def read(self) -> StepOutput:
        """Wait for the step and bring its results to the host."""
        output = StepOutput([-1] * self.rows, [True] * self.rows, computed_slots=self.computed_slots)
        if self.sampled is None:
            return output
        ids, finite = self.sampled.token_ids.tolist(), self.sampled.finite.tolist()
        for row, token_id, is_finite in zip(self.sampled_rows, ids, finite, strict=True):
            output.token_ids[row] = token_id
            output.finite[row] = is_finite
        output.logprobs = self._logprobs(self.sampled)
        return output

    def _logprobs(self, sampled: Sampled) -> dict[int, TokenLogprobs]:
        if sampled.logprobs is None:
            return {}
        chosen = sampled.logprobs.tolist()
        ids = [] if sampled.top_ids is None else sampled.top_ids.tolist()
        values = [] if sampled.top_logprobs is None else sampled.top_logprobs.tolist()
        return {
            row: TokenLogprobs(chosen[line], list(zip(ids[line], values[line], strict=True))[:count] if count else [])
            for line, (row, count) in enumerate(zip(self.sampled_rows, self.top_counts, strict=True))
            if count is not None
        }


class ModelRunner:
    """One model, one KV pool, one sampling state; steps run in launch order."""

    def __init__(self, forward: Forward, pool: KVPool, sampler: Sampler, block_size: int, device: torch.device) -> None:
        self._forward = forward
        self._pool = pool
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._last_ids = torch.empty(0, dtype=torch.int64, device=device)
        """[rows of the last step]: the ids it sampled, -1 for rows that did not sample."""

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Flight:
        """Joins, block copies, forward, sampling. `UNREAD` ids are those that the previous launch sampled."""
        self._sampler.state.join(step.joins)
        batch = LeftPaddedBatch.build(step, self._block_size, self._device)
        self._pool.copy_blocks(batch.copies)
        logits = self._forward(self._with_unread(batch))
        sampled_rows = [index for index, row in enumerate(step.rows) if row.sample]
        sampled = self._sample(step, sampled_rows, logits) if sampled_rows else None
        self._last_ids = torch.full((batch.B,), -1, dtype=torch.int64, device=self._device)
        if sampled is not None:
            self._last_ids[torch.tensor(sampled_rows, device=self._device)] = sampled.token_ids
        top_counts = [self._top_count(step.rows[row].state_slot) for row in sampled_rows]
        return Flight(batch.B, sampled_rows, top_counts, sampled, self._forward.computed_slots(batch))

    def _with_unread(self, batch: LeftPaddedBatch) -> LeftPaddedBatch:
        """Fill in the ids that only the device knows."""
        if self._last_ids.shape[0] == 0:
            return batch
        known = batch.token_ids
        last = self._last_ids[batch.prev_row.clamp(min=0).long()]
        return replace(batch, token_ids=torch.where(batch.prev_row < 0, known, last))

    def _sample(self, step: StepInput, rows: list[int], logits: torch.Tensor) -> Sampled:
        slots = torch.tensor([step.rows[row].state_slot for row in rows])
        positions = torch.tensor([step.rows[row].start + len(step.rows[row].token_ids) for row in rows])
        return self._sampler.sample(logits, slots, positions)

    def _top_count(self, state_slot: int) -> int | None:
        needs = self._sampler.state.needs[state_slot]
        assert needs is not None, f"no row joined at slot {state_slot}"
        return needs.logprobs


@dataclass(slots=True, frozen=True)
class RunnerInfo:
    """What is known once a model is ready to step. Sizes in tokens unless a name says bytes."""

    architecture: str
    num_parameters: int
    weight_bytes: int
    dtype: str
    device: str
    layout: Layout
    layout_reason: str
    vocab_size: int
    """Width of the logits."""
    max_model_len: int
    num_blocks: int
    """The reserved block 0 included."""
    block_size: int
    kv_cache_bytes: int
    quantization: str | None = None
    """How the weights are quantised; None if they are not."""


def build_runner(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    load_format: Literal["auto", "safetensors", "dummy"] = "auto",
    quantization: str | None = None,
    device_map: Literal["none", "auto"] = "none",
    layout: Literal["auto"] | Layout = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    block_size: int = 16,
    kv_cache_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    threads: int | None = None,
    progress: Progress = lambda stage, share: None,
) -> tuple[ModelRunner, RunnerInfo]:
    """Load a model, find its layout, plan the KV cache, run once. State slots are 0 .. max_num_seqs - 1.

    Args: as in `load_model`, `choose_layout`, `kv_budget` and `plan_blocks`; kv_cache_bytes None = `kv_budget`;
        threads: intra-op threads on the CPU, None = torch's default; progress(stage for people, share of it all).

    Raises:
        LoadError: one sentence that says what to do.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        load_format=load_format,
        quantization=quantization,
        device_map=device_map,
        max_model_len=max_model_len,
        progress=lambda stage, share: progress(stage, 0.8 * share),
    )
    progress("trying the layouts", 0.8)
    fix_rope(loaded.model, loaded.max_model_len)
    choice = choose_layout(loaded.model, loaded.max_model_len, layout)
    progress("making the KV cache", 0.9)
    num_blocks = plan_blocks(
        kv_budget(loaded.device, gpu_memory_utilization) if kv_cache_bytes is None else kv_cache_bytes,
        bytes_per_block=choice.bytes_per_token * block_size,
        block_size=block_size,
        max_model_len=loaded.max_model_len,
        max_num_seqs=max_num_seqs,
    )
    pool = KVPool(num_blocks, block_size)
    forward = (PackedForward if choice.layout == "packed" else PaddedForward)(loaded.model, pool)
    _warm_up(forward, block_size, loaded.device)
    state = SamplingState(max_num_seqs, loaded.vocab_size, loaded.device)
    sampler = TritonSampler(state) if loaded.device.type == "cuda" else Sampler(state)
    progress("ready", 1.0)
    return ModelRunner(forward, pool, sampler, block_size, loaded.device), RunnerInfo(
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        weight_bytes=loaded.weight_bytes,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        layout=choice.layout,
        layout_reason=choice.reason,
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_cache_bytes=num_blocks * pool.bytes_per_block,
        quantization=loaded.quantization,
    )


def _warm_up(forward: Forward, block_size: int, device: torch.device) -> None:
    """One token through the model: the pools are made. Its K and V in block 1 are overwritten by the block's owner."""
    step = StepInput([RowInput(state_slot=0, token_ids=[0], start=0, block_table=[1])])
    try:
        forward(LeftPaddedBatch.build(step, block_size, device))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise NotEnoughMemory(
                "The KV cache does not fit: lower --kv-cache-memory-bytes, --gpu-memory-utilization or --max-model-len."
            ) from None
        raise
