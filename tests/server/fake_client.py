"""An engine client without an engine: its status and model facts are what a test sets."""

from pathlib import Path

from ropeway.scheduler.client import EngineStatus
from ropeway.scheduler.messages import ModelInfo


def model_info(text_dir: str | Path = "", **changes: object) -> ModelInfo:
    """Facts of a small model."""
    facts: dict[str, object] = {
        "model": "tiny",
        "architecture": "LlamaForCausalLM",
        "num_parameters": 3_600_000,
        "dtype": "float32",
        "device": "cpu",
        "layout": "packed",
        "layout_reason": "the probe found it exact",
        "vocab_size": 64,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "num_blocks": 100,
        "block_size": 16,
        "kv_cache_bytes": 2**20,
        "kv_cache_dtype": "float32",
        "weight_bytes": 2**21,
        "text_dir": str(text_dir),
        "step_timeout": 60.0,
    }
    return ModelInfo(**(facts | changes))  # type: ignore[arg-type]


def engine_status(reason: str = "", **changes: object) -> EngineStatus:
    """A ready engine, or one that is not for a reason."""
    facts: dict[str, object] = {
        "generation": 1,
        "phase": "stepping" if not reason else "loading",
        "stage": "reading weights" if reason == "loading" else "",
        "progress": 0.42 if reason == "loading" else 1.0,
        "ready": not reason,
        "reason": reason,
        "draining": reason == "draining",
        "running": 0,
        "waiting": 0,
        "kv_usage": 0.0,
    }
    return EngineStatus(**(facts | changes))  # type: ignore[arg-type]


class FakeClient:
    """Stands for `EngineClient` where no tokens are wanted."""

    def __init__(self, info: ModelInfo | None = None, reason: str = "") -> None:
        self.info = info
        self.status = engine_status(reason)
