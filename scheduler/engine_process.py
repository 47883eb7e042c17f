"""Main of the engine process: loads the model, then lets the engine step. Knows neither how.

Nothing heavy is imported before the first heartbeat is out. An exception in a step ends the process: the supervisor
starts another, and the workers send their unfinished requests again.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import msgspec

from ropeway.kernels.errors import LoadError
from ropeway.kernels.step import scores_per_step
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.config import EngineConfig
from ropeway.scheduler.engine import Engine, Runner
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import Heartbeat, LoadFailed, ModelInfo, Phase
from ropeway.scheduler.pace import Pace
from ropeway.scheduler.processes import EngineContext, send_control
from ropeway.scheduler.row import BuildEdit
from ropeway.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ropeway.kernels.build import RunnerInfo
    from ropeway.scheduler.processors import Registry

HEARTBEAT_SECONDS = 0.25
GPU_STEP_TIMEOUT, CPU_STEP_TIMEOUT = 60.0, 600.0
"""Seconds, see `EngineConfig.step_timeout`."""
MAX_MESSAGE = 2000
"""Characters of a load failure's message."""

Progress = Callable[[Phase, str, float], None]
"""progress(phase, stage for people, share of the whole start done)."""


@dataclass(slots=True, frozen=True)
class Loaded:
    """A model that is ready to step."""

    runner: Runner
    info: ModelInfo
    lag: Literal[0, 1]
    builders: Mapping[str, BuildEdit] = field(default_factory=dict)
    """Of rows' edits."""
    mixed_sizes: Sequence[int] = ()
    """Tokens of the steps with prompts and decode rows that are computed without pads, ascending."""


Load = Callable[[EngineConfig, str, Progress], Loaded]
"""load(config, text_dir, progress): text_dir is a folder to be made. Raises kernels' LoadError."""


def main(context: EngineContext) -> None:
    """The engine process."""
    serve(context, load_model)


def load_model(config: EngineConfig, text_dir: str, progress: Progress) -> Loaded:
    """Model, memory plan and warm-up from `kernels`, text files for the API workers. Raises LoadError."""
    progress("loading", "starting torch and transformers", 0.0)
    _let_threads_sleep()
    from ropeway.kernels.build import build_runner
    from ropeway.scheduler.processors import Registry
    from ropeway.scheduler.text_export import export_text

    registry = Registry.installed()
    runner, info = build_runner(
        config.runner,
        progress=lambda stage, done: progress("loading", stage, 0.05 + 0.8 * done),
        compiling=lambda stage, done: progress("compiling", stage, 0.85 + 0.1 * done),
    )
    progress("loading", "writing the tokenizer", 0.95)
    tokenizer = export_text(config, text_dir)
    on_gpu = info.device.startswith("cuda")
    model_info = ModelInfo(
        **asdict(info),
        model=config.runner.model,
        max_num_seqs=config.runner.max_num_seqs,
        max_num_batched_tokens=config.runner.max_num_batched_tokens,
        text_dir=text_dir,
        step_timeout=config.step_timeout or (GPU_STEP_TIMEOUT if on_gpu else CPU_STEP_TIMEOUT),
        logits_processors=sorted(registry.logits_processors),
        stopping_criteria=sorted(registry.stopping_criteria),
    )
    lag = config.lag if config.lag is not None else (1 if on_gpu else 0)
    return Loaded(runner, model_info, lag, _builders(registry, tokenizer, info), runner.mixed_sizes)


def _let_threads_sleep() -> None:
    """How torch's threads wait on the CPU; to be called before torch is loaded, when OpenMP reads both, once.

    Threads that spin long while they wait for each other starve on cores that workers and clients use too: a decode
    step of a small model took 160 ms instead of 15 on two busy cores. Threads that sleep at once wake late: 2 cores
    were hardly faster than one. So they spin for some 50 us.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _builders(registry: "Registry", tokenizer: "PreTrainedTokenizerBase", info: "RunnerInfo") -> dict[str, BuildEdit]:
    """Of every kind of edit that a row may ask for."""
    from ropeway.scheduler.grammar import GRAMMAR, Grammars
    from ropeway.scheduler.grammar_edit import GrammarBuilder
    from ropeway.scheduler.processors import PROCESSORS, ProcessorBuilder
    from ropeway.scheduler.search_edits import SEARCH_EDITS
    from ropeway.scheduler.thinking_budget import THINKING_BUDGET, ThinkingBudgetBuilder

    return {
        GRAMMAR: GrammarBuilder(Grammars(tokenizer.backend_tokenizer.to_str, info.vocab_size)),
        THINKING_BUDGET: ThinkingBudgetBuilder(partial(tokenizer.decode, skip_special_tokens=False)),
        PROCESSORS: ProcessorBuilder(registry, tokenizer, info.vocab_size, info.device),
        **SEARCH_EDITS,
    }


def serve(context: EngineContext, load: Load) -> None:
    """Loads and loops until the supervisor says stop or is gone. Exits with 1 if the model cannot be loaded.

    An exception in the loop ends the process at once, with its traceback and 1.
    """
    pulse = Pulse(context)
    try:
        loaded = load(context.config, f"{context.directory}/text{context.generation}", pulse.progress)
    except Exception as error:
        pulse.stop()
        message = str(error)
        if not isinstance(error, LoadError):  # nobody foresaw it: the sentence alone will not do
            traceback.print_exc()
            message = f"Loading {context.config.runner.model} failed: {type(error).__name__}: {error}"
        send_control(context.control, LoadFailed(context.generation, message[:MAX_MESSAGE]))
        sys.exit(1)
    from ropeway.scheduler.engine_loop import EngineLoop

    info = msgspec.structs.replace(loaded.info, start_seconds=pulse.stage_seconds())
    loop = EngineLoop(context, build_engine(context.config, loaded), info)
    pulse.stop()
    try:
        loop.run()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # Tidying up takes torch seconds, in which the workers would believe that the engine lives.
        os._exit(1)


def build_engine(config: EngineConfig, loaded: Loaded) -> Engine:
    """Scheduler and engine around a loaded model."""
    info = loaded.info
    limits = Limits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_scored_tokens=scores_per_step(info.vocab_size),
        prefix_cache_scope=config.prefix_cache_scope,
    )
    pool = BlockPool(info.num_blocks, info.block_size, caching=config.enable_prefix_caching)
    scheduler = Scheduler(limits, pool, loaded.builders, Pace(loaded.mixed_sizes, config.optimize_for))
    return Engine(scheduler, loaded.runner, loaded.lag)


class Pulse:
    """The heartbeat while loading and compiling: a thread, since a long load is no hang."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._beat = Heartbeat(context.generation, "loading")
        self._begun: list[tuple[str, float]] = []
        """(stage, when it began)"""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def progress(self, phase: Phase, stage: str, done: float) -> None:
        """The next heartbeat says so."""
        self._beat = Heartbeat(self._context.generation, phase, stage, done)
        self._begun.append((stage, time.monotonic()))

    def stage_seconds(self) -> dict[str, float]:
        """Stage -> seconds to the next one, of the last one until now; "... of 64 tokens" and its like are one."""
        seconds: dict[str, float] = {}
        for (stage, begun), (_, end) in pairwise([*self._begun, ("", time.monotonic())]):
            name = stage.split(" of ")[0]
            seconds[name] = seconds.get(name, 0.0) + end - begun
        return seconds

    def stop(self) -> None:
        """No heartbeat comes after it; the control pipe is the caller's alone."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            send_control(self._context.control, self._beat)
            if self._stop.wait(HEARTBEAT_SECONDS):
                return
