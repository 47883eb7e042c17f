"""Runs steps: `launch` puts one on the device, `Flight.read` waits for what it gave. Knows no request.

A flight may be read after the next launch: a row's token that is still unread then goes from one launch to the next
on the device. `launch` waits for nothing: inputs and results go through pinned memory, all on one stream, in launch
order:

    joins | inputs | block copies | forward | sampler | results to the host

Edits of rows run on the host in the sampler's launch, while the device computes the forward.

On a GPU, packed, forward and sampler are replays of CUDA graphs where there is one of about the step's size; else they
are launched kernel by kernel.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.forward import Forward
from ropeway.kernels.graphs import Capture, Launches, StepGraph, StepGraphs, first_sizes
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.loader import Progress
from ropeway.kernels.sampler import Lines, Sampled, Sampler
from ropeway.kernels.scoring import Scored, Scoring
from ropeway.kernels.staging import Columns, Size, Staged, Staging
from ropeway.kernels.step import StepInput, StepOutput, TokenLogprobs
from ropeway.kernels.triton_ahead import CompileAhead, one_by_one
from ropeway.kernels.triton_sampler import KINDS, TritonSampler


@dataclass(slots=True)
class _Clock:
    """When a step began and ended on the device, and when its results were on the host. A CPU has no such events."""

    events: list[torch.cuda.Event]

    @classmethod
    def on(cls, device: torch.device) -> "_Clock":
        count = 3 if device.type == "cuda" else 0
        return cls([torch.cuda.Event(enable_timing=True) for _ in range(count)])  # type: ignore[no-untyped-call]

    def mark(self, index: int) -> None:
        """0 = the forward begins, 1 = the sampler has ended, 2 = the results are on the host."""
        if self.events:
            self.events[index].record()

    def wait(self) -> None:
        if self.events:
            self.events[2].synchronize()

    def idle_since(self, before: "_Clock") -> float:
        """Seconds between the end of the step before and the beginning of this one, both done."""
        return max(0.0, before.events[1].elapsed_time(self.events[0]) / 1000) if self.events else 0.0

    @property
    def seconds(self) -> float:
        """From the beginning of the forward to the end of the sampler, both done; 0 on a CPU."""
        return self.events[0].elapsed_time(self.events[1]) / 1000 if self.events else 0.0


@dataclass(slots=True)
class Flight:
    """A step on its way."""

    samples: np.ndarray
    """[B] bool: rows that sample."""
    top_counts: dict[int, int]
    """Row -> most likely tokens to report, for rows that want logprobs."""
    sampled: Sampled
    """On the host, once the step is done."""
    computed_slots: int
    clock: _Clock
    before: _Clock | None
    """Of the step before, if that was unread when this one was launched."""
    scored: tuple[Scoring, Scored] | None = None
    """Of a step that scores; on the host, once it is done."""
    was_read: bool = field(default=False)

    def read(self) -> StepOutput:
        """Wait for the step and bring its results to the host."""
        self.clock.wait()
        self.was_read = True
        rows = len(self.samples)
        return StepOutput(
            np.where(self.samples, self.sampled.token_ids.numpy()[:rows], -1).tolist(),
            (self.sampled.finite.numpy()[:rows] | ~self.samples).tolist(),
            self._logprobs(),
            computed_slots=self.computed_slots,
            host_gap_seconds=0.0 if self.before is None else self.clock.idle_since(self.before),
            errors=self.sampled.errors,
            scored={} if self.scored is None else self.scored[0].tokens(self.scored[1]),
            seconds=self.clock.seconds,
        )

    def _logprobs(self) -> dict[int, TokenLogprobs]:
        if self.sampled.logprobs is None:
            return {}
        chosen = self.sampled.logprobs.tolist()
        ids = [] if self.sampled.top_ids is None else self.sampled.top_ids.tolist()
        values = [] if self.sampled.top_logprobs is None else self.sampled.top_logprobs.tolist()
        return {
            row: TokenLogprobs(chosen[row], list(zip(ids[row], values[row], strict=True))[:count] if count else [])
            for row, count in self.top_counts.items()
        }


class ModelRunner:
    """One model, one KV pool, one sampling state; steps run in launch order.

    Args:
        forward, pool, sampler: on `device`; the pool's blocks have `block_size` tokens.
        max_blocks: blocks that a row may have; None = all of the pool's.
        sizes: of the steps that are captured once `prepare` was called; packed layout and `TritonSampler` only.
        capture: how.
        logits_dtype: of what `forward` returns.
    """

    def __init__(
        self,
        forward: Forward,
        pool: KVPool,
        sampler: Sampler,
        block_size: int,
        device: torch.device,
        *,
        max_blocks: int | None = None,
        sizes: list[Size] | None = None,
        capture: Capture | None = None,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._sampler = sampler
        self._device = device
        width = max_blocks or pool.num_blocks - 1
        largest = Size(max(s.tokens for s in sizes), max(s.rows for s in sizes)) if sizes else None
        self._staging = Staging(sampler.state, block_size, width, device, largest)
        self._longest = width * block_size
        self._last: Flight | None = None
        self._logits = torch.empty(0, device=device)
        self._graphs: StepGraphs | None = None
        if sizes and largest is not None and capture is not None:
            self._logits = torch.empty(largest.rows, sampler.state.vocab_size, dtype=logits_dtype, device=device)
            self._graphs = StepGraphs(sizes, partial(self._halves, capture=capture))

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Flight:
        """Joins, block copies, forward, sampling. `UNREAD` ids are those that the previous launch sampled."""
        self._sampler.state.join(step.joins)
        columns = Columns.of(step.rows)
        graph = self._graphs.find(columns.size) if self._graphs is not None and not step.scores else None
        staged = self._staging.stage(step, columns, None if graph is None else graph.size)
        self._pool.copy_blocks(staged.copies)
        clock = _Clock.on(self._device)
        clock.mark(0)
        lines = self._staging.lines(staged)
        scored = None
        if graph is None:
            batch = self._plain_batch(staged)
            if step.scores:
                logits, scored = self._score(step, columns, batch)
            else:
                logits = self._forward(batch)
            sampled = self._sampler.sample_lines(logits, lines)
            computed_slots = self._forward.computed_slots(batch)
        else:
            sampled = self._replay(graph, lines)
            computed_slots = graph.size.tokens
        clock.mark(1)
        flight = Flight(
            columns.samples,
            self._top_counts(staged.sample_slots),
            self._to_host(sampled),
            computed_slots,
            clock,
            None if self._last is None or self._last.was_read else self._last.clock,
            scored,
        )
        clock.mark(2)
        self._last = flight
        return flight

    @property
    def mixed_sizes(self) -> list[int]:
        """Tokens of the captured steps that are no mere decode steps, ascending: what a step is rounded up to."""
        captured = self._graphs.captured if self._graphs is not None else {}
        return sorted({size.tokens for size in captured if size.tokens > size.rows})

    def idle_work(self) -> bool:
        """Capture one more size; False if none is left."""
        return self._graphs is not None and self._graphs.add_next()

    def prepare(self, progress: Progress, ahead: CompileAhead = one_by_one) -> str | None:
        """Capture the sizes without which a server is slow; all kernels are compiled on the way, or ahead.

        Returns why there are no graphs, in words that follow "because"; None if there are."""
        if self._graphs is None:
            return "they need a GPU and the packed layout"
        self._pool.copy_blocks(torch.zeros(1, 2, dtype=torch.int32, device=self._device))
        wanted = first_sizes(self._graphs.sizes)
        ahead(lambda: [self._halves(size, _as_they_are) for size in wanted])
        for number, size in enumerate(wanted):
            progress(f"preparing steps of {size.tokens} tokens", number / len(wanted))
            self._graphs.add(size)
        return None if self._graphs.captured else self._graphs.refusal

    def _score(
        self, step: StepInput, columns: Columns, batch: LeftPaddedBatch
    ) -> tuple[torch.Tensor, tuple[Scoring, Scored]]:
        """The forward of a step that scores: logits of the rows' last tokens, and the scores on their way."""
        scoring = Scoring(step.scores, columns.counts)
        logits = self._forward(scoring.widen(batch))
        return scoring.sampled(logits), (scoring, scoring.score(logits).on_host())

    def _plain_batch(self, staged: Staged) -> LeftPaddedBatch:
        counts = staged.columns.counts
        query_lens, context_lens = tuple(counts.tolist()), tuple((staged.columns.starts + counts).tolist())
        return self._staging.batch(staged.tensors, query_lens, context_lens)

    def _top_counts(self, sample_slots: np.ndarray) -> dict[int, int]:
        state, counts = self._sampler.state, {}
        for row in np.flatnonzero(state.wants_logprobs[sample_slots]).tolist():
            needs = state.needs[sample_slots[row]]
            assert needs is not None and needs.logprobs is not None
            counts[row] = needs.logprobs
        return counts

    def _to_host(self, sampled: Sampled) -> Sampled:
        """A copy in memory that a GPU can write to while nobody waits."""

        def copy(result: torch.Tensor) -> torch.Tensor:
            host = torch.empty_like(result, device="cpu", pin_memory=self._device.type == "cuda")
            return host.copy_(result, non_blocking=True)

        logprobs = (sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
        chosen, top_ids, top = (None if result is None else copy(result) for result in logprobs)
        return Sampled(copy(sampled.token_ids), copy(sampled.finite), chosen, top_ids, top, sampled.errors)

    def _replay(self, graph: StepGraph, lines: Lines) -> Sampled:
        """Forward and sampler; lines that no captured kind covers are sampled plainly."""
        assert isinstance(self._sampler, TritonSampler)
        graph.forward()
        logits = self._logits[: graph.size.rows]
        sampler = graph.samplers.get(self._sampler.kind(lines))
        if sampler is None:
            return self._sampler.sample_lines(logits, lines)
        sampler()
        return self._sampler.report(logits, lines)

    @torch.inference_mode()
    def _halves(self, size: Size, capture: Capture) -> StepGraph:
        """Both halves of a step of this size, captured while it holds nothing but pads."""
        sampler = self._sampler
        assert isinstance(sampler, TritonSampler)
        unread = self._staging.last_ids.clone()
        columns = Columns.of([])
        staged = self._staging.stage(StepInput([]), columns, size)
        lines = self._staging.lines(staged)
        logits = self._logits[: size.rows]
        # Bounds for whatever is replayed: of decode rows each has one token, of others one may have all of them.
        query_lens = (1 if size.tokens == size.rows else size.tokens,) + (1,) * (size.rows - 1)

        def forward() -> None:
            batch = self._staging.batch(staged.tensors, query_lens, (self._longest,) * size.rows)
            logits.copy_(self._forward(batch))

        try:
            return StepGraph(
                size,
                capture(forward),
                {kind: capture(partial(sampler.launch, logits, lines, kind)) for kind in KINDS[:2]},
            )
        finally:
            self._staging.last_ids.copy_(unread)


def _as_they_are(launches: Launches) -> Launches:
    """A capture that captures nothing."""
    launches()
    return launches
