"""Which block holds which tokens of which sequence: tables, per-layer lengths, sharing, copies.

A sequence's keys and values lie in blocks of `block_size` tokens. Layers with the same sliding
window form a *layer group* with a table of its own: entry i names the block that holds positions
i * block_size and on, in every layer of the group. Each layer has its own filled length, and
lengths are non-increasing with depth, because a token reaches a layer only through those below it.

- *Sharing.* `fork` makes a second row of the same blocks; a row that is opened with a prompt takes
  up published blocks that hold a beginning of it. Before a row writes to a block that another row
  refers to, `prepare` gives it a copy (copy-on-write).
- *Publication.* A block is published when it is full in the *top* layer, its tokens are known, and
  every token up to its end was run through every layer: never keys and values of the "propagate"
  and "skip" modes.
- *Windows.* A group with a window frees the blocks that no token after the top layer's length can
  attend to; a row can be rolled back as far as the blocks that it still has allow.

No tensors here: `deliberate.cache.block_cache` does what these tables say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deliberate.cache.block_allocator import BlockAllocator
from deliberate.cache.block_rows import BlockCopy, BlockRow
from deliberate.cache.kv_cache import OutOfBlocks
from deliberate.cache.layer_groups import FREED, LayerGroup
from deliberate.cache.prefix_tree import PrefixTree, block_key, block_keys, first_needed, root_key
from deliberate.utils.errors import DeliberateError


class BlockTables:
    """The tables of all open rows.

    Args:
        groups: that together hold every layer once.
        block_size: tokens a block.
        blocks: blocks of each group, at most.
        reuse_key: of the model: published blocks serve rows of the same key only.
        share: whether blocks are published at all.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        block_size: int,
        blocks: int,
        *,
        reuse_key: str = "",
        share: bool = True,
    ) -> None:
        layers = sorted(layer for group in groups for layer in group.layers)
        if not layers or layers != list(range(len(layers))):
            raise DeliberateError(f"the groups hold layers {layers}: each layer once is needed")
        if block_size < 1:
            raise DeliberateError(f"block_size={block_size}: it must be at least 1 token")
        self.groups = tuple(groups)
        self.num_layers = len(layers)
        self.block_size = block_size
        self.allocators = tuple(BlockAllocator(blocks) for _ in groups)
        self.share = share
        self._tree = PrefixTree(self.allocators, [one.window for one in groups], block_size)
        self._root = root_key(reuse_key)
        self._rows: dict[int, BlockRow] = {}
        self._versions = itertools.count(1)
        self._touched: dict[tuple[int, int], tuple[int, ...]] = {}

    # -- rows --------------------------------------------------------------------------------------

    @property
    def open_rows(self) -> list[int]:
        """Numbers of the open rows, rising."""
        return sorted(self._rows)

    def open(self, prompt: Sequence[int] = (), reuse_key: str | None = None) -> int:
        """Opens a row of the lowest number that is not in use; it may hold a published beginning.

        At least one token of the prompt is always left to be run.

        Args:
            reuse_key: in place of the tables' own.
        """
        for other in self._rows.values():
            self._publish_known(other)
        root = self._root if reuse_key is None else root_key(reuse_key)
        blocks, keys, tables = self._match(prompt, root)
        lengths = [blocks * self.block_size] * self.num_layers
        return self._open(BlockRow(lengths, tables, root, list(prompt), keys))

    def published_tokens(self, prompt: Sequence[int], reuse_key: str | None = None) -> int:
        """Tokens of a prompt that a row opened with it now would hold already."""
        for other in self._rows.values():
            self._publish_known(other)
        root = self._root if reuse_key is None else root_key(reuse_key)
        return self._match(prompt, root)[0] * self.block_size

    def close(self, row: int) -> None:
        """Gives up a row; its published blocks stay as long as their space is not needed."""
        state = self._row(row)
        self._publish_known(state)
        self._cut_tables(state, 0)
        for allocator in self.allocators:
            allocator.give_up(state.owner)
        del self._rows[row]

    def fork(self, row: int) -> int:
        """Opens a row that holds what another holds, in the same blocks."""
        state = self._row(row)
        tables = [list(table) for table in state.tables]
        made = BlockRow(
            list(state.lengths), tables, state.root, list(state.tokens), list(state.keys)
        )
        made.lossy_from = state.lossy_from
        return self._open(made)

    def _open(self, state: BlockRow) -> int:
        for allocator, table in zip(self.allocators, state.tables, strict=True):
            for block in table:
                if block != FREED:
                    allocator.share(block)
        row = next(i for i in range(len(self._rows) + 1) if i not in self._rows)
        self._rows[row] = state
        state.version = state.owner = next(self._versions)
        return row

    def renumber(self, rows: Sequence[int]) -> None:
        """Closes all rows but these, which get the numbers 0, 1, ... in the given order."""
        for row in self.open_rows:
            if row not in rows:
                self.close(row)
        self._rows = {new: self._row(old) for new, old in enumerate(rows)}

    def lengths(self, row: int) -> list[int]:
        """Tokens that each layer holds of a row; the list itself, not to be changed."""
        return self._row(row).lengths

    def table(self, row: int, group: int) -> list[int]:
        """Blocks of a row in a group, `FREED` where they were freed; the list itself."""
        return self._row(row).tables[group]

    def version(self, row: int) -> int:
        """Another number for every state of any row's tables."""
        return self._row(row).version

    # -- writing -----------------------------------------------------------------------------------

    def prepare(self, row: int, start: int, end: int, first: int, last: int) -> list[BlockCopy]:
        """Makes positions start..end-1 of a row writable in layers first..last-1.

        Returns:
            Copies to be made before anything is written.

        Raises:
            OutOfBlocks: too few blocks are free; then nothing was changed but what is behind
                windows freed.
        """
        state = self._row(row)
        size = self.block_size
        touched = []
        for index in self._groups_of(first, last):
            window = self.groups[index].window
            if window:
                self._free_behind(state, index, window)
            allocator, table = self.allocators[index], state.tables[index]
            new = -(-end // size) - len(table)
            at = range(start // size, min(len(table), -(-end // size)))
            wrong = [i for i in at if not allocator.writable(table[i])]
            copied = [i for i in wrong if allocator.references(table[i]) > 1]
            if max(new, 0) + len(copied) > allocator.free:
                raise OutOfBlocks(
                    f"{max(new, 0) + len(copied)} blocks of {size} tokens are needed for row {row} "
                    f"and {allocator.free} of {allocator.limit} are free: close a row first"
                )
            if new > 0 or wrong:
                touched.append((index, new, wrong))
        copies: list[BlockCopy] = []
        for index, new, wrong in touched:
            allocator, table = self.allocators[index], state.tables[index]
            for i in wrong:
                old = table[i]
                if allocator.references(old) == 1:
                    allocator.withdraw(old)
                    continue
                table[i] = allocator.allocate()
                allocator.release(old)
                copies.append(BlockCopy(index, old, table[i]))
            if new > 0:
                after = table[-1] if table and table[-1] != FREED else None
                table.extend(allocator.take(new, state.owner, after))
            state.version = next(self._versions)
        return copies

    def is_prepared(self, row: int, start: int, end: int, first: int, last: int) -> bool:
        """Whether `prepare` would do nothing, as at most steps: no block is begun."""
        state, at = self._row(row), start // self.block_size
        if at != (end - 1) // self.block_size:
            return False
        for index in self._groups_of(first, last):
            table = state.tables[index]
            if at >= len(table) or self.groups[index].window:
                return False
            if not self.allocators[index].writable(table[at]):
                return False
        return True

    def advance(self, row: int, end: int, first: int, last: int) -> None:
        """Layers first..last-1 hold the tokens before `end`."""
        self._row(row).lengths[first:last] = [end] * (last - first)

    def mark_lossy(self, row: int, position: int) -> None:
        """What some layer holds from this position on was not computed by that layer for it."""
        state = self._row(row)
        if state.lossy_from is None or position < state.lossy_from:
            state.lossy_from = position

    def _groups_of(self, first: int, last: int) -> tuple[int, ...]:
        """Groups that hold one of layers first..last-1."""
        if (first, last) not in self._touched:
            self._touched[first, last] = tuple(
                index
                for index, group in enumerate(self.groups)
                if any(first <= layer < last for layer in group.layers)
            )
        return self._touched[first, last]

    def _free_behind(self, state: BlockRow, index: int, window: int) -> None:
        low = first_needed(state.lengths[-1], window) // self.block_size
        table = state.tables[index]
        if not low or low > len(table) or table[low - 1] == FREED:
            return
        self._publish_known(state)
        for i in range(low - 1, -1, -1):
            if table[i] == FREED:
                break
            self.allocators[index].release(table[i])
            table[i] = FREED
        state.version = next(self._versions)

    # -- rolling back ------------------------------------------------------------------------------

    def crop(self, row: int, length: int) -> None:
        """Drops the tokens of a row at `length` and after, in every layer.

        Raises:
            DeliberateError: a group with a window has freed blocks that the next token attends to.
        """
        state = self._row(row)
        if length < 0:
            raise DeliberateError(f"cannot crop a cache to {length} tokens: it must be >= 0")
        if length >= state.lengths[0]:
            return
        if length:
            self._check_windows(row, state, min(length, state.lengths[-1]))
        # Before the cut: what is full and known now stays of use to others.
        self._publish_known(state)
        state.lengths[:] = [min(held, length) for held in state.lengths]
        del state.tokens[length:]
        del state.keys[length // self.block_size :]
        if state.lossy_from is not None and length <= state.lossy_from:
            state.lossy_from = None
        self._cut_tables(state, -(-length // self.block_size))

    def checkpoint(self, row: int) -> tuple[int, ...]:
        """What `rollback` needs to bring a row back to what it holds now."""
        return tuple(self._row(row).lengths)

    def rollback(self, row: int, checkpoint: Sequence[int]) -> None:
        """Drops what was added to a row since a checkpoint.

        Raises:
            DeliberateError: a layer holds fewer tokens than it did; or as for `crop`.
        """
        lengths = self._row(row).lengths
        if any(now < then for now, then in zip(lengths, checkpoint, strict=True)):
            raise DeliberateError(
                f"row {row} holds {lengths} tokens and cannot be rolled back to {list(checkpoint)}"
            )
        state = self._row(row)
        if checkpoint[0]:
            self._check_windows(row, state, checkpoint[-1])
        self.crop(row, checkpoint[0])
        state.lengths[:] = checkpoint
        # Blocks that were complete and are no longer are written again, so none may be known.
        del state.keys[checkpoint[-1] // self.block_size :]

    def _check_windows(self, row: int, state: BlockRow, length: int) -> None:
        """Raises DeliberateError where a token at `length` attends to a block that was freed."""
        for group, table in zip(self.groups, state.tables, strict=True):
            needed = first_needed(length, group.window) // self.block_size
            if needed < len(table) and table[needed] == FREED:
                raise DeliberateError(
                    f"row {row} cannot be rolled back to {length} tokens: blocks behind the window "
                    f"of {group.window} tokens were freed; roll back to 0 and run the tokens again"
                )

    def _cut_tables(self, state: BlockRow, blocks: int) -> None:
        for allocator, table in zip(self.allocators, state.tables, strict=True):
            if len(table) <= blocks:
                continue
            allocator.give_up(state.owner)
            # The last first: of a published text the end is evicted before its beginning.
            for block in reversed(table[blocks:]):
                if block != FREED:
                    allocator.release(block)
            del table[blocks:]
            state.version = next(self._versions)

    # -- publication -------------------------------------------------------------------------------

    def publish(self, row: int, tokens: Sequence[int]) -> int:
        """Publishes the full blocks of a row.

        Args:
            tokens: that the row holds from position 0 on; more than it holds are no harm.

        Returns:
            Tokens of the row in published blocks.

        Raises:
            DeliberateError: the tokens contradict those that the row is known to hold.
        """
        state = self._row(row)
        common = min(len(tokens), len(state.tokens))
        if list(tokens[:common]) != state.tokens[:common]:
            raise DeliberateError(
                f"row {row} does not begin with the tokens given: none is published"
            )
        if len(tokens) > len(state.tokens):
            state.tokens = list(tokens)
        self._publish_known(state)
        return len(state.keys) * self.block_size

    def _publish_known(self, state: BlockRow) -> None:
        if not self.share:
            return
        exact = min(len(state.tokens), state.lengths[-1])
        if state.lossy_from is not None:
            exact = min(exact, state.lossy_from)
        size = self.block_size
        for i in range(len(state.keys), exact // size):
            before = state.keys[-1] if state.keys else state.root
            key = block_key(before, state.tokens[i * size : (i + 1) * size])
            state.keys.append(key)
            for allocator, table in zip(self.allocators, state.tables, strict=True):
                if table[i] != FREED:
                    allocator.publish(table[i], key)

    def _match(
        self, prompt: Sequence[int], root: bytes
    ) -> tuple[int, list[bytes], list[list[int]]]:
        usable = max(0, len(prompt) - 1) // self.block_size if self.share else 0
        keys = block_keys(root, prompt, self.block_size, usable)
        blocks, found = self._tree.match(keys)
        tables = [[FREED if one is None else one for one in table] for table in found]
        return blocks, keys[:blocks], tables

    # -- room --------------------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated in every group, cached ones included."""
        return min(one.free for one in self.allocators)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take in a group without a window."""
        return -(-tokens // self.block_size)

    def evict(self) -> int:
        """Frees all blocks that are only kept for reuse; returns how many."""
        return sum(one.evict() for one in self.allocators)

    def check(self) -> None:
        """Raises RuntimeError where lengths rise with depth, or references and tables differ."""
        counts: list[dict[int, int]] = [{} for _ in self.groups]
        for row, state in self._rows.items():
            if state.lengths != sorted(state.lengths, reverse=True):
                raise RuntimeError(f"lengths of cache row {row} rise with depth: {state.lengths}")
            for index, (group, table) in enumerate(zip(self.groups, state.tables, strict=True)):
                held = max(state.lengths[layer] for layer in group.layers)
                if len(table) * self.block_size < held:
                    raise RuntimeError(f"row {row} holds {held} tokens in {len(table)} blocks")
                for block in table:
                    if block != FREED:
                        counts[index][block] = counts[index].get(block, 0) + 1
        for allocator, count in zip(self.allocators, counts, strict=True):
            allocator.check()
            wrong = {b: n for b, n in count.items() if allocator.references(b) != n}
            if wrong or allocator.used != len(count):
                raise RuntimeError(f"references of blocks differ from the tables: {wrong}")

    def _row(self, row: int) -> BlockRow:
        try:
            return self._rows[row]
        except KeyError:
            raise DeliberateError(
                f"row {row} of the cache is not open: {self.open_rows} are"
            ) from None
