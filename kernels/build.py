"""From a model's name to a runner that is ready to step: load, find the layout, plan the memory, capture, compile."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.cpu_linear import pack_linears, threads_for
from ropeway.kernels.deterministic import check_deterministic, make_deterministic
from ropeway.kernels.forward import Forward
from ropeway.kernels.fp8 import quantise_to_fp8
from ropeway.kernels.fp8_cache import check_fp8_cache
from ropeway.kernels.fusion import fuse
from ropeway.kernels.graphs import LARGEST_MIXED, CudaCapture, decode_sizes, mixed_sizes
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.linear import use_fast_linears
from ropeway.kernels.loader import LoadedModel, Progress, load_model
from ropeway.kernels.memory import kv_budget, memory_for, peak_bytes, plan_blocks
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.probe import Layout, choose_layout
from ropeway.kernels.quantization import count_weights
from ropeway.kernels.rope import fix_rope
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Lines, Sampler
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.scoring import bytes_of_scores
from ropeway.kernels.step import RowInput, StepInput, scores_per_step
from ropeway.kernels.triton_sampler import TritonSampler

GRAPH_BYTES = 4 << 20
"""What the driver keeps on the device for a captured size, about."""


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
    kv_cache_dtype: str
    quantization: str | None = None
    """How the weights are quantised; None if they are not."""
    fusion: str | None = None
    """What was fused in the model; None where its modules run as they are."""
    no_graphs: str | None = None
    """Why every step is launched kernel by kernel, in words that follow "because"; None if there are CUDA graphs."""


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
    deterministic: bool = False,
    processed_logprobs: bool = False,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    block_size: int = 16,
    kv_cache_bytes: int | None = None,
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    gpu_memory_utilization: float = 0.9,
    threads: int | None = None,
    progress: Progress = lambda stage, share: None,
    compiling: Progress = lambda stage, share: None,
) -> tuple[ModelRunner, RunnerInfo]:
    """Load a model, find its layout, plan the KV cache, compile and capture. State slots are 0 .. max_num_seqs - 1.

    Args: as in `load_model`, `choose_layout`, `kv_budget` and `plan_blocks`; kv_cache_bytes None = `kv_budget`;
        max_num_batched_tokens: of the largest step; kv_cache_dtype: auto = as the model computes K and V;
        deterministic: see `deterministic.py`; processed_logprobs: see `Sampler`;
        threads: intra-op threads on the CPU, None = `threads_for`; progress(stage for people, share of it all);
        compiling: the same for the time in which a GPU's kernels are compiled and captured.

    Raises:
        LoadError: one sentence that says what to do.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if kv_cache_dtype == "fp8":
        check_fp8_cache(device)
    if deterministic:
        check_deterministic(device, quantization, device_map, layout)
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
    if quantization != "fp8":
        with memory_for("The weights fit, but packing them does not", "take a smaller model or dtype"):
            pack_linears(loaded.model)
    if threads is None and loaded.device.type == "cpu":
        torch.set_num_threads(threads_for(loaded.model, torch.get_num_threads()))
    progress("trying the layouts", 0.8)
    fix_rope(loaded.model, loaded.max_model_len)
    with memory_for("The weights fit, but rearranging them does not", "take a smaller model, dtype or quantization"):
        choice = choose_layout(loaded.model, loaded.max_model_len, layout)
        scales = choice.scales if kv_cache_dtype == "fp8" else None
        on_gpu = loaded.device.type == "cuda"
        packed = choice.layout == "packed"
        fusion = fuse(loaded.model, loaded.max_model_len) if on_gpu and packed else None
        if quantization == "fp8":
            progress("rounding weights", 0.82)
            quantise_to_fp8(loaded.model)
        if deterministic:
            progress("checking that neighbours change no bits", 0.83)
            make_deterministic(loaded, choice)
        elif on_gpu:
            use_fast_linears(loaded.model)
    state = SamplingState(max_num_seqs, loaded.vocab_size, loaded.device)
    sampler = (TritonSampler if on_gpu else Sampler)(state, processed_logprobs)
    make_forward = partial(PackedForward, deterministic=deterministic) if packed else PaddedForward
    sizes = decode_sizes(max_num_seqs) + mixed_sizes(max_num_seqs, max_num_batched_tokens) if on_gpu and packed else []
    reserved = 0
    if isinstance(sampler, TritonSampler):
        progress("running the largest step", 0.85)
        trial = make_forward(loaded.model, KVPool(2, block_size, scales=scales))
        reserved = _bytes_of_steps(loaded, trial, sampler, max_num_batched_tokens, block_size, len(sizes))
    progress("making the KV cache", 0.9)
    num_blocks = plan_blocks(
        kv_budget(loaded.device, gpu_memory_utilization) - reserved if kv_cache_bytes is None else kv_cache_bytes,
        bytes_per_block=(choice.bytes_per_token if scales is None else choice.numbers_per_token) * block_size,
        block_size=block_size,
        max_model_len=loaded.max_model_len,
        max_num_seqs=max_num_seqs,
    )
    pool = KVPool(num_blocks, block_size, scales=scales)
    forward = make_forward(loaded.model, pool)
    logits_dtype = _warm_up(forward, block_size, loaded.device)
    runner = ModelRunner(
        forward,
        pool,
        sampler,
        block_size,
        loaded.device,
        max_blocks=-(-loaded.max_model_len // block_size),
        sizes=sizes,
        capture=CudaCapture(loaded.device) if sizes else None,
        logits_dtype=logits_dtype,
    )
    progress("loaded", 1.0)
    no_graphs = runner.prepare(compiling)
    return runner, RunnerInfo(
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        weight_bytes=count_weights(loaded.model)[1] if quantization == "fp8" else loaded.weight_bytes,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        layout=choice.layout,
        layout_reason=choice.reason,
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_cache_bytes=num_blocks * pool.bytes_per_block,
        kv_cache_dtype=str(loaded.dtype).removeprefix("torch.") if scales is None else "float8_e4m3fn",
        quantization=loaded.quantization,
        fusion=None if fusion is None else fusion.sentence(),
        no_graphs=no_graphs,
    )


def _bytes_of_steps(
    loaded: LoadedModel,
    forward: Forward,
    sampler: TritonSampler,
    max_tokens: int,
    block_size: int,
    num_graphs: int,
) -> int:
    """Bytes that stepping takes beside weights and KV cache, found out by running the largest step there may be,
    through a forward whose pool has blocks 0 and 1.

    Raises NotEnoughMemory.
    """
    rows, width = sampler.state.num_slots, sampler.state.vocab_size
    logits_bytes = 4 * (rows + 1) * width

    def step(tokens: int) -> None:
        batch = LeftPaddedBatch.build(_full_step(tokens, rows, loaded.max_model_len, block_size), block_size, device)
        sampler.launch(forward(batch), _idle_lines(sampler, batch.B), "processed")

    device = loaded.device
    remedy = "lower --max-num-batched-tokens or --max-num-seqs"
    with memory_for(f"A step of {max_tokens} tokens does not fit beside the weights", remedy):
        needed = peak_bytes(lambda: step(max_tokens), device)
        if num_graphs:  # they have a pool of their own, and logits that stay
            needed += peak_bytes(lambda: step(min(LARGEST_MIXED, max_tokens)), device)
            needed += logits_bytes + num_graphs * GRAPH_BYTES
    # Made when a request asks for them: tables of biases and penalties; logprobs in fp32, with an int64 order, twice.
    return needed + (2 + 6) * logits_bytes + bytes_of_scores(min(scores_per_step(width), max_tokens), width)


def _full_step(tokens: int, rows: int, max_model_len: int, block_size: int) -> StepInput:
    """A step of about so many tokens in so many rows; all of them write to block 1, over each other."""
    rows = min(rows, tokens)
    counts, left = [1] * rows, tokens - rows
    for row in range(rows):
        more = min(left, max_model_len - 1)
        counts[row] += more
        left -= more
    return StepInput([RowInput(row, [0] * n, 0, [1] * -(-n // block_size)) for row, n in enumerate(counts)])


def _idle_lines(sampler: TritonSampler, count: int) -> Lines:
    """Lines of the spare slot, so that sampling them changes nothing."""
    device = sampler.state.device
    slots = torch.full((count,), sampler.state.spare, device=device)
    ids, finite = torch.empty_like(slots), torch.empty_like(slots, dtype=torch.bool)
    host = slots.cpu().numpy()
    return Lines(host, host, slots, torch.zeros_like(slots), torch.zeros_like(slots), ids, finite)


def _warm_up(forward: Forward, block_size: int, device: torch.device) -> torch.dtype:
    """One token through the model: the pools are made. Its K and V in block 1 are overwritten by the block's owner.

    Returns the logits' dtype."""
    step = StepInput([RowInput(state_slot=0, token_ids=[0], start=0, block_table=[1])])
    remedy = "lower --kv-cache-memory-bytes, --gpu-memory-utilization or --max-model-len"
    with memory_for("The KV cache does not fit", remedy):
        return forward(LeftPaddedBatch.build(step, block_size, device)).dtype
