"""One step on its way from a draft to a launch. Knows which positions of which rows it computes, not why."""

from dataclasses import dataclass, field

from ropeway.kernels.step import UNREAD, RowInput, RowState, StepInput
from ropeway.scheduler.row import Row


@dataclass(slots=True)
class StepPlan:
    """A launched step: `rows[i]` is computed by `step.rows[i]`. Made by `plan`, handed back to `update`.

    The block tables in `step` are the rows' own: read them at launch, they change later.
    """

    rows: list[Row]
    step: StepInput


@dataclass(slots=True)
class Draft:
    """A step while `Scheduler.plan` puts it together."""

    tokens_left: int
    """Of the step's token budget."""
    spans: dict[Row, range] = field(default_factory=dict)
    """The positions that each row computes, in the order of the rows in the step."""
    joins: list[RowState] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    victims: set[Row] = field(default_factory=set)
    """Rows that make room for others: not in this step."""
    oldest: Row | None = None
    """The oldest running row, once somebody asked."""

    def take(self, row: Row, span: range) -> None:
        """Puts a row into the step."""
        self.spans[row] = span
        self.tokens_left -= len(span)

    def drop(self, row: Row) -> None:
        """Takes a row out of the step again, or keeps it out."""
        self.victims.add(row)
        self.tokens_left += len(self.spans.pop(row, ()))

    def launch(self) -> StepPlan:
        """Advances the rows: from here on the step counts as launched."""
        parts = []
        for place, (row, span) in enumerate(self.spans.items()):
            unread = row.in_flight > 0
            sample = span.stop == row.num_tokens
            token_ids = [UNREAD] if unread else row.tokens[span.start : span.stop]
            prev_row = row.place if unread else -1
            parts.append(RowInput(row.state_slot, token_ids, span.start, row.block_table, prev_row, sample))
            row.computed = span.stop
            row.in_flight += sample
            row.place = place
        return StepPlan(list(self.spans), StepInput(parts, self.joins, self.copies))
