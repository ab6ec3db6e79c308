"""Blocks with reference counts, a free list, and published blocks kept until space is short.

A block is one of

- *free*: nothing refers to it, and what it holds is of no use; it may be *set aside* for the row
  that ends before it, which is then one run of slots for longer;
- *used*: one or more block tables refer to it;
- *cached*: no table refers to it, but it is published, so that a later sequence may take it up.

Free and cached blocks can be allocated, those set aside for other rows too where no others are
free; of the cached ones that which was released longest ago is
evicted first, and only when no block is free. The states are those of vLLM's block manager (Kwon et
al., arXiv:2309.06180) and of transformers' `PagedAttentionCache`. No tensors here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

from deliberate.cache.kv_cache import OutOfBlocks
from deliberate.utils.errors import DeliberateError

# Blocks that are set aside for a row's growth where it begins a run; a run of so many is as good as
# a longer one; and free blocks among which a run is looked for.
AHEAD, ENOUGH, _LOOKED_AT = 7, 4, 1024
# Of the blocks in use, the part by which blocks that nothing refers to may lengthen the pool.
SPARE = 16


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
        self._freed: list[int] = []  # rising; low numbers first, so that the pool stays short
        self._aside: dict[int, range] = {}  # by owner
        self._num_aside = 0
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
        """A block that nothing else refers to.

        Raises:
            OutOfBlocks: all blocks are used.
        """
        block = self._run(None, 1).start
        self._references[block] = 1
        return block

    def take(self, count: int, owner: int, after: int | None = None) -> list[int]:
        """Blocks that nothing else refers to, one after another where that is possible.

        Args:
            owner: whose growth blocks may be set aside for, see `give_up`.
            after: block that they should follow.

        Raises:
            OutOfBlocks: so many are not free.
        """
        if count > self.free:
            raise OutOfBlocks(
                f"{count} blocks are needed and {self.free} of {self.limit} are free: close a row "
                "first"
            )
        taken: list[int] = []
        while len(taken) < count:
            aside = self._aside.get(owner)
            if aside is None or (after is not None and aside.start != after + 1):
                self.give_up(owner)
                aside = self._run(after, count - len(taken) + AHEAD)
                self._num_aside += len(aside)
            after = aside.start
            self._references[after] = 1
            taken.append(after)
            self._keep_aside(owner, aside[1:])
            self._num_aside -= 1
        return taken

    def give_up(self, owner: int) -> None:
        """Blocks that are set aside for an owner are so no longer."""
        aside = self._aside.pop(owner, range(0))
        self._num_aside -= len(aside)
        for block in aside:
            insort(self._freed, block)

    def _keep_aside(self, owner: int, blocks: range) -> None:
        if blocks:
            self._aside[owner] = blocks
        else:
            self._aside.pop(owner, None)

    def _run(self, after: int | None, most: int) -> range:
        """One to `most` free blocks in a row, no longer free, after a given one if possible.

        Evicts the oldest cached block if none is free.
        """
        at = len(self._freed) if after is None else bisect_left(self._freed, after + 1)
        if at == len(self._freed) or self._freed[at] - 1 != after:
            at, length = self._longest(most)
        else:
            length = self._length(at, most)
        # All that nothing refers to may be a part of the blocks in use, no more.
        spare = 1 + len(self._references) // SPARE - len(self._freed) - self._num_aside
        fresh = min(most, self.limit - self.peak, spare)
        if fresh > length and (length < ENOUGH or after == self.peak - 1):
            self.peak += fresh
            return range(self.peak - fresh, self.peak)
        if length:
            first = self._freed[at]
            del self._freed[at : at + length]
            return range(first, first + length)
        if self._aside:
            owner = max(self._aside, key=lambda one: len(self._aside[one]))
            aside = self._aside[owner]
            self._keep_aside(owner, aside[:-1])
            self._num_aside -= 1
            return aside[-1:]
        if not self._cached:
            raise OutOfBlocks(f"all {self.limit} blocks of the cache are in use: close a row first")
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return range(block, block + 1)

    def _longest(self, most: int) -> tuple[int, int]:
        """Where among the free blocks the first of the longest runs is, and its length."""
        best, length, at = 0, 0, 0
        while at < min(len(self._freed), _LOOKED_AT) and length < most:
            here = self._length(at, most)
            if here > length:
                best, length = at, here
            at += here
        return best, length

    def _length(self, at: int, most: int) -> int:
        """How many blocks from the one at `at` on follow one another, at most so many."""
        freed, length = self._freed, 1
        while length < most and at + length < len(freed):
            if freed[at + length] != freed[at] + length:
                break
            length += 1
        return length

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
            insort(self._freed, block)

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
            insort(self._freed, block)
            evicted += 1
        return evicted

    def check(self) -> None:
        """Raises RuntimeError unless every block is in exactly one state and keys fit blocks."""
        aside = [block for blocks in self._aside.values() for block in blocks]
        freed = {*self._freed, *aside}
        used, cached = set(self._references), set(self._cached)
        all_states = [*self._freed, *aside, *used, *cached]
        if len(all_states) != self.peak or freed | used | cached != set(range(self.peak)):
            raise RuntimeError(
                f"of {self.peak} blocks {sorted(freed)} are free, {sorted(used)} used and "
                f"{sorted(cached)} cached: each must be one of these"
            )
        if self._freed != sorted(self._freed) or self._num_aside != len(aside):
            raise RuntimeError("free blocks are out of order, or those set aside are miscounted")
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
