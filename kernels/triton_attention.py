"""Attention of ragged query rows over the paged KV pool, in Triton. `attention.py` is its reference on the CPU.

Knows rows, blocks and masks; no model, no host copy of a length: context lengths, row starts and block tables are read
on the device, and the grid depends only on N, B and the bounds in `RaggedRows`. So a launch never waits and can be
captured in a CUDA graph.

One program takes a tile of BLOCK_Q consecutive tokens of one row times the GROUP query heads that share a KV head
(BLOCK_M of these pairs, padded), and walks over that row's keys in tiles of BLOCK_N with an online softmax
(FlashAttention-2, arXiv:2307.08691). Rows come in two classes, each with a launch of its own:

    short   query_len <= 16 / GROUP (at least 1): decode and speculative rows, one tile each
    long    the others: prefill chunks, cut into tiles from their first token

Where the tiles are too few to fill the device, the keys of a tile are split among several programs (flash-decoding),
always in whole key tiles. Those of short rows are cut as `triton_attention_plan.py` says, and the program that ends
last merges its row's partial results; those of long rows are cut into equal numbers, and a second kernel merges. Both
merge in the order of the keys.

What a token's result depends on: key tiles begin at absolute multiples of BLOCK_N in its sequence, and the tile sizes
follow from head sizes and dtype alone. The class follows from the row's own query_len. Only how many tiles a split
has follows from the batch.

On Hopper GPUs `hopper_attention.py` takes the long rows of most steps that have many tokens of them.

Deterministic rows are all of one class, with one tiling and no splits: a token's keys are reduced in the same tiles by
the same instructions whether it is decoded or in a chunk of any length. Tiles of keys that it does not see add zeros.
"""

from dataclasses import dataclass, field, replace

import torch

from ropeway.kernels import hopper_attention
from ropeway.kernels.batch import LeftPaddedBatch
from ropeway.kernels.fp8 import FP8
from ropeway.kernels.triton_attention_kernels import attend, merge
from ropeway.kernels.triton_attention_plan import Plan, make_plan
from ropeway.kernels.triton_jit import ceil_div, launch_options, next_power_of_2, starts_early

WANTED_PROGRAMS = 512
"""Keys are split until about so many programs run: some for each of a large GPU's 132 multiprocessors. Half of it for
long rows, of whose tiles a multiprocessor holds one."""

MAX_SPLITS = 64
"""Splits of a long row's tile; the merging kernel holds this many partial results at once."""


@dataclass(slots=True, frozen=True)
class RaggedRows:
    """What the kernels read of a batch, and what the host must know of it to choose a grid."""

    block_table: torch.Tensor
    """[B,P] int32; 0 where a block was freed; past a row's end anything, which is not read."""
    context_len: torch.Tensor
    """[B] int32; 0 for a row that is only padding: its tokens get zeros."""
    row_start: torch.Tensor
    """[B+1] int32; every one of the N tokens belongs to a row."""
    shortest: int
    """No row has fewer tokens than this."""
    longest: int
    """No row has more tokens than this."""
    deterministic: bool = False
    """A token's result has the same bits in any batch that holds its row, and in chunks of any length."""
    _plans: dict[tuple[int, ...], Plan] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Made by the first layer of a kind, for those after it."""
    _tiles: dict[tuple[int, ...], hopper_attention.Tiles] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Likewise."""

    @classmethod
    def of(cls, batch: LeftPaddedBatch, deterministic: bool = False) -> "RaggedRows":
        lens = min(batch.query_lens), batch.T
        return cls(batch.block_table, batch.context_len, batch.row_start, *lens, deterministic)

    def plan(self, kv_heads: int, short_query: int, block_n: int, window: int | None) -> Plan:
        """How the keys of the short rows are cut."""
        kind = (kv_heads, short_query, block_n, window or 0)
        if kind not in self._plans:
            self._plans[kind] = make_plan(
                self.row_start,
                self.context_len,
                parts=max(1, WANTED_PROGRAMS // kv_heads),
                kv_heads=kv_heads,
                short_query=short_query,
                block_n=block_n,
                window=window,
            )
        return self._plans[kind]

    def tiles(
        self, tokens: int, short_query: int, block_q: int, block_n: int, window: int | None
    ) -> hopper_attention.Tiles:
        """The tiles of the long rows, in the order in which the kernels of `hopper_attention.py` take them."""
        kind = (short_query, block_q, block_n, window or 0)
        if kind not in self._tiles:
            self._tiles[kind] = hopper_attention.make_tiles(
                self.row_start,
                self.context_len,
                tokens=tokens,
                short_query=short_query,
                block_q=block_q,
                block_n=block_n,
                window=window,
            )
        return self._tiles[kind]


@dataclass(slots=True, frozen=True)
class Tiling:
    """How a launch is cut: sizes of its tiles and what Triton makes of them."""

    block_m: int
    """Pairs of token and query head per tile."""
    block_n: int
    """Keys per tile."""
    warps: int
    stages: int
    """Depth of the software pipeline: the block table is read first, so K and V come half as far ahead."""


def short_tiling(group: int, head: int, head_v: int, itemsize: int) -> Tiling:
    """Tiles of decode rows: `group` query heads per KV head, head sizes of K and V, bytes per number."""
    block_m = max(16, next_power_of_2(group))
    warps = 2 if block_m == 16 and max(head, head_v) <= 128 and itemsize == 2 else 4
    return Tiling(block_m, min(64, _keys(32768, head, head_v, itemsize)), warps, stages=3)


def long_tiling(group: int, head: int, head_v: int, itemsize: int) -> Tiling:
    """Tiles of prefill chunks, arguments as for `short_tiling`."""
    if itemsize == 4:  # without tf32 there is no matrix unit to feed
        return short_tiling(group, head, head_v, itemsize)
    block_m = 128 if max(head, head_v) <= 256 else 64
    block_n = min(64, _keys(32768, head, head_v, itemsize))
    return Tiling(max(block_m, next_power_of_2(group)), block_n, warps=8, stages=5)


def one_tiling(group: int, head: int, head_v: int, itemsize: int) -> Tiling:
    """Tiles of deterministic rows, arguments as for `short_tiling`: large enough for chunks, and for the matrix unit's
    instructions of 64 lines, which may round otherwise than those of 16."""
    if itemsize == 4:
        return short_tiling(group, head, head_v, itemsize)
    block_m = max(64, next_power_of_2(group))
    warps = 4 if block_m == 64 and max(head, head_v) <= 256 else 8
    return Tiling(block_m, min(64, _keys(32768, head, head_v, itemsize)), warps, stages=5)


def _keys(size: int, head: int, head_v: int, itemsize: int) -> int:
    """Keys whose K and V take at most `size` bytes; the pipeline holds two such tiles."""
    keys = size // ((next_power_of_2(head) + next_power_of_2(head_v)) * itemsize)
    return max(16, min(128, next_power_of_2(keys + 1) // 2))


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    rows: RaggedRows,
    *,
    scale: float,
    v_scale: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every token over its own row's context, which the pools already hold.

    Args:
        q: [N,Hq,D], the last dimension dense; fp32, bf16 or fp16 like the pools, unless those are in FP8.
        k_pool: [num_blocks,block_size,Hkv,D], contiguous; query head h reads KV head h // (Hq / Hkv).
        v_pool: [num_blocks,block_size,Hkv,Dv], contiguous.
        rows: of the batch with these N tokens.
        scale: factor of q.k, with that of k in the pool; above 0.
        v_scale: factor of v in the pool.
        sliding_window: a key is visible iff query position - key position < sliding_window.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        sinks: [Hq], per head one logit more in the softmax, which has no value (gpt-oss, arXiv:2309.17453).

    Returns:
        [N,Hq,Dv] in q's dtype; products of fp32 are not rounded to tf32, the softmax is fp32. Whatever the pools hold
        at keys that no token of a tile sees is not read; a row without context gets zeros.
    """
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and q.stride(2) == 1
    assert k_pool.dtype == v_pool.dtype and k_pool.dtype in (q.dtype, FP8) and scale > 0
    call = _Call(q, k_pool, v_pool, rows, scale, v_scale, sliding_window, softcap, sinks)
    out = q.new_empty(*q.shape[:2], v_pool.shape[3])
    group = q.shape[1] // k_pool.shape[2]
    sizes = group, q.shape[2], v_pool.shape[3], q.element_size()
    if rows.deterministic:
        call.launch_long(out, one_tiling(*sizes), 0)
        return out
    tiling = short_tiling(*sizes)
    if k_pool.dtype == FP8 and q.element_size() == 2:
        tiling = replace(tiling, stages=5)  # a key tile is half as large, and widening it takes time
    short_query = max(1, 16 // group)
    mixed = rows.shortest <= short_query
    if mixed:
        call.launch(out, tiling, rows.context_len.shape[0], short_query, short=True)
    if rows.longest > short_query and hopper_attention.fits(q, k_pool, v_pool, rows.context_len.shape[0], mixed=mixed):
        call.launch_on_hopper(out, short_query)
    elif rows.longest > short_query:
        call.launch_long(out, long_tiling(*sizes), short_query)
    return out


@dataclass(slots=True, frozen=True)
class _Call:
    """The arguments of `paged_attention`, shared by its launches."""

    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    rows: RaggedRows
    scale: float
    v_scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def launch_long(self, out: torch.Tensor, tiling: Tiling, short_query: int) -> None:
        """Attend for the rows of more than `short_query` tokens."""
        group = self.q.shape[1] // self.k_pool.shape[2]
        tiles = self.q.shape[0] // (tiling.block_m // group) + self.rows.context_len.shape[0]
        self.launch(out, tiling, tiles, short_query, short=False)

    def launch(self, out: torch.Tensor, tiling: Tiling, tiles: int, short_query: int, *, short: bool) -> None:
        """Attend for the rows of one class, writing their tokens of `out` [N,Hq,Dv]."""
        q, rows, head_v = self.q, self.rows, out.shape[2]
        block_size, kv_heads, head = self.k_pool.shape[1:]
        group = q.shape[1] // kv_heads
        splits, plan = 1, None
        if short:
            plan = rows.plan(kv_heads, short_query, tiling.block_n, self.sliding_window)
            programs = plan.part_row.shape[0] * kv_heads
        else:
            if not rows.deterministic:
                keys = rows.block_table.shape[1] * block_size
                splits = _splits(WANTED_PROGRAMS // 2 // (tiles * kv_heads), keys, tiling.block_n)
            programs = tiles * kv_heads * splits
        partial = stats = out
        if short or splits > 1:
            partial = q.new_empty(programs, tiling.block_m, head_v, dtype=torch.float32)
            stats = q.new_empty(programs, 2, tiling.block_m, dtype=torch.float32)
        sizes = {
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_V": head_v,
            "BLOCK_DV": max(16, next_power_of_2(head_v)),
            "BLOCK_M": tiling.block_m,
            "SHORT_QUERY": short_query,
            "SINKS": self.sinks is not None,
        }
        sinks = out if self.sinks is None else self.sinks
        where = (rows.row_start, rows.context_len, rows.context_len.shape[0])
        early = starts_early(q.device)
        attend[(programs,)](
            *(q, self.k_pool, self.v_pool, out, partial, stats, sinks, *where),
            *(rows.block_table, rows.block_table.stride(0), *_parts(plan, rows)),
            *(q.stride(0), q.stride(1), splits, self.scale, self.v_scale),
            *(self.softcap or 0.0, self.sliding_window or 0),
            **sizes,
            HEAD=head,
            BLOCK_D=max(16, next_power_of_2(head)),
            BLOCK_SIZE=block_size,
            BLOCK_N=tiling.block_n,
            SHORT=short,
            LIVE=next_power_of_2(group * min(rows.longest, short_query)),
            SPLIT=splits > 1,
            WHOLE=not short and not rows.deterministic and self.sliding_window is None,
            # FP8 becomes fp16 in one instruction, bf16 in several; both hold all of its numbers.
            HALF=self.k_pool.dtype == FP8 and q.dtype == torch.bfloat16,
            SOFTCAP=self.softcap is not None,
            WINDOW=self.sliding_window is not None,
            EARLY=early,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **launch_options(early),
        )
        if splits > 1:
            programs //= splits
            merge[(programs, tiling.block_m)](out, partial, stats, sinks, *where, **sizes, SPLITS=splits, num_warps=2)

    def launch_on_hopper(self, out: torch.Tensor, short_query: int) -> None:
        """Attend for the long rows, writing their tokens of `out` [N,Hq,Dv]."""
        kv_heads, head = self.k_pool.shape[2:]
        block_q = hopper_attention.PAIRS // (self.q.shape[1] // kv_heads)
        block_n = hopper_attention.key_tile(head, out.shape[2])
        hopper_attention.attend(
            *(self.q, self.k_pool, self.v_pool, out),
            self.rows.tiles(self.q.shape[0], short_query, block_q, block_n, self.sliding_window),
            self.rows.block_table,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            sinks=self.sinks,
        )


def _parts(plan: Plan | None, rows: RaggedRows) -> tuple[torch.Tensor, ...]:
    """A plan's tensors, as arguments; in their place something that is not read."""
    if plan is None:
        return (rows.row_start,) * 5
    return plan.part_row, plan.part_split, plan.first_part, plan.split_keys, plan.arrived


def _splits(wanted: int, longest_context: int, block_n: int) -> int:
    """How many programs share the keys of one tile; a power of two, since each number is compiled."""
    most = min(wanted, ceil_div(longest_context, block_n), MAX_SPLITS)
    return 1 << (max(1, most).bit_length() - 1)
