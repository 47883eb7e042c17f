"""One step on its way from a draft to a launch. Knows which positions of which rows it computes, not why."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ropeway.kernels.step import UNREAD, RowInput, RowState, Score, StepInput
from ropeway.scheduler.row import Row

Reason = Literal[
    "token budget",  # the step has as many tokens as it may
    "prefill share",  # more prompt tokens would hold up the rows that decode
    "logprobs budget",  # the step scores as many prompt tokens as it may
    "row budget",  # the batch has as many rows as it may
    "no free blocks",  # what is there belongs to rows that come first
    "leader prefilling",  # another choice is computing the prompt that this one will share
    "edit not ready",  # what changes the row's scores is still being made
    "token unread",  # the unread token may end the row, or the host must see it first
    "preempted",  # the row gave its blocks to one that comes first
]
"""Why a row was not in a step, or is in the batch no more."""


@dataclass(slots=True)
class StepPlan:
    """A launched step: `rows[i]` is computed by `step.rows[i]`. Made by `plan`, handed back to `update`.

    The block tables in `step` are the rows' own: read them at launch, they change later.
    """

    rows: list[Row]
    step: StepInput
    num_tokens: int
    """That the step computes."""
    decode_rows: int
    """Rows that were running and compute the one token that they lack."""


class HeadStart(NamedTuple):
    """What a row that joins need not compute: tokens [0, start) are in `blocks`, the last ones in `copy_from`."""

    blocks: list[int]
    start: int
    leader: Row | None = None
    """Whose blocks they are, if another choice shares them."""
    copy_from: int | None = None
    """The leader's block in which `start` lies, unless a block begins there."""


@dataclass(slots=True)
class Draft:
    """A step while `Scheduler.plan` puts it together."""

    now: float
    tokens_left: int
    """Of the step's token budget."""
    scores_left: int
    """Of the step's budget of prompt tokens whose logprobs are wanted."""
    why_full: Reason = "token budget"
    """Why a row finds no tokens left."""
    num_tokens: int = 0
    """In the spans."""
    decode_rows: int = 0
    """Of the spans; counted by `limit`."""
    spans: dict[Row, tuple[int, int]] = field(default_factory=dict)
    """The positions [start, stop) that each row computes, in the order of the rows in the step."""
    victims: set[Row] = field(default_factory=set)
    """Rows that make room for others: not in this step."""
    oldest: Row | None = None
    """The oldest running row, once somebody asked."""

    def take(self, row: Row, start: int, stop: int) -> None:
        """Puts a row into the step."""
        self.spans[row] = start, stop
        self.tokens_left -= stop - start
        self.num_tokens += stop - start
        if row.scores_left:
            self.scores_left -= stop - start

    def room(self, row: Row) -> int:
        """Tokens that this row may still compute in the step."""
        return min(self.tokens_left, self.scores_left) if row.scores_left else self.tokens_left

    @property
    def why_no_room(self) -> Reason:
        """Why `room` is 0 for a row."""
        return "logprobs budget" if self.tokens_left else self.why_full

    def drop(self, row: Row) -> None:
        """Takes a row out of the step again, or keeps it out."""
        self.victims.add(row)
        if row in self.spans:
            start, stop = self.spans.pop(row)
            self.tokens_left += stop - start
            self.num_tokens -= stop - start
            if row.scores_left:
                self.scores_left += stop - start
            self.decode_rows -= row.num_pending == 1

    def limit(self, share: int) -> None:
        """All rows that decode are in: at most `share` tokens may ride along, if there are any such rows."""
        self.decode_rows = len(self.spans)
        if self.spans and share < self.tokens_left:
            self.tokens_left = share
            self.why_full = "prefill share"

    def launch(self) -> StepPlan:
        """Advances the rows: from here on the step counts as launched."""
        parts, joins, copies, scores = [], [], [], {}
        for place, (row, (start, stop)) in enumerate(self.spans.items()):
            if row.stale:
                joins.append(RowState(row.state_slot, row.sampling, row.prompt_ids, row.tokens[row.num_prompt :]))
                if row.copy is not None:
                    copies.append((row.copy[0], row.block_table[row.copy[1]]))
                row.stale, row.copy = False, None
            unread = row.in_flight
            sample = stop == len(row.tokens) + unread
            if unread:
                part = RowInput(row.state_slot, [UNREAD], start, row.block_table, row.place, sample)
            else:
                part = RowInput(row.state_slot, row.tokens[start:stop], start, row.block_table, -1, sample)
            if sample and row.edits:
                part.edit = row.edit
            if row.scores_left and (targets := row.prompt_ids[start + 1 : stop + 1]):
                scores[place] = Score(targets, row.sampling.prompt_logprobs or 0)
            parts.append(part)
            row.computed = stop
            row.in_flight = unread + sample
            row.place = place
        step = StepInput(parts, joins, copies, scores)
        return StepPlan(list(self.spans), step, self.num_tokens, self.decode_rows)
