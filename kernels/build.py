"""From a model's name to a runner that is ready to step: load, find the layout, plan the memory, capture, compile."""

from dataclasses import dataclass

import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.cpu_linear import pack_linears, threads_for
from ropeway.kernels.deterministic import check_deterministic, make_deterministic
from ropeway.kernels.forward import Forward
from ropeway.kernels.fp8 import quantise_to_fp8
from ropeway.kernels.fp8_cache import Scales, check_fp8_cache
from ropeway.kernels.fusion import FusionReport, fuse
from ropeway.kernels.graphs import CudaCapture, decode_sizes, mixed_sizes
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.linear import use_fast_linears
from ropeway.kernels.loader import LoadedModel, Progress, load_model
from ropeway.kernels.memory import kv_budget, memory_for, peak_bytes, plan_blocks
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.probe import Choice, choose_layout, packed_logits
from ropeway.kernels.quantization import count_weights
from ropeway.kernels.rope import fix_rope
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.runner_options import Layout, RunnerOptions
from ropeway.kernels.sampler import Lines, Sampler
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.scoring import bytes_of_scores
from ropeway.kernels.staging import Size
from ropeway.kernels.step import RowInput, StepInput, scores_per_step
from ropeway.kernels.triton_ahead import CompileAhead, compile_ahead_on
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


@dataclass(slots=True, frozen=True)
class _ReadyModel:
    """A model with its weights and modules as steps use them. Its KV cache is not made yet."""

    options: RunnerOptions
    loaded: LoadedModel
    choice: Choice
    fusion: FusionReport | None

    @property
    def scales(self) -> dict[int, Scales] | None:
        """Of a cache in FP8; None for one in the model's dtype."""
        return self.choice.scales if self.options.kv_cache_dtype == "fp8" else None

    @property
    def bytes_per_block(self) -> int:
        """Of KV cache, over all layers."""
        numbers = self.choice.bytes_per_token if self.scales is None else self.choice.numbers_per_token
        return numbers * self.options.block_size

    @property
    def sizes(self) -> list[Size]:
        """Of the steps that get CUDA graphs."""
        if self.loaded.device.type != "cuda" or self.choice.layout != "packed":
            return []
        rows, tokens = self.options.max_num_seqs, self.options.max_num_batched_tokens
        return decode_sizes(rows) + mixed_sizes(rows, tokens, self.loaded.num_parameters)

    def pool(self, num_blocks: int) -> KVPool:
        """A KV cache for this model."""
        return KVPool(num_blocks, self.options.block_size, scales=self.scales)

    def forward(self, pool: KVPool) -> Forward:
        """The model over such a pool."""
        if self.choice.layout == "packed":
            return PackedForward(self.loaded.model, pool, self.options.deterministic)
        return PaddedForward(self.loaded.model, pool)

    def sampler(self) -> Sampler:
        """With a state for every row, and one to spare."""
        state = SamplingState(self.options.max_num_seqs, self.loaded.vocab_size, self.loaded.device)
        kind = TritonSampler if self.loaded.device.type == "cuda" else Sampler
        return kind(state, self.options.processed_logprobs)


def build_runner(
    options: RunnerOptions,
    progress: Progress = lambda stage, share: None,
    compiling: Progress = lambda stage, share: None,
) -> tuple[ModelRunner, RunnerInfo]:
    """Load a model, find its layout, plan the KV cache, compile and capture. State slots are 0 .. max_num_seqs - 1.

    Args: progress(stage for people, share of it all); compiling: the same for the time in which a GPU's kernels are
        compiled and captured.

    Raises:
        LoadError: one sentence that says what to do.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.kv_cache_dtype == "fp8":
        check_fp8_cache(options.device)
    if options.deterministic:
        check_deterministic(options.device, options.quantization, options.device_map, options.layout)
    loaded = load_model(options, lambda stage, share: progress(stage, 0.8 * share))
    ahead = compile_ahead_on(loaded.device)
    ready = _make_ready(loaded, options, progress, ahead)
    sampler = ready.sampler()
    pool = ready.pool(_plan_blocks(ready, sampler, progress, ahead))
    runner = _make_runner(ready, pool, sampler)
    progress("loaded", 1.0)
    no_graphs = runner.prepare(compiling, ahead)
    return runner, _info(ready, pool, no_graphs)


def _make_ready(loaded: LoadedModel, options: RunnerOptions, progress: Progress, ahead: CompileAhead) -> _ReadyModel:
    """Everything that is done to a model between loading and its first step: weights packed or rounded, layout found,
    modules fused, products swapped."""
    if options.quantization != "fp8":
        with memory_for("The weights fit, but packing them does not", "take a smaller model or dtype"):
            pack_linears(loaded.model)
    on_gpu = loaded.device.type == "cuda"
    if options.threads is None and not on_gpu:
        torch.set_num_threads(threads_for(loaded.model, torch.get_num_threads()))
    progress("trying the layouts", 0.8)
    fix_rope(loaded.model, loaded.max_model_len)
    with memory_for("The weights fit, but rearranging them does not", "take a smaller model, dtype or quantization"):
        if on_gpu and options.device_map == "none":
            ahead(lambda: packed_logits(loaded.model, loaded.max_model_len))
        choice = choose_layout(loaded.model, loaded.max_model_len, options.layout)
        fusion = fuse(loaded.model, loaded.max_model_len, ahead) if on_gpu and choice.layout == "packed" else None
        if options.quantization == "fp8":
            progress("rounding weights", 0.82)
            quantise_to_fp8(loaded.model)
        if options.deterministic:
            progress("checking that neighbours change no bits", 0.83)
            make_deterministic(loaded, choice)
        elif on_gpu:
            use_fast_linears(loaded.model)
    return _ReadyModel(options, loaded, choice, fusion)


def _plan_blocks(ready: _ReadyModel, sampler: Sampler, progress: Progress, ahead: CompileAhead) -> int:
    """Blocks of the KV cache: what the user says, or what steps leave free."""
    options, loaded = ready.options, ready.loaded
    reserved = 0
    if isinstance(sampler, TritonSampler):
        progress("running the largest step", 0.85)
        reserved = _bytes_of_steps(ready, sampler, ahead)
    progress("making the KV cache", 0.9)
    budget = options.kv_cache_bytes
    if budget is None:
        budget = kv_budget(loaded.device, options.gpu_memory_utilization) - reserved
    return plan_blocks(
        budget,
        bytes_per_block=ready.bytes_per_block,
        block_size=options.block_size,
        max_model_len=loaded.max_model_len,
        max_num_seqs=options.max_num_seqs,
    )


def _make_runner(ready: _ReadyModel, pool: KVPool, sampler: Sampler) -> ModelRunner:
    options, loaded = ready.options, ready.loaded
    forward = ready.forward(pool)
    return ModelRunner(
        forward,
        pool,
        sampler,
        options.block_size,
        loaded.device,
        max_blocks=-(-loaded.max_model_len // options.block_size),
        sizes=ready.sizes,
        capture=CudaCapture(loaded.device) if ready.sizes else None,
        logits_dtype=_warm_up(forward, options.block_size, loaded.device),
    )


def _info(ready: _ReadyModel, pool: KVPool, no_graphs: str | None) -> RunnerInfo:
    loaded, choice, fusion = ready.loaded, ready.choice, ready.fusion
    dtype = str(loaded.dtype).removeprefix("torch.")
    rounded = ready.options.quantization == "fp8"  # after loading: its weights were counted before
    return RunnerInfo(
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        weight_bytes=count_weights(loaded.model)[1] if rounded else loaded.weight_bytes,
        dtype=dtype,
        device=str(loaded.device),
        layout=choice.layout,
        layout_reason=choice.reason,
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        kv_cache_bytes=pool.num_blocks * pool.bytes_per_block,
        kv_cache_dtype=dtype if ready.scales is None else "float8_e4m3fn",
        quantization=loaded.quantization,
        fusion=None if fusion is None else fusion.sentence(),
        no_graphs=no_graphs,
    )


def _bytes_of_steps(ready: _ReadyModel, sampler: TritonSampler, ahead: CompileAhead) -> int:
    """Bytes that stepping takes beside weights and KV cache, found out by running the largest step there may be,
    through a forward whose pool has blocks 0 and 1.

    Raises NotEnoughMemory.
    """
    options, device, sizes = ready.options, ready.loaded.device, ready.sizes
    max_tokens, block_size = options.max_num_batched_tokens, options.block_size
    forward = ready.forward(ready.pool(2))
    rows, width = sampler.state.num_slots, sampler.state.vocab_size
    logits_bytes = 4 * (rows + 1) * width

    def step(tokens: int) -> None:
        batch = LeftPaddedBatch.build(
            _full_step(tokens, rows, ready.loaded.max_model_len, block_size), block_size, device
        )
        sampler.launch(forward(batch), _idle_lines(sampler, batch.B), "processed")

    remedy = "lower --max-num-batched-tokens or --max-num-seqs"
    with memory_for(f"A step of {max_tokens} tokens does not fit beside the weights", remedy):
        ahead(lambda: step(max_tokens))
        needed = peak_bytes(lambda: step(max_tokens), device)
        if sizes:  # their graphs have a pool of their own, and logits that stay
            needed += peak_bytes(lambda: step(max(sizes).tokens), device)
            needed += logits_bytes + len(sizes) * GRAPH_BYTES
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
