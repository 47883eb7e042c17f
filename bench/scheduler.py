"""What the host does per step without a model: plan, update, messages to the API workers. One JSON line per size.

    python bench/scheduler.py                    # 16, 64, 256 and 1024 rows that decode
    python bench/scheduler.py --rows 256 --steps 5000 --workers 8

Rows of about 128 prompt tokens decode with the lag of a GPU: a step is planned before the last one is read. The runner
is a loop that hands out tokens. CPU time of single steps; us per row must stay flat. Collections of Python's garbage
collector count where they fall, over a heap of `--objects` long-lived objects such as torch and transformers leave
behind; `--gc default` shows what they cost without `processes.calm_gc`, which engine and workers call.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec
from about import about

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import StepOutput
from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.limits import Limits
from ropeway.scheduler.messages import AddRequest, ChoiceStart, StepOutputs
from ropeway.scheduler.plan import StepPlan
from ropeway.scheduler.processes import calm_gc
from ropeway.scheduler.scheduler import Scheduler

SIZES = [16, 64, 256, 1024]
PROMPT, BLOCK_SIZE, VOCABULARY, WARM_STEPS = 128, 16, 50_000, 20


def crowd(rows: int, steps: int, workers: int) -> Scheduler:
    """A scheduler whose rows have long prompts behind them and `steps` tokens before them."""
    length = PROMPT + steps + 2 * WARM_STEPS
    pool = BlockPool(1 + rows * (length // BLOCK_SIZE + 1), BLOCK_SIZE)
    scheduler = Scheduler(Limits(rows, rows * PROMPT, length + 1), pool)
    for row in range(rows):
        prompt = [(row * 7919 + i) % VOCABULARY for i in range(PROMPT - row % BLOCK_SIZE)]
        sampling = SamplingParams(temperature=0, stop_token_ids=(VOCABULARY,))
        scheduler.add(row % workers, AddRequest(1, row, prompt, sampling, length, [ChoiceStart(0)], arrival=row))
    return scheduler


def timed(times: list[float], work: Callable[[], Any]) -> Any:
    """The result of `work`, whose CPU seconds are noted."""
    begin = time.thread_time()
    result = work()
    times.append(time.thread_time() - begin)
    return result


def measure(rows: int, steps: int, workers: int) -> dict[str, Any]:
    """The row of one size."""
    scheduler = crowd(rows, steps, workers)
    encode = msgspec.msgpack.Encoder().encode
    plans, updates, messages = [], [], []
    unread: StepPlan | None = None

    def send() -> list[bytes]:
        return [encode(StepOutputs(1, outputs)) for outputs in scheduler.take_outputs().values()]

    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            plans.clear(), updates.clear(), messages.clear()
        plan = timed(plans, lambda: scheduler.plan(0.0))
        if unread is not None:
            ids = count(step)
            output = StepOutput([next(ids) % VOCABULARY for _ in unread.rows], [True] * len(unread.rows))
            timed(updates, lambda plan=unread, output=output: scheduler.update(plan, output, 0.0))
            timed(messages, send)
        unread = plan
    whole = [sum(parts) for parts in zip(plans, updates, messages, strict=True)]
    return {
        "rows": rows,
        "us_per_row": round(1e6 * statistics.median(whole) / rows, 3),
        "step_ms": milliseconds(whole),
        "plan_ms": milliseconds(plans),
        "update_ms": milliseconds(updates),
        "messages_ms": milliseconds(messages),
    }


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Percentiles."""
    ordered = sorted(seconds)
    places = {"50": len(ordered) // 2, "99": len(ordered) * 99 // 100, "max": len(ordered) - 1}
    return {name: round(1000 * ordered[place], 3) for name, place in places.items()}


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help=f"repeatable; default: {SIZES}")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=4, help="API workers among which the rows are divided")
    parser.add_argument("--objects", type=int, default=1_000_000, help="long-lived objects on the heap")
    parser.add_argument("--gc", choices=("calm", "default"), default="calm")
    options = parser.parse_args()
    ballast = [[index] for index in range(options.objects)]
    if options.gc == "calm":
        calm_gc()
    for rows in options.rows or SIZES:
        row = measure(rows, options.steps, options.workers)
        print(
            json.dumps(row | {"steps": options.steps, "gc": options.gc, "objects": len(ballast)} | about()), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
