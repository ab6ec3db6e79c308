"""Blocks with reference counts, a free list, and published blocks kept until space is short.

A block is one of

- *free*: nothing refers to it, and what it holds is of no use;
- *used*: one or more block tables refer to it;
- *cached*: no table refers to it, but it is published, so that a later sequence may take it up.

Free and cached blocks can be allocated; of the cached ones that which was released longest ago is
evicted first, and only when no block is free. The states are those of vLLM's block manager (Kwon et
al., arXiv:2309.06180) and of transformers' `PagedAttentionCache`. No tensors here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from deliberate.cache.kv_cache import OutOfBlocks
from deliberate.utils.errors import DeliberateError


class BlockAllocator:
    """Blocks 0..limit-1.

    Args:
        limit: number of blocks.

    Attributes:
        limit: as given.
        peak: highest number of a block that was ever allocated, plus one: a pool needs no more.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise DeliberateError(f"a block allocator needs at least 1 block, got limit={limit}")
        self.limit = limit
        self.peak = 0
        self._freed: list[int] = []  # a heap: low numbers first, so that the pool stays short
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated: free and cached ones."""
        return self.limit - len(self._references)

    @property
    def used(self) -> int:
        """Blocks that tables refer to."""
        return len(self._references)

    @property
    def cached(self) -> int:
        """Published blocks that no table refers to."""
        return len(self._cached)

    def allocate(self) -> int:
        """A block that nothing else refers to; evicts the oldest cached block if none is free.

        Raises:
            OutOfBlocks: all blocks are used.
        """
        if self._freed:
            block = heapq.heappop(self._freed)
        elif self.peak < self.limit:
            block = self.peak
            self.peak += 1
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.limit} blocks of the cache are in use: close a row first")
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One reference more to a used or cached block.

        Raises:
            RuntimeError: the block is free.
        """
        if block in self._references:
            self._references[block] += 1
        elif block in self._cached:
            del self._cached[block]
            self._references[block] = 1
        else:
            raise RuntimeError(f"block {block} is free and cannot be shared")

    def release(self, block: int) -> None:
        """One reference less; without any the block becomes cached if published, else free.

        Raises:
            RuntimeError: nothing refers to the block.
        """
        count = self._references.get(block, 0)
        if count < 1:
            raise RuntimeError(f"block {block} is released, but nothing refers to it")
        if count > 1:
            self._references[block] = count - 1
            return
        del self._references[block]
        if block in self._key_of:
            self._cached[block] = None
        else:
            heapq.heappush(self._freed, block)

    def references(self, block: int) -> int:
        """Tables that refer to a block."""
        return self._references.get(block, 0)

    def publish(self, block: int, key: bytes) -> bool:
        """Makes a used block known under a key; False where the key has a block or the block a key.

        Raises:
            RuntimeError: nothing refers to the block.
        """
        if block not in self._references:
            raise RuntimeError(f"block {block} is published, but nothing refers to it")
        if key in self._block_of or block in self._key_of:
            return False
        self._key_of[block] = key
        self._block_of[key] = block
        return True

    def find(self, key: bytes) -> int | None:
        """The block published under a key, or None."""
        return self._block_of.get(key)

    def writable(self, block: int) -> bool:
        """Whether the only table that refers to a block may write to it without a copy."""
        return self._references.get(block, 0) == 1 and block not in self._key_of

    def withdraw(self, block: int) -> None:
        """The block is no longer published; for the only table that refers to it, before writing.

        Raises:
            RuntimeError: not exactly one table refers to it.
        """
        if self._references.get(block, 0) != 1:
            raise RuntimeError(
                f"block {block} has {self.references(block)} references: copy it before writing"
            )
        self._forget(block)

    def evict(self, most: int | None = None) -> int:
        """Frees cached blocks, oldest first, at most so many (None: all); returns how many."""
        evicted = 0
        while self._cached and (most is None or evicted < most):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            heapq.heappush(self._freed, block)
            evicted += 1
        return evicted

    def check(self) -> None:
        """Raises RuntimeError unless every block is in exactly one state and keys fit blocks."""
        freed = set(self._freed)
        used, cached = set(self._references), set(self._cached)
        all_states = [*self._freed, *used, *cached]
        if len(all_states) != self.peak or freed | used | cached != set(range(self.peak)):
            raise RuntimeError(
                f"of {self.peak} blocks {sorted(freed)} are free, {sorted(used)} used and "
                f"{sorted(cached)} cached: each must be one of these"
            )
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise RuntimeError("keys of published blocks and blocks of keys differ")
        if not cached <= set(self._key_of) <= used | cached:
            raise RuntimeError("a cached block is not published, or a free one is")
        if min(self._references.values(), default=1) < 1:
            raise RuntimeError("a used block has no reference")

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
