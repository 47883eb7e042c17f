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
    spans: dict[Row, tuple[int, int]] = field(default_factory=dict)
    """The positions [start, stop) that each row computes, in the order of the rows in the step."""
    joins: list[RowState] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    victims: set[Row] = field(default_factory=set)
    """Rows that make room for others: not in this step."""
    oldest: Row | None = None
    """The oldest running row, once somebody asked."""

    def take(self, row: Row, start: int, stop: int) -> None:
        """Puts a row into the step."""
        self.spans[row] = start, stop
        self.tokens_left -= stop - start

    def drop(self, row: Row) -> None:
        """Takes a row out of the step again, or keeps it out."""
        self.victims.add(row)
        start, stop = self.spans.pop(row, (0, 0))
        self.tokens_left += stop - start

    def launch(self) -> StepPlan:
        """Advances the rows: from here on the step counts as launched."""
        parts = []
        for place, (row, (start, stop)) in enumerate(self.spans.items()):
            unread = row.in_flight
            sample = stop == len(row.tokens) + unread
            if unread:
                part = RowInput(row.state_slot, [UNREAD], start, row.block_table, row.place, sample)
            else:
                part = RowInput(row.state_slot, row.tokens[start:stop], start, row.block_table, -1, sample)
            parts.append(part)
            row.computed = stop
            row.in_flight = unread + sample
            row.place = place
        return StepPlan(list(self.spans), StepInput(parts, self.joins, self.copies))
