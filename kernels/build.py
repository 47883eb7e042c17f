"""From a model's name to a runner that is ready to step: load, find the layout, plan the KV cache, run once."""

from dataclasses import dataclass
from typing import Literal

import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.cpu_linear import pack_linears
from ropeway.kernels.errors import NotEnoughMemory
from ropeway.kernels.forward import Forward
from ropeway.kernels.fusion import fuse
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.loader import Progress, load_model
from ropeway.kernels.memory import kv_budget, plan_blocks
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.probe import Layout, choose_layout
from ropeway.kernels.rope import fix_rope
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Sampler
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.step import RowInput, StepInput
from ropeway.kernels.triton_sampler import TritonSampler


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
    fusion: str | None = None
    """What was fused in the model; None where its modules run as they are."""


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
    pack_linears(loaded.model)
    progress("trying the layouts", 0.8)
    fix_rope(loaded.model, loaded.max_model_len)
    choice = choose_layout(loaded.model, loaded.max_model_len, layout)
    on_gpu = loaded.device.type == "cuda"
    fusion = fuse(loaded.model, loaded.max_model_len) if on_gpu and choice.layout == "packed" else None
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
        fusion=None if fusion is None else fusion.sentence(),
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
