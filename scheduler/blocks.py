"""BlockPool: who owns which KV block, and which blocks can be found again by what they hold. Numbers only, no tensors.

Every block but 0 is in exactly one of three states:

    free     nobody owns it, nothing in it is worth keeping
    cached   nobody owns it, but its tokens are indexed: found again until its memory is wanted (least recent first)
    owned    in the block tables of `refs` rows; indexed or not

Block 0 is reserved for pad writes and never handed out. All device work runs in launch order, so a released block may
be given out again at once. Knows no rows and no requests: whoever calls says what is shared and what is released.
"""

import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class BlockPool:
    """The blocks `[1, num_blocks)` of `block_size` tokens each. With `caching` False nothing is ever indexed."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        assert num_blocks >= 2 and block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        # Nobody outside this process can compute a digest, so nobody can construct prompts that collide.
        self._key = secrets.token_bytes(32)

    @property
    def num_usable(self) -> int:
        """Blocks that rows can own."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that rows own, 0 to 1."""
        return 1 - self.num_available / self.num_usable

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_unowned(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take out of the available ones."""
        return sum(self._refs[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one owner each. The caller has checked `num_available`."""
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        self._refs[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these blocks, which are owned or cached."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, block_table: Sequence[int]) -> None:
        """One owner less for each block of a row. The end of the row is forgotten before its beginning."""
        for block in reversed(block_table):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def extend_hashes(self, hashes: list[bytes], tokens: Sequence[int], labels: Sequence[str]) -> None:
        """Appends the digests of the full blocks of `tokens` that `hashes` lacks.

        A digest covers everything before it: blake2b, keyed, 128 bits, over (digest of the block before, tokens).
        The first block's parent is the digest of `labels`: whatever must not share a cache differs in one of them.
        """
        if not self.caching:
            return
        size = self.block_size
        for begin in range(len(hashes) * size, len(tokens) - size + 1, size):
            parent = hashes[-1] if hashes else self._root(labels)
            ids = array("q", tokens[begin : begin + size]).tobytes()
            hashes.append(blake2b(parent + ids, digest_size=16, key=self._key).digest())

    def _root(self, labels: Sequence[str]) -> bytes:
        digest = blake2b(digest_size=16, key=self._key, person=b"root")
        for label in labels:
            text = label.encode()
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.digest()

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest indexed beginning of a sequence. Takes no ownership."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Makes full, computed blocks findable. A block whose content is indexed already stays anonymous."""
        for block, digest in zip(blocks, hashes, strict=True):
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def is_published(self, block: int) -> bool:
        """Whether the block can be found: it must never be written again while it can."""
        return block in self._digest_of

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Asserts free + cached + owned = total, and that the counts add up with the tables of all rows."""
        owners = Counter(block for table in block_tables for block in table)
        free, cached, owned = set(self._free), set(self._cached), set(owners)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & owned or cached & owned), "a block is in two states"
        assert free | cached | owned == set(range(1, self.num_blocks)), "free + cached + owned != total"
        assert all(self._refs[block] == owners[block] for block in range(self.num_blocks)), "references do not add up"
        assert cached <= set(self._digest_of) and not free & set(self._digest_of), (
            "cached blocks, and no free ones, are indexed"
        )
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of, "the index is torn"
