"""A step on its way to the device: every input of its forward and its sampler, in one copy that nobody waits for.

The host writes into views of one pinned buffer, which goes in one transfer to a device buffer with the same layout.
Pinned memory comes from torch's caching allocator, which gives a block out again only after the copies from it are
done. A step that is rounded up to a size of the CUDA graphs lands in a static buffer, at addresses that depend on that
size alone; any other step gets a buffer of its own.

Block tables stay on the device, one line per state slot: a step brings only the blocks that its rows got since the
step before, and a row that joins starts its line anew. (A block that was freed because no layer sees it any more
stays in the line: no layer reads it.)

    tokens   row 0 | row 1 | ... | pad | pad | pad ... pad |     size.tokens
    rows                           a pad each as long as there are any, the last row all that are left    size.rows

Pads have context_len 0, write to the reserved block 0 and have the sampling state's spare slot. Line i of the logits
belongs to row i: a chunk with more to come is sampled with the spare slot, and nobody reads it.
"""

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.sampler import Lines
from ropeway.kernels.sampling_state import FLAGS, SamplingState
from ropeway.kernels.step import UNREAD, Edit, RowInput, StepInput

_ALIGNMENT = 64
"""Bytes. Triton compiles a kernel again for pointers that are no multiple of 16."""

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)
_TORCH = {_INT64: torch.int64, _INT32: torch.int32}
_TOKEN_FIELDS = (("token_ids", _INT64), ("positions", _INT64), ("slot", _INT64), ("prev_row", _INT32))
_ROW_FIELDS = (
    ("context_len", _INT32),
    ("state_slot", _INT32),
    ("logits_index", _INT64),
    ("sample_slot", _INT64),
    ("sample_position", _INT64),
    ("sample_flags", _INT64),
)
_TAIL = 3
"""Fields behind those: new blocks' places in the flattened tables, their ids, and blocks to copy."""
_Place = tuple[str, "np.dtype[Any]", int, int]
"""Name, dtype, first and last byte of a field."""


@dataclass(slots=True, frozen=True, order=True)
class Size:
    """Tokens and rows of a step, pads included."""

    tokens: int
    rows: int


@dataclass(slots=True, frozen=True)
class Columns:
    """A step's rows, as arrays [B] int64 (`samples` bool)."""

    state_slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    """Tokens that the step computes."""
    prev_rows: np.ndarray
    samples: np.ndarray
    table_lens: np.ndarray

    @classmethod
    def of(cls, rows: list[RowInput]) -> "Columns":
        return cls(
            _column(rows, "state_slot"),
            _column(rows, "start"),
            np.array([len(row.token_ids) for row in rows], dtype=np.int64),
            _column(rows, "prev_row"),
            np.array([row.sample for row in rows], dtype=bool),
            np.array([len(row.block_table) for row in rows], dtype=np.int64),
        )

    @property
    def size(self) -> Size:
        return Size(int(self.counts.sum()), len(self.counts))


def _column(rows: list[RowInput], name: str) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), rows), np.int64, len(rows))


@dataclass(slots=True, frozen=True)
class StepTensors:
    """The views of a device buffer. [N] per token, [B] per row, [B+1] `row_start`; dtypes as in `LeftPaddedBatch`."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot: torch.Tensor
    prev_row: torch.Tensor
    context_len: torch.Tensor
    state_slot: torch.Tensor
    logits_index: torch.Tensor
    sample_slot: torch.Tensor
    sample_position: torch.Tensor
    sample_flags: torch.Tensor
    row_start: torch.Tensor


@dataclass(slots=True, frozen=True)
class Staged:
    """A step whose inputs are on their way."""

    columns: Columns
    tensors: StepTensors
    copies: torch.Tensor
    """[C,2] int32."""
    sample_slots: np.ndarray
    """[B] int64 on the host: the state slot whose parameters sample each row's line."""
    sample_positions: np.ndarray
    """[B] int64 on the host."""
    edits: dict[int, Edit]
    """Row -> what changes its line's scores."""


class Staging:
    """Turns steps into tensors, in launch order.

    Args:
        state: of the sampler; its slots are the rows' places.
        block_size: tokens per KV block.
        max_blocks: blocks that a row may have.
        device: where steps go.
        largest: the largest size that a step is rounded up to; None = none ever is.
    """

    def __init__(
        self,
        state: SamplingState,
        block_size: int,
        max_blocks: int,
        device: torch.device,
        largest: Size | None = None,
    ) -> None:
        slots = state.num_slots + 1
        self.last_ids = torch.zeros(slots, dtype=torch.int64, device=device)
        """[rows]: what each line of the last step sampled."""
        self.last_finite = torch.zeros(slots, dtype=torch.bool, device=device)
        """[rows]: whether that line's logits were finite."""
        self._state = state
        self._block_size = block_size
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._tables = torch.zeros(slots, max_blocks, dtype=torch.int32, device=device)
        self._host_tables = np.zeros((slots, max_blocks), dtype=np.int32)
        self._known = np.zeros(slots, dtype=np.int64)  # blocks of each line that the device has
        room = 0
        if largest is not None:
            room = _layout(largest, self._host_tables.size, slots)[1]
        self._static = torch.zeros(room, dtype=torch.uint8, device=device)
        self._static_tensors: dict[Size, StepTensors] = {}

    def stage(self, step: StepInput, columns: Columns, size: Size | None = None) -> Staged:
        """Send a step's inputs to the device: as they are, or rounded up to `size`, into its static tensors."""
        assert not len(columns.counts) or columns.counts.min() > 0, "a row without tokens has no place in a step"
        assert (columns.table_lens * self._block_size >= columns.starts + columns.counts).all(), "a table is too short"
        new_places, new_blocks = self._new_blocks(step, columns)
        shape = size or columns.size
        places, total = _layout(shape, len(new_places), len(step.copies))
        pinned = torch.empty(total, dtype=torch.uint8, pin_memory=self._on_gpu)
        host = pinned.numpy()
        views: dict[str, np.ndarray] = {name: host[begin:end].view(dtype) for name, dtype, begin, end in places}
        self._fill(views, step, columns, shape)
        views["new_places"][:], views["new_blocks"][:] = new_places, new_blocks
        views["copies"][:] = [block for pair in step.copies for block in pair]
        if size is not None:
            self._static[:total].copy_(pinned, non_blocking=True)
            buffer, tensors = self._static, self.static_tensors(size)
        else:
            buffer = pinned.to(self._device, non_blocking=True)
            tensors = _tensors(buffer, shape)
        tail = _views(buffer, places[-_TAIL:])
        if len(new_places):
            self._tables.view(-1).index_copy_(0, tail["new_places"], tail["new_blocks"])
        rows = len(columns.counts)
        return Staged(
            columns,
            tensors,
            tail["copies"].view(-1, 2),
            views["sample_slot"][:rows],
            views["sample_position"][:rows],
            {row: part.edit for row, part in enumerate(step.rows) if part.edit is not None},
        )

    def static_tensors(self, size: Size) -> StepTensors:
        """The views that a step rounded up to this size lands in."""
        if size not in self._static_tensors:
            self._static_tensors[size] = _tensors(self._static, size)
        return self._static_tensors[size]

    def batch(
        self, tensors: StepTensors, query_lens: tuple[int, ...], context_lens: tuple[int, ...]
    ) -> LeftPaddedBatch:
        """The batch that a forward takes, unread ids filled in: only launches, on what is on the device.

        The host's lengths need only bound the device's where the forward is to be captured in a graph.
        """
        table = self._tables[:, : max(1, -(-max(context_lens) // self._block_size))]
        last = self.last_ids.index_select(0, tensors.prev_row.clamp(min=0))
        return LeftPaddedBatch(
            token_ids=torch.where(tensors.prev_row < 0, tensors.token_ids, last),
            prev_row=tensors.prev_row,
            positions=tensors.positions,
            row_start=tensors.row_start,
            context_len=tensors.context_len,
            block_table=table.index_select(0, tensors.state_slot),
            slot=tensors.slot,
            logits_index=tensors.logits_index,
            state_slot=tensors.state_slot,
            copies=tensors.row_start.new_empty(0, 2),
            block_size=self._block_size,
            query_lens=query_lens,
            context_lens=context_lens,
            logits_tokens=tuple((np.cumsum(query_lens) - 1).tolist()),
        )

    def lines(self, staged: Staged) -> Lines:
        """What the sampler takes; it writes to `last_ids` and `last_finite`."""
        tensors = staged.tensors
        count = len(tensors.sample_slot)
        return Lines(
            staged.sample_slots,
            staged.sample_positions,
            tensors.sample_slot,
            tensors.sample_position,
            tensors.sample_flags,
            self.last_ids[:count],
            self.last_finite[:count],
            staged.edits,
        )

    def _new_blocks(self, step: StepInput, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that the device's tables lack: places in the flattened tables [U] int64, ids [U] int32."""
        for join in step.joins:
            self._known[join.state_slot] = 0
        width = self._host_tables.shape[1]
        known = self._known[columns.state_slots]
        at: list[int] = []
        blocks: list[int] = []
        for index in np.flatnonzero(columns.table_lens > known).tolist():
            row, have = step.rows[index], int(known[index])
            assert len(row.block_table) <= width, "a row has more blocks than the longest may have"
            line = row.state_slot * width
            at.extend(range(line + have, line + len(row.block_table)))
            blocks.extend(row.block_table[have:])
        self._known[columns.state_slots] = columns.table_lens
        places, ids = np.array(at, dtype=np.int64), np.array(blocks, dtype=np.int32)
        self._host_tables.reshape(-1)[places] = ids
        return places, ids

    def _fill(self, views: dict[str, np.ndarray], step: StepInput, columns: Columns, size: Size) -> None:
        """Write every field of the layout, pads included."""
        real, rows = columns.size.tokens, columns.size.rows
        pads = size.rows - rows
        assert size.tokens == real or (size.tokens > real and pads > 0), "pads have rows of their own"
        ends = np.cumsum(columns.counts)
        row_start = views["row_start"]
        row_start[0], row_start[1 : rows + 1] = 0, ends
        row_start[rows + 1 :] = np.arange(real + 1, real + 1 + pads).clip(max=size.tokens)
        row_start[-1] = size.tokens
        views["logits_index"][:] = row_start[1:] - 1
        for name, values, pad in (
            ("context_len", columns.starts + columns.counts, 0),
            ("state_slot", columns.state_slots, self._state.spare),
            ("sample_slot", np.where(columns.samples, columns.state_slots, self._state.spare), self._state.spare),
            ("sample_position", columns.starts + columns.counts, 0),
        ):
            views[name][:rows], views[name][rows:] = values, pad
        views["sample_flags"][:] = self._state.work[views["sample_slot"]] & FLAGS

        token_ids, positions, slot = views["token_ids"], views["positions"], views["slot"]
        token_ids[:real] = np.fromiter(chain.from_iterable(row.token_ids for row in step.rows), np.int64, real)
        row_of_token = np.repeat(np.arange(rows), columns.counts)
        positions[:real] = np.arange(real) + (columns.starts + columns.counts - ends)[row_of_token]
        block, offset = np.divmod(positions[:real], self._block_size)
        block = self._host_tables[columns.state_slots[row_of_token], block].astype(np.int64)
        assert (block > 0).all(), "every computed token needs an owned block to write to"
        slot[:real] = block * self._block_size + offset
        token_ids[real:] = positions[real:] = slot[real:] = 0
        views["prev_row"][:] = -1
        views["prev_row"][ends - 1] = columns.prev_rows
        unread = token_ids == UNREAD
        assert (unread == (views["prev_row"] >= 0)).all(), "exactly the unread tokens come from the last step"


def _layout(size: Size, new_blocks: int = 0, copies: int = 0) -> tuple[list[_Place], int]:
    """The place of every field, the last `_TAIL` of them of no fixed size; and the bytes of it all."""
    fields = [(name, dtype, size.tokens) for name, dtype in _TOKEN_FIELDS]
    fields += [(name, dtype, size.rows) for name, dtype in _ROW_FIELDS]
    fields += [("row_start", _INT32, size.rows + 1)]
    fields += [("new_places", _INT64, new_blocks), ("new_blocks", _INT32, new_blocks), ("copies", _INT32, 2 * copies)]
    places: list[_Place] = []
    begin = 0
    for name, dtype, count in fields:
        end = begin + count * dtype.itemsize
        places.append((name, dtype, begin, end))
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
    return places, begin


def _views(buffer: torch.Tensor, places: list[_Place]) -> dict[str, torch.Tensor]:
    return {name: buffer[begin:end].view(_TORCH[dtype]) for name, dtype, begin, end in places}


def _tensors(buffer: torch.Tensor, size: Size) -> StepTensors:
    return StepTensors(**_views(buffer, _layout(size)[0][:-_TAIL]))
