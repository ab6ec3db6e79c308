"""Which blocks hold the keys and values of a text's beginning: keys of blocks by a hash chain.

The key of a block hashes the key of the block before it and the tokens in the block, so that it
stands for all tokens up to the block's end. The chain begins with the *reuse key*: whatever makes
keys and values of the same tokens differ (weights, adapter, how they were computed). Blocks of one
text form a path, and texts with a common beginning share its first part: a tree, held as a table
from key to block in each allocator.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from deliberate.cache.block_allocator import BlockAllocator

KEY_BYTES = 16


def root_key(reuse_key: str) -> bytes:
    """Where the chain of a reuse key begins."""
    return hashlib.blake2b(reuse_key.encode(), digest_size=KEY_BYTES).digest()


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a block that holds `tokens` after the text whose key is `before`."""
    chain = hashlib.blake2b(before, digest_size=KEY_BYTES)
    chain.update(array("q", tokens).tobytes())
    return chain.digest()


def block_keys(root: bytes, tokens: Sequence[int], block_size: int, blocks: int) -> list[bytes]:
    """Keys of the first `blocks` blocks of a text."""
    keys = []
    for first in range(0, blocks * block_size, block_size):
        root = block_key(root, tokens[first : first + block_size])
        keys.append(root)
    return keys


def first_needed(length: int, window: int) -> int:
    """First position that later tokens attend to, after `length` tokens; window 0: all."""
    return max(0, length - window + 1) if window else 0


class PrefixTree:
    """Published blocks of several layer groups, whose blocks are numbered separately.

    Args:
        allocators: one per group.
        windows: sliding window of each group in tokens, 0 for none.
        block_size: tokens a block.
    """

    def __init__(
        self, allocators: Sequence[BlockAllocator], windows: Sequence[int], block_size: int
    ) -> None:
        self._allocators = tuple(allocators)
        self._windows = tuple(windows)
        self._block_size = block_size

    def match(self, keys: Sequence[bytes]) -> tuple[int, list[list[int | None]]]:
        """The longest usable beginning: its number of blocks, and for each group the blocks.

        Groups with a window need only the blocks that a token after the beginning attends to; the
        others are None.
        """
        found: list[list[int | None]] = []
        most = len(keys)
        for allocator, window in zip(self._allocators, self._windows, strict=True):
            blocks = [allocator.find(key) for key in keys[:most]]
            if not window and None in blocks:
                most = blocks.index(None)
            found.append(blocks)
        while most and not self._has_windows(found, most):
            most -= 1
        for blocks, window in zip(found, self._windows, strict=True):
            del blocks[most:]
            for behind in range(self._first(most, window)):
                blocks[behind] = None
        return most, found

    def _first(self, blocks: int, window: int) -> int:
        """First block that a token after so many blocks attends to."""
        return first_needed(blocks * self._block_size, window) // self._block_size

    def _has_windows(self, found: Sequence[Sequence[int | None]], most: int) -> bool:
        return all(
            None not in blocks[self._first(most, window) : most]
            for blocks, window in zip(found, self._windows, strict=True)
            if window
        )
