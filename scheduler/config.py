"""What the engine is started with. Plain data: the command line fills it, the engine process reads it."""

from dataclasses import dataclass
from typing import Literal

from ropeway.kernels.runner_options import RunnerOptions
from ropeway.scheduler.pace import Goal


@dataclass(slots=True, frozen=True)
class EngineConfig:
    """One engine: what runs, with which texts and policies, watched how."""

    runner: RunnerOptions
    """The model and the memory and limits of its batch."""
    tokenizer: str | None = None
    chat_template: str | None = None
    """Template text (already read from its file) that replaces the model's own."""
    generation_config: str = "auto"
    """auto, none, or a generation-config file of the model that must be there."""
    enable_prefix_caching: bool = True
    prefix_cache_scope: Literal["key", "server"] = "key"
    optimize_for: Goal = "latency"
    lag: Literal[0, 1] | None = None
    """Steps launched ahead of the tokens read; None = 1 on a GPU, 0 on a CPU."""
    served_model_name: str | None = None
    """Label `model_name` of the metrics; None = the model's."""
    step_timeout: float | None = None
    """Seconds without a finished step, work queued, after which the engine is ended and restarted; None = 60 on a GPU,
    600 on a CPU, where one full step of a large model takes minutes."""
