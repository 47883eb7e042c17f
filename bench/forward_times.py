"""Times a packed step's forward on one GPU: modules as they are, fused, fused with fast linears, and deterministic.

    python bench/forward_times.py llama-8b
    python bench/forward_times.py qwen3-0.6b --rows 1,256 --context 2048
    python bench/forward_times.py llama-8b --stages "fast linears,deterministic" --prompt 8192

Weights are random, bf16. A forward (embedding to logits, no sampler) is captured in one CUDA graph and replayed; `ms`
is the mean of 20 replays. `kernels` and `parts` (ms by kind of kernel) are of one profiled replay. Kernels that start
before the one in front of them has ended count their waiting, so `parts` may add up to more than `ms`. One JSON line
per case, then a table.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable

import torch
from about import about
from make_model import SHAPES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.dummy import dummy_model
from ropeway.kernels.fusion import fuse
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.linear import use_fast_linears
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.step import RowInput, StepInput
from ropeway.kernels.triton_matmul import steady_linear

CUDA = torch.device("cuda")
BLOCK_SIZE = 16
REPLAYS = 20
KINDS = {
    "attention": ("attend", "merge", "_plan"),
    "rotation and KV write": ("rotate_and_write", "_write"),
    "norm": ("_normalise",),
    "gate": ("_gated",),
    "linear": ("nvjet", "gemm", "cutlass", "splitk", "gemv", "_one_row", "_few_rows", "_multiply"),
}
"""Parts of the names of kernels."""


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel is; other: everything that torch launches for an operation of its own."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def decode_batch(rows: int, context: int) -> LeftPaddedBatch:
    """Rows of one new token, each with a context of so many tokens in blocks of its own."""
    blocks = -(-context // BLOCK_SIZE)
    tables = [list(range(1 + row * blocks, 1 + (row + 1) * blocks)) for row in range(rows)]
    inputs = [RowInput(row, [7 + row], context - 1, table) for row, table in enumerate(tables)]
    return LeftPaddedBatch.build(StepInput(inputs), BLOCK_SIZE, CUDA)


def prompt_batch(tokens: int) -> LeftPaddedBatch:
    """One row that computes a whole prompt."""
    table = list(range(1, 1 - (-tokens // BLOCK_SIZE)))
    return LeftPaddedBatch.build(StepInput([RowInput(0, [7] * tokens, 0, table)]), BLOCK_SIZE, CUDA)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def mean_ms(replay: Callable[[], None]) -> float:
    """Of one replay, by device events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPLAYS


def kernels_of(replay: Callable[[], None]) -> tuple[int, dict[str, float]]:
    """(number of kernels, ms by kind) of one replay."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    parts: Counter[str] = Counter()
    for event in events:
        parts[kind_of(event.name)] += event.time_range.elapsed_us() / 1e3
    return len(events), {kind: round(ms, 3) for kind, ms in sorted(parts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", default="1,8,32,256", help="rows of the step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each row's context")
    parser.add_argument("--prompt", type=int, default=0, help="also a step of one row with so many tokens")
    parser.add_argument("--stages", default="plain,fused,fast linears,deterministic", help="to be timed, in this order")
    options = parser.parse_args()
    sizes = [int(rows) for rows in options.rows.split(",")]
    model = dummy_model(SHAPES[options.shape](), torch.bfloat16, CUDA)
    blocks = max(max(sizes) * -(-options.context // BLOCK_SIZE), -(-options.prompt // BLOCK_SIZE))
    pool = KVPool(1 + blocks, BLOCK_SIZE, fill=0.0)
    longest = max(options.context, options.prompt)
    undos: list[Callable[[], None]] = []
    stages: dict[str, Callable[[], object]] = {
        "plain": lambda: None,
        "fused": lambda: fuse(model, longest),
        "fast linears": lambda: undos.append(use_fast_linears(model)),
        "deterministic": lambda: [*(undo() for undo in undos), use_fast_linears(model, steady_linear)],
    }
    batches = {f"{rows} rows": decode_batch(rows, options.context) for rows in sizes}
    if options.prompt:
        batches[f"{options.prompt} tokens"] = prompt_batch(options.prompt)
    table = []
    for stage, begin in stages.items():
        begin()
        if stage not in options.stages.split(","):
            continue
        forward = PackedForward(model, pool, deterministic=stage == "deterministic")
        for step, batch in batches.items():
            replay = captured(lambda forward=forward, batch=batch: forward(batch))
            ms = round(mean_ms(replay), 3)
            number, parts = kernels_of(replay)
            case = {"shape": options.shape, "stage": stage, "step": step, "context": options.context}
            print(json.dumps(case | {"ms": ms, "kernels": number, "parts": parts} | about()), flush=True)
            table.append(f"{stage:13s} {step:11s} {ms:8.3f} ms {number:5d} kernels")
    print("\n".join(table))


if __name__ == "__main__":
    main()
