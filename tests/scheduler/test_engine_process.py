"""The engine process: how it loads and fails to; then all of it on the demo model, killed in mid-stream."""

import asyncio
import multiprocessing
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from child_mains import failing_engine
from fake_runner import FakeRunner
from fake_server import BLOCK_SIZE, NUM_BLOCKS, model_info

from ropeway.kernels.errors import LoadError
from ropeway.kernels.runner_options import RunnerOptions
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler import engine_process
from ropeway.scheduler.client import EngineClient
from ropeway.scheduler.config import EngineConfig
from ropeway.scheduler.engine_process import Loaded, Pulse, build_engine, serve
from ropeway.scheduler.messages import (
    EngineReady,
    EngineReport,
    EngineStarting,
    Heartbeat,
    LoadFailed,
    Stop,
)
from ropeway.scheduler.processes import Child, EngineContext, WorkerContext, receive_control, send_control

DEMO_MODEL = Path(__file__).parents[2] / "server" / "demo_model"
LIMIT_S = 120.0
CONFIG = EngineConfig(RunnerOptions("fake"))


def reports(control: Connection) -> Iterator[EngineReport]:
    """What the engine says, as it comes."""
    while control.poll(LIMIT_S):
        message = receive_control(control)
        if isinstance(message, EngineReport):
            yield message


def test_a_long_load_is_no_silence() -> None:
    """Guards large models: heartbeats with stage and progress come while the loader does not return."""
    ours, theirs = multiprocessing.Pipe()
    seen_twice = threading.Event()

    def load(config: EngineConfig, text_dir: str, progress: Any) -> Loaded:
        assert (config.runner.model, text_dir) == ("m", "/nowhere/text3")
        progress("compiling", "reading weights", 0.5)
        assert seen_twice.wait(LIMIT_S)
        raise LoadError("Enough.")

    context = EngineContext(EngineConfig(RunnerOptions("m")), 3, "/nowhere", theirs, ())
    exits: list[int] = []

    def run() -> None:
        try:
            serve(context, load)
        except SystemExit as end:
            exits.append(end.code)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    beats = 0
    for report in reports(ours):
        if report == Heartbeat(3, "compiling", "reading weights", 0.5):
            beats += 1
            if beats == 2:
                seen_twice.set()
        if isinstance(report, LoadFailed):
            break
    assert report == LoadFailed(3, "Enough.")
    thread.join(LIMIT_S)
    assert exits == [1]
    ours.close()
    theirs.close()


def test_each_stage_of_the_start_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the start screen's figures: a stage lasts until the next one, its parts are one; none told is none."""
    ours, theirs = multiprocessing.Pipe()
    pulse = Pulse(EngineContext(EngineConfig(RunnerOptions("m")), 3, "/nowhere", theirs, ()))
    pulse.stop()
    assert pulse.stage_seconds() == {}
    clock = iter([1.0, 3.0, 4.0, 7.5])
    monkeypatch.setattr("ropeway.scheduler.engine_process.time.monotonic", lambda: next(clock))
    for stage in ("reading weights", "preparing steps of 8 tokens", "preparing steps of 4 tokens"):
        pulse.progress("loading", stage, 0.0)
    assert pulse.stage_seconds() == {"reading weights": 2.0, "preparing steps": 4.5}
    ours.close()
    theirs.close()


def test_a_failure_nobody_foresaw(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards bug reports: the sentence names the model and the error, the traceback goes to stderr."""
    ours, theirs = multiprocessing.Pipe()

    def load(*_: Any) -> Loaded:
        raise ZeroDivisionError("by zero" + "!" * 10_000)

    with pytest.raises(SystemExit):
        serve(EngineContext(EngineConfig(RunnerOptions("m")), 1, "/nowhere", theirs, ()), load)
    failure = next(report for report in reports(ours) if isinstance(report, LoadFailed))
    assert failure.message.startswith("Loading m failed: ZeroDivisionError: by zero!")
    assert len(failure.message) == engine_process.MAX_MESSAGE
    assert "Traceback" in capfd.readouterr().err
    ours.close()
    theirs.close()


def test_compiling_is_told_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards starts on a GPU: kernels that compile for minutes are no hang, and the start screen says what goes on."""
    seen: list[tuple[Any, ...]] = []

    def build_runner(*_: Any, progress: Any, compiling: Any, **__: Any) -> Any:
        progress("loaded", 1.0)
        compiling("preparing steps of 8 tokens", 0.5)
        raise LoadError("Enough.")

    monkeypatch.setattr("ropeway.kernels.build.build_runner", build_runner)
    with pytest.raises(LoadError):
        engine_process.load_model(CONFIG, "/nowhere", lambda *beat: seen.append(beat))
    assert [phase for phase, *_ in seen] == ["loading", "loading", "compiling"]
    assert seen[-1][1] == "preparing steps of 8 tokens"
    assert [done for *_, done in seen] == sorted(done for *_, done in seen)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_how_threads_wait(given: dict[str, str], used: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards busy cores, where spinning threads starve each other, and whoever says himself how threads wait."""
    environment = dict(given)
    monkeypatch.setattr("ropeway.scheduler.engine_process.os.environ", environment)
    engine_process._let_threads_sleep()
    assert environment == used


def test_a_failed_step_ends_the_process_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards readiness: an engine that dies must not look alive for as long as its threads and libraries end."""
    with tempfile.TemporaryDirectory(prefix="rw") as directory:
        child = Child("failing", failing_engine, lambda control: EngineContext(CONFIG, 1, directory, control, ()))
        ended = child.wait(30)
        child.kill()
        assert ended and child.close() == "exited with code 1"
    assert "ZeroDivisionError: in a step" in capfd.readouterr().err


def test_the_engine_has_the_limits_that_were_loaded() -> None:
    """Guards the memory plan: blocks and lengths come from what was loaded, not from what was wished for."""
    config = EngineConfig(
        RunnerOptions("m", max_num_seqs=999),
        enable_prefix_caching=False,
        prefix_cache_scope="server",
        optimize_for="throughput",
    )
    engine = build_engine(config, Loaded(FakeRunner(NUM_BLOCKS, BLOCK_SIZE), model_info(), 1, mixed_sizes=[128, 256]))
    limits = engine.scheduler.limits
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len) == (8, 32, 6000)
    assert (limits.prefix_cache_scope, engine.lag) == ("server", 1)
    assert (engine.scheduler.pool.num_blocks, engine.scheduler.pool.caching) == (NUM_BLOCKS, False)
    assert (engine.scheduler.pace.sizes, engine.scheduler.pace.goal) == ([128, 256], "throughput")
    lone = build_engine(EngineConfig(RunnerOptions("m")), Loaded(FakeRunner(8, 4), model_info(), 1))
    assert lone.scheduler.pace.goal == "latency"


class RealEngine:
    """Engine processes on the demo model, one generation after the other, and one client in this process."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.generation = 0
        self.control, workers_control = multiprocessing.Pipe()
        # The listener is the server's business: this client has none.
        self.client = EngineClient(WorkerContext(0, None, directory, workers_control, None))  # type: ignore[arg-type]
        self.child: Child | None = None

    def start(self) -> Child:
        self.generation += 1
        send_control(self.control, EngineStarting(self.generation))
        config = EngineConfig(
            RunnerOptions(str(DEMO_MODEL), device="cpu", max_model_len=256, kv_cache_bytes=2**23, threads=1)
        )

        def make(control: Connection) -> EngineContext:
            return EngineContext(config, self.generation, self.directory, control, (0,))

        self.child = Child("engine", engine_process.main, make)
        return self.child

    async def ready(self) -> None:
        """Plays the supervisor until the engine is ready."""
        assert self.child

        def wait() -> None:
            assert self.child
            for report in reports(self.child.control):
                assert not isinstance(report, LoadFailed), report
                if isinstance(report, EngineReady):
                    return

        await asyncio.to_thread(wait)
        await self.client.wait_ready()


async def tokens(client: EngineClient, seed: int, output: dict[int, list[int]]) -> None:
    """All tokens of one sampled request with two choices, as they come."""
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=seed, repetition_penalty=1.1, logprobs=1)
    async for rows in client.submit(list(range(20, 70)), sampling, 80, 2):
        for row in rows:
            output.setdefault(row.choice, []).extend(row.token_ids)
            assert row.error is None and len(row.logprobs or ()) == len(row.token_ids)


async def test_real_streams_survive_a_crash() -> None:
    """Guards resumed streams on a real model: sampled tokens, penalties included, equal those without the fault."""
    with tempfile.TemporaryDirectory(prefix="rw") as directory:
        real = RealEngine(directory)
        await real.client.start()
        try:
            first = real.start()
            await real.ready()
            assert real.client.info and real.client.info.architecture == "LlamaForCausalLM"
            assert (Path(real.client.info.text_dir) / "tokenizer.json").exists()
            expected: list[dict[int, list[int]]] = [{}, {}]
            await asyncio.gather(*(tokens(real.client, 7 + i, expected[i]) for i in range(2)))
            assert [len(choice) for one in expected for choice in one.values()] == [80] * 4
            found: list[dict[int, list[int]]] = [{}, {}]
            running = asyncio.gather(*(tokens(real.client, 7 + i, found[i]) for i in range(2)))
            while sum(len(choice) for one in found for choice in one.values()) < 80:
                await asyncio.sleep(0.01)
                assert not running.done()
            first.kill()
            first.close()
            real.start()
            await real.ready()
            await running
            assert found == expected
            assert real.child
            send_control(real.child.control, Stop())
            assert await asyncio.to_thread(real.child.wait, LIMIT_S)
            assert real.child.close() == "exited with code 0"
            real.child = None
        finally:
            if real.child and real.child is not first:
                real.child.kill()
            await real.client.close()
            real.control.close()
