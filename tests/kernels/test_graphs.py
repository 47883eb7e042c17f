"""StepGraphs: which size a step takes; and steps rounded up to sizes, replayed, against steps as they come."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import BLOCK_SIZE, CPU
from replayed import CHUNK, NUM_BLOCKS, ROWS, TrueLengths, repeat, requests, run

from ropeway.kernels.graphs import (
    CudaCapture,
    StepGraph,
    StepGraphs,
    Uncapturable,
    decode_sizes,
    first_sizes,
    mixed_sizes,
)
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampler import Lines, Sampler
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.staging import Size
from ropeway.kernels.triton_sampler import Kind, TritonSampler

SIZES = [Size(1, 1), Size(4, 4), Size(ROWS, ROWS), Size(12, 4), Size(CHUNK, 4), Size(CHUNK, ROWS), Size(28, ROWS + 1)]


class TorchSampler(TritonSampler):
    """The reference, called as the kernels are: in the interpreter they would take a minute."""

    def launch(self, logits: torch.Tensor, lines: Lines, kind: Kind, bans: Sequence[tuple[int, int]] = ()) -> None:
        sampled = Sampler.sample(self, logits, lines.slots, lines.positions)
        lines.token_ids.copy_(sampled.token_ids)
        lines.finite.copy_(sampled.finite)


def make_graphs(sizes: list[Size]) -> StepGraphs:
    return StepGraphs(sizes, lambda size: StepGraph(size, lambda: None, {}))


def graph_runner(sizes: list[Size] | None) -> ModelRunner:
    """In float64: a flipped token is a bug, and no rounding."""
    model = build(FAMILIES["llama"]).double()
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    sampler = TorchSampler(SamplingState(ROWS, VOCAB_SIZE, CPU))
    forward = TrueLengths(PackedForward(model, pool))
    return ModelRunner(forward, pool, sampler, BLOCK_SIZE, CPU, sizes=sizes, capture=repeat if sizes else None)


@pytest.mark.parametrize("seed", [0, 1])
def test_rounded_steps_give_the_same_tokens(seed: int) -> None:
    """Guards pads and static tensors: whatever the step before left in them must not reach a row. Rows join, leave,
    are preempted, forked and aborted; their prompts come in chunks; sizes are captured in between, too."""
    plain, rounded = graph_runner(None), graph_runner(SIZES)
    expected = run(plain, requests(seed), lambda step: None)
    assert rounded.prepare(lambda stage, share: None) is None
    static = rounded._staging._static

    def poison(step: int) -> None:
        static.fill_(0x7E)
        if step % 9 == 5:
            rounded.idle_work()

    assert run(rounded, requests(seed), poison) == expected
    assert not rounded.idle_work()


def test_pads_count_as_computed() -> None:
    """Guards padding_ratio: what a step is rounded up by is computed for nobody."""
    rounded = graph_runner([Size(16, ROWS + 1), Size(4, 4)])
    rounded.prepare(lambda stage, share: None)
    seen = set()
    launch = rounded.launch

    def spy(step):  # type: ignore[no-untyped-def]
        flight = launch(step)
        seen.add((sum(len(row.token_ids) for row in step.rows), len(step.rows), flight.computed_slots))
        return flight

    rounded.launch = spy  # type: ignore[method-assign]
    run(rounded, requests(3), lambda step: None)
    assert (rounded.mixed_sizes, graph_runner(None).mixed_sizes) == ([16], [])
    assert {slots for tokens, rows, slots in seen if tokens == rows <= 4} == {4}
    assert {slots for tokens, rows, slots in seen if rows < tokens <= 16} == {16}
    assert all(tokens == slots for tokens, rows, slots in seen if tokens > 16)


def test_a_step_takes_the_smallest_size_with_room() -> None:
    """Guards against steps that do not fit: pads need a row, a decode step's sizes are those without chunks."""
    graphs = make_graphs([Size(4, 4), Size(8, 8), Size(16, 3), Size(16, 9), Size(32, 9)])
    while graphs.add_next():
        pass
    wanted = {
        (3, 3): (4, 4),
        (4, 4): (4, 4),
        (5, 5): (8, 8),
        (9, 9): None,
        (5, 2): (16, 3),
        (16, 3): (16, 3),
        (15, 3): (16, 9),
        (17, 9): None,
        (32, 9): (32, 9),
        (33, 2): None,
    }
    for (tokens, rows), size in wanted.items():
        graph = graphs.find(Size(tokens, rows))
        assert (graph and (graph.size.tokens, graph.size.rows)) == size, (tokens, rows)


def test_a_missing_size_is_made_up_for() -> None:
    """Guards servers that have just started: the next larger size serves, unless it wastes too much."""
    graphs = make_graphs([Size(4, 4), Size(8, 8), Size(32, 32)])
    graphs.add(Size(32, 32))
    assert graphs.find(Size(3, 3)) is None
    graphs.add(Size(8, 8))
    assert graphs.find(Size(3, 3)) is graphs.captured[Size(8, 8)]
    graphs.add(Size(4, 4))
    assert graphs.find(Size(3, 3)) is graphs.captured[Size(4, 4)]


def test_what_cannot_be_captured_is_tried_once() -> None:
    """Guards models whose code waits for the device: they are served without graphs, and not tried at every step."""
    tried = []

    def refuse(size: Size) -> StepGraph:
        tried.append(size)
        raise Uncapturable("it waits\nand more")

    graphs = StepGraphs([Size(4, 4), Size(8, 8)], refuse)
    assert graphs.add_next() and not graphs.add_next()
    assert graphs.refusal == "it waits"
    assert graphs.find(Size(4, 4)) is None
    assert tried == [Size(8, 8)]


class FakeGraph:
    """Remembers whether its capture was ended."""

    ended = 0

    def capture_begin(self, **options: object) -> None: ...

    def capture_end(self) -> None:
        FakeGraph.ended += 1

    def replay(self) -> None: ...


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_capture_that_fails_in_its_middle_is_refused(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards libraries that launch on a stream of their own, which only the capture itself shows: the server starts,
    without graphs. What lacks memory says so, as before."""
    stream = SimpleNamespace(device=CPU)
    fakes = {"Stream": lambda device: stream, "CUDAGraph": FakeGraph, "stream": nullcontext}
    fakes |= {name: lambda *args: None for name in ("graph_pool_handle", "synchronize", "set_sync_debug_mode")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    runs, ended = [], FakeGraph.ended

    def launches() -> None:
        runs.append(1)
        if len(runs) == 2:
            raise kind("not permitted when a stream is capturing")

    with pytest.raises(Uncapturable if kind is RuntimeError else kind, match="not permitted"):
        CudaCapture(CPU)(launches)
    assert len(runs) == 2 and FakeGraph.ended == ended + 1


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2048), (5, 128), (64, 512), (256, 8192), (1024, 2048)])
def test_sizes(rows: int, tokens: int) -> None:
    """Guards coverage: every step with at most so many rows and 2,048 tokens has a size, and not a much larger one."""
    sizes = decode_sizes(rows) + mixed_sizes(rows, tokens, 8_000_000_000)
    assert len(set(sizes)) == len(sizes) < 110
    graphs = make_graphs(sizes)
    while graphs.add_next():
        pass
    for count in range(1, rows + 1):
        graph = graphs.find(Size(count, count))
        assert graph and graph.size.rows <= max(count * 2, count + 8) and graph.size.rows <= rows
    for count in (129, 200, 511, 2000, 2048):
        if rows < count <= tokens:
            graph = graphs.find(Size(count, rows))
            assert graph and graph.size.tokens <= max(count * 1.5, 256), (count, graph)
    first = first_sizes(sizes)
    assert first == sorted(first, reverse=True)
    early = make_graphs(sizes)
    for size in first:
        early.add(size)
    for size in sizes:
        assert early.find(size), "a step that finds no graph before the first idle moment"


def test_small_models_have_sizes_for_whole_budgets() -> None:
    """Guards prompts of small models: a step of 8,192 tokens took the host longer to launch than the device to
    compute. It must not take a size that it fills by half, nor hold a large model's start up."""

    def tokens(num_parameters: float) -> list[int]:
        return sorted({size.tokens for size in mixed_sizes(256, 8192, int(num_parameters))})

    assert tokens(8e9)[-1] == 2048
    assert tokens(2e9)[-2:] == [2048, 4096]
    assert tokens(0.6e9)[-3:] == [2048, 4096, 8192]
    assert max(mixed_sizes(256, 3000, int(0.6e9))).tokens == 3000
    graphs = make_graphs(mixed_sizes(256, 8192, int(0.6e9)))
    while graphs.add_next():
        pass
    found = {count: graphs.find(Size(count, 100)) for count in (2049, 3800, 3900, 4097, 7600, 7800, 8192)}
    assert {count: graph.size for count, graph in found.items() if graph} == {
        3900: Size(4096, 257),
        7800: Size(8192, 257),
        8192: Size(8192, 257),
    }
