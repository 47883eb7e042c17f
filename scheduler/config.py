"""What the engine is started with. Plain data: the command line fills it, the engine process reads it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True, frozen=True)
class EngineConfig:
    """One engine: a model, its memory and the limits of its batch. Sizes in tokens unless a name says bytes."""

    model: str
    """Folder or hub id."""
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    """Template text (already read from its file) that replaces the model's own."""
    generation_config: str = "auto"
    """auto, none, or a generation-config file of the model that must be there."""
    dtype: str = "auto"
    device: str = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """dummy: random weights, for benchmarks; the folder needs none."""
    quantization: str | None = None
    """One of `kernels/quantization.py`'s kinds; None = as the checkpoint is."""
    device_map: Literal["none", "auto"] = "none"
    """auto: layers that a GPU has no room for stay in the machine's memory."""
    max_model_len: int | None = None
    """Longest prompt + output; None = what the model's config says."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    """None = sized from the device's free memory (GPU) or a quarter of the machine's (CPU), see `kernels/memory.py`."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """auto = as the model computes keys and values; fp8 = e4m3, see `kernels/fp8_cache.py`."""
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    prefix_cache_scope: Literal["key", "server"] = "key"
    batch_layout: Literal["auto", "padded", "packed"] = "auto"
    deterministic: bool = False
    """Logits of a row have the same bits whatever shares its steps, see `kernels/deterministic.py`."""
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    """Of generated tokens: the model's own, or of what is drawn from."""
    lag: Literal[0, 1] | None = None
    """Steps launched ahead of the tokens read; None = 1 on a GPU, 0 on a CPU."""
    threads: int | None = None
    """Intra-op threads on the CPU; None = one per core, fewer for a small model."""
    served_model_name: str | None = None
    """Label `model_name` of the metrics; None = `model`."""
    step_timeout: float | None = None
    """Seconds without a finished step, work queued, after which the engine is ended and restarted; None = 60 on a GPU,
    600 on a CPU, where one full step of a large model takes minutes."""
