"""The shared KV cache: per layer one K and one V pool of equal blocks. Knows slots, not rows or requests.

A slot is one token's place: slot = block * block_size + offset. Block 0 is reserved: padding rows write to it, nobody
owns it and attention never reads it for a real row.
"""

from collections.abc import Mapping

import torch

from ropeway.kernels import triton_cache
from ropeway.kernels.fp8 import FP8
from ropeway.kernels.fp8_cache import Scales, put


class KVPool:
    """Pools `[num_blocks, block_size, kv_heads, head_dim]`, made when a layer first writes.

    A layer's sizes come from its first real K and V: head dims may differ between layers, and between K and V (MLA).

    Args:
        num_blocks: blocks per layer, the reserved block 0 included.
        block_size: tokens per block.
        fill: what unwritten slots hold, for tests: NaN shows a read of one. None = whatever was in memory.
        scales: of each layer, for a cache in FP8; None = K and V are stored as they come.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fill: float | None = None,
        scales: Mapping[int, Scales] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._fill = fill
        self._scales = scales
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have written."""
        return frozenset(self._layers)

    @property
    def numbers_per_block(self) -> int:
        """Numbers in one block over all layers written so far, K and V."""
        return sum(pool[0].numel() for pair in self._layers.values() for pool in pair)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers written so far, K and V."""
        return sum(pool[0].nbytes for pair in self._layers.values() for pool in pair)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pool of a layer that has written."""
        return self._layers[layer]

    def scales(self, layer: int) -> Scales:
        """What the numbers of a layer's pools are multiplied with to be K and V."""
        return Scales() if self._scales is None else self._scales[layer]

    def made_for(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pool of a layer, made now if it never wrote: for tokens like k [N,kv_heads,D], v [N,kv_heads,Dv]."""
        if layer not in self._layers:
            self._layers[layer] = (self._new(k), self._new(v))
        return self._layers[layer]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store new tokens: slots [N] int64, k [N,kv_heads,D], v [N,kv_heads,Dv]."""
        pools = self.made_for(layer, k, v)
        scales = self.scales(layer)
        if k.is_cuda:
            triton_cache.write_kv(*pools, slots, k, v, scales)
            return
        put(pools[0], slots, k, scales.k)
        put(pools[1], slots, v, scales.v)

    def copy_blocks(self, pairs: torch.Tensor) -> None:
        """Copy whole blocks in every layer: pairs [C,2] (source, destination), read before any is written."""
        if pairs.shape[0] == 0:
            return
        pools = [pool for pair in self._layers.values() for pool in pair]
        if pairs.is_cuda:
            triton_cache.copy_blocks(pools, pairs)
            return
        source, destination = pairs.long().unbind(1)
        for pool in pools:
            whole = pool.view(torch.uint8)  # torch copies no FP8 by index
            whole.index_copy_(0, destination, whole.index_select(0, source))

    def _new(self, new: torch.Tensor) -> torch.Tensor:
        dtype = new.dtype if self._scales is None else FP8
        pool = new.new_empty(self.num_blocks, self.block_size, *new.shape[1:], dtype=dtype)
        if self._fill is not None:
            return pool.fill_(self._fill)
        pool[0].zero_()  # and no more: pages of a large pool cost no memory on the CPU until they are written
        return pool
