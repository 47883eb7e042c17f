"""Prefixes: what a row need not compute, since the prefix cache or another row has it; and what others may find.

Knows rows and what their blocks hold, not who may join.
"""

from ropeway.scheduler.blocks import BlockPool
from ropeway.scheduler.plan import HeadStart
from ropeway.scheduler.row import Row


class Prefixes:
    """Beginnings of rows over a pool of blocks. `per_key`: requests of different keys share nothing."""

    def __init__(self, pool: BlockPool, *, per_key: bool) -> None:
        self._pool = pool
        self._per_key = per_key

    def head_start(self, row: Row, leader: Row | None) -> HeadStart:
        """The longest of what the prefix cache holds and what the leader can share.

        The last token is always computed, into a block of the row's own. A fork computes its last prompt token again,
        so that it samples its first token from its own logits with its own seed:

            leader   | full | full | full | pa......  |      num_prompt - 1 = 3 blocks + 2 tokens
            fork     | same | same | same | copy, then its own tokens
        """
        if row.scores_left:
            return HeadStart([], 0)
        size = self._pool.block_size
        self._pool.extend_hashes(row.block_hashes, row.tokens, self._labels(row))
        cached = self._pool.find(row.block_hashes[: (row.num_tokens - 1) // size])
        if leader is None or len(cached) * size >= row.num_prompt:
            return HeadStart(cached, len(cached) * size)
        full, partial = divmod(row.num_prompt - 1, size)
        copy_from = leader.block_table[full] if partial else None
        return HeadStart(leader.block_table[:full], row.num_prompt - 1, leader, copy_from)

    def fork(self, row: Row, source: Row, num_tokens: int) -> HeadStart:
        """So many tokens of a running row, with which `row` begins, too."""
        full, partial = divmod(num_tokens, self._pool.block_size)
        row.block_hashes = source.block_hashes[:full]
        row.num_published = min(source.num_published, full)
        return HeadStart(source.block_table[:full], num_tokens, source, source.block_table[full] if partial else None)

    def publish(self, row: Row) -> None:
        """Makes the full blocks findable that the step just read has completed: they hold `tokens`, and are sound."""
        if not self._pool.caching:
            return
        full = len(row.tokens) // self._pool.block_size
        self._pool.extend_hashes(row.block_hashes, row.tokens, self._labels(row))
        new = slice(row.num_published, full)
        self._pool.publish(row.block_table[new], row.block_hashes[new])
        row.num_published = full

    def _labels(self, row: Row) -> tuple[str, str]:
        """What two rows must agree on before they may share a cached prefix."""
        return row.key_id if self._per_key else "", row.cache_salt
