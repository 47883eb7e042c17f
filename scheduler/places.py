"""Places: the rows in the batch, their state slots and block tables. Says who holds what, not who should.

A group takes the slots of all its rows when the first of them enters, and gives them back when the last one leaves:
two groups never wait for each other's.
"""

from bisect import insort

from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.group import Group
from ropeway.scheduler.plan import HeadStart
from ropeway.scheduler.row import Row


class Places:
    """`count` places, over a pool of blocks."""

    def __init__(self, count: int, pool: BlockPool) -> None:
        self.running: list[Row] = []
        """In the order of `Row.rank`."""
        self.free_slots = list(range(count - 1, -1, -1))
        self._count = count
        self._pool = pool

    def has_room(self, group: Group) -> bool:
        """Whether a row of the group can enter."""
        return bool(group.slots) or len(group.rows) <= len(self.free_slots)

    def enter(self, row: Row, head: HeadStart) -> None:
        """The row has a place from now on, and what `head` gives it in place of the blocks that it had."""
        self._pool.share(head.blocks)
        self._pool.release(row.block_table)
        row.block_table = list(head.blocks)
        row.copy = None if head.copy_from is None else (head.copy_from, len(head.blocks))
        row.stale = True
        if row.running:
            return
        slots = row.group.slots
        if not slots:
            slots += [self.free_slots.pop() for _ in row.group.rows]
        row.state_slot = slots.pop()
        insort(self.running, row, key=lambda other: other.rank)

    def release(self, row: Row) -> None:
        """Gives back what a running row holds. Steps launched from now on may use it."""
        self.running.remove(row)
        self._pool.release(row.block_table)
        row.block_table = []
        row.num_published = 0
        slots = row.group.slots
        slots.append(row.state_slot)
        row.state_slot = -1
        if len(slots) == len(row.group.rows):
            self.free_slots += slots
            slots.clear()

    def check_integrity(self) -> None:
        """Asserts that no block or state slot is lost or held twice."""
        self._pool.check_integrity(row.block_table for row in self.running)
        slots = [row.state_slot for row in self.running]
        for group in {row.group for row in self.running}:
            slots += group.slots
        assert sorted(slots + self.free_slots) == list(range(self._count)), "state slots do not add up"
        assert self.running == sorted(self.running, key=lambda row: row.rank), "running rows are out of order"
        assert all(row.running and not row.finished for row in self.running)
