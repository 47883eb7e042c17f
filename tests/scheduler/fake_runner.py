"""A deterministic model without weights, over a real pool of token ids.

`launch` writes every computed token's id into its (block, offset), reads the row's whole context back through its
block table and samples a hash of it. So a wrong block, a wrong copy, a block reused too early, a stale read or a
sampling state of somebody else changes tokens, as it would on a device. What a device would do silently is asserted.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import UNREAD, RowInput, RowState, ScoredToken, StepInput, StepOutput, TokenLogprobs

VOCAB = 50
EMPTY = -7
"""What a slot holds that was never written."""


def next_token(context: list[int], num_output: int, params: SamplingParams) -> int:
    """The model and the sampler: a hash of context, position and seed. Stop tokens are banned up to min_tokens."""
    seed = 0 if params.temperature == 0 else params.seed
    banned = params.stop_token_ids if num_output < params.min_tokens else ()
    for attempt in range(1000):
        token = hash((tuple(context), len(context), seed, params.temperature == 0, attempt)) % VOCAB
        if token not in banned:
            return token
    raise AssertionError("every token is banned")


def score(context: list[int], target: int) -> float:
    """The logprob of a token behind a context."""
    return -1.0 - hash((tuple(context), target)) % 1000


@dataclass
class FakeFlight:
    """Computed at launch, as on a device; the scheduler must not know more than what was read."""

    output: StepOutput
    was_read: bool = False

    def read(self) -> StepOutput:
        assert not self.was_read
        self.was_read = True
        return self.output


@dataclass
class FakeRunner:
    """Blocks of token ids in place of K and V; per state slot the parameters and the history of its row.

    Args:
        broken: (seed, position) whose logits are not finite; the position is that of the sampled token.
        is_published: whether a block can be found in the prefix index.
    """

    num_blocks: int
    block_size: int
    broken: frozenset[tuple[int, int]] = frozenset()
    is_published: Callable[[int], bool] = lambda block: False
    pool: list[list[int]] = field(init=False)
    states: dict[int, RowState] = field(default_factory=dict)
    history: dict[int, list[int]] = field(default_factory=dict)
    last_sampled: list[int] = field(default_factory=list)
    steps: list[StepInput] = field(default_factory=list)
    flights: list[FakeFlight] = field(default_factory=list)
    idle_pieces: int = 0
    """Pieces of idle work there are to do."""
    idle_calls: int = 0

    def __post_init__(self) -> None:
        self.pool = [[EMPTY] * self.block_size for _ in range(self.num_blocks)]

    def launch(self, step: StepInput) -> FakeFlight:
        self.steps.append(step)
        for join in step.joins:
            self.states[join.state_slot] = join
            self.history[join.state_slot] = [*join.prompt_ids, *join.output_ids]
        sources = {source: self.pool[source].copy() for source, _ in step.copies}
        for source, destination in step.copies:
            self.pool[destination] = sources[source].copy()
        self._check_rows(step)
        self._write(step)
        sampled = [self._sample(row) for row in step.rows]
        self.last_sampled = sampled
        flight = FakeFlight(self._output(step, sampled))
        self.flights.append(flight)
        return flight

    def idle_work(self) -> bool:
        self.idle_calls += 1
        return self.idle_calls <= self.idle_pieces

    def _check_rows(self, step: StepInput) -> None:
        slots = [row.state_slot for row in step.rows]
        assert len(set(slots)) == len(slots), "two rows share a state slot"
        sources = {source for source, _ in step.copies}
        destinations = [destination for _, destination in step.copies]
        assert len(set(destinations)) == len(destinations) and not sources & set(destinations), "copies depend on order"
        for row in step.rows:
            assert row.token_ids and UNREAD not in row.token_ids[:-1]
            assert (row.token_ids[-1] == UNREAD) == (row.prev_row >= 0)
            assert 0 not in row.block_table and len(set(row.block_table)) == len(row.block_table)
            assert len(row.block_table) * self.block_size >= row.start + len(row.token_ids)

    def _write(self, step: StepInput) -> None:
        owners = Counter(block for row in step.rows for block in row.block_table)
        written = {destination for _, destination in step.copies}
        for row in step.rows:
            for position, token in enumerate(self._resolve(row), row.start):
                block = row.block_table[position // self.block_size]
                assert owners[block] == 1, "a shared block is written"
                self.pool[block][position % self.block_size] = token
                written.add(block)
        assert not any(map(self.is_published, written)), "a block is written while it can be found"

    def _resolve(self, row: RowInput) -> list[int]:
        if row.prev_row < 0:
            return row.token_ids
        token = self.last_sampled[row.prev_row]
        assert token >= 0, "the previous step sampled nothing there"
        return [*row.token_ids[:-1], token]

    def _sample(self, row: RowInput) -> int:
        if not row.sample:
            return -1
        length = row.start + len(row.token_ids)
        flat = [token for block in row.block_table for token in self.pool[block]]
        context = flat[:length]
        history, state = self.history[row.state_slot], self.states[row.state_slot]
        assert context == history, f"the cache holds {context}, the row is {history}"
        token = next_token(context, len(history) - len(state.prompt_ids), state.params)
        history.append(token)
        return token

    def _output(self, step: StepInput, sampled: list[int]) -> StepOutput:
        ends = [row.start + len(row.token_ids) for row in step.rows]
        params = [self.states[row.state_slot].params for row in step.rows]
        return StepOutput(
            token_ids=sampled,
            finite=[
                not (row.sample and (one.seed, end) in self.broken)
                for row, one, end in zip(step.rows, params, ends, strict=True)
            ],
            logprobs={
                index: TokenLogprobs(-float(end), [])
                for index, (row, one, end) in enumerate(zip(step.rows, params, ends, strict=True))
                if row.sample and one.logprobs is not None
            },
            scored={place: self._scored(step.rows[place], wanted.targets) for place, wanted in step.scores.items()},
            computed_slots=len(step.rows) * max(len(row.token_ids) for row in step.rows),
        )

    def _scored(self, row: RowInput, targets: list[int]) -> list[ScoredToken]:
        assert 0 < len(targets) <= len(row.token_ids)
        flat = [token for block in row.block_table for token in self.pool[block]]
        return [ScoredToken(score(flat[: row.start + i], target), 1, []) for i, target in enumerate(targets, 1)]
