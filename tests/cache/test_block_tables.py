"""Blocks, their tables and the prefix tree: arbitrary lives of sequences, and single behaviours."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from deliberate.cache.block_allocator import BlockAllocator
from deliberate.cache.block_tables import BlockTables
from deliberate.cache.kv_cache import OutOfBlocks
from deliberate.cache.layer_groups import FREED, LayerGroup, groups_by_window
from deliberate.cache.prefix_tree import block_keys, first_needed, root_key
from deliberate.utils.errors import DeliberateError

SIZE, BLOCKS, LAYERS = 3, 11, 4
ONE = (LayerGroup((0, 1, 2, 3)),)


class Lives(RuleBasedStateMachine):
    """Rows are opened, run to uneven depth, forked, rolled back and closed, in scarce blocks.

    Every slot of every block holds, for each layer, the tokens that its keys would stand for: a
    write to a block that something else relies on, or a wrong entry of a table, shows as contents
    that are not the row's own.
    """

    groups: tuple[LayerGroup, ...] = (LayerGroup((0, 2)), LayerGroup((1, 3), window=4))
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(self.groups, SIZE, BLOCKS, reuse_key="model")
        self.held: dict[tuple[int, int, int, int], object] = {}  # group, block, slot, layer
        self.texts: dict[int, list[int]] = {}
        self.lossy: dict[int, dict[tuple[int, int], object]] = {}  # layer, position
        self.serial = 0

    def place(self, row: int, layer: int, position: int) -> tuple[int, int, int, int]:
        group = next(i for i, one in enumerate(self.groups) if layer in one.layers)
        block = self.tables.table(row, group)[position // SIZE]
        assert block != FREED
        return group, block, position % SIZE, layer

    def expected(self, row: int, layer: int, position: int) -> object:
        lossy = self.lossy[row].get((layer, position))
        return lossy or tuple(self.texts[row][: position + 1])

    def write(self, row: int, start: int, end: int, first: int, last: int) -> bool:
        try:
            copies = self.tables.prepare(row, start, end, first, last)
        except OutOfBlocks:
            return False
        for group, source, target in copies:
            for layer in self.groups[group].layers:
                for slot in range(SIZE):
                    self.held.pop((group, target, slot, layer), None)
                    if (group, source, slot, layer) in self.held:
                        what = self.held[group, source, slot, layer]
                        self.held[group, target, slot, layer] = what
        for layer in range(first, last):
            for position in range(start, end):
                at = self.place(row, layer, position)
                assert self.tables.allocators[at[0]].writable(at[1])
                self.held[at] = self.expected(row, layer, position)
        self.tables.advance(row, end, first, last)
        return True

    @rule(target=rows, prompt=st.lists(st.integers(0, 1), max_size=11))
    def open(self, prompt):
        row = self.tables.open(prompt)
        assert row not in self.texts
        self.texts[row], self.lossy[row] = list(prompt), {}
        return row

    @rule(target=rows, row=rows)
    def fork(self, row):
        new = self.tables.fork(row)
        self.texts[new], self.lossy[new] = list(self.texts[row]), dict(self.lossy[row])
        return new

    @rule(row=rows, first=st.integers(0, LAYERS - 1), last=st.integers(1, LAYERS), data=st.data())
    def run(self, row, first, last, data):
        """A pass: new tokens from the bottom, or those that are pending at a layer."""
        lengths = self.tables.lengths(row)
        if first >= last or lengths[first] != lengths[last - 1]:
            return
        start = lengths[first]
        most = 7 if first == 0 else lengths[first - 1] - start
        if most < 1:
            return
        count = data.draw(st.integers(1, most))
        text = self.texts[row]
        if start + count > len(text):
            more = st.lists(st.integers(0, 1), min_size=count, max_size=count)
            text += data.draw(more)[: start + count - len(text)]
        self.write(row, start, start + count, first, last)

    @rule(row=rows, first=st.integers(1, LAYERS - 1))
    def fill_lossily(self, row, first):
        """ "propagate": layers above an exit get keys that are not their own."""
        lengths = self.tables.lengths(row)
        start = lengths[first]
        if lengths[first - 1] <= start or lengths[-1] != start:
            return
        before = dict(self.lossy[row])
        self.serial += 1
        for layer in range(first, LAYERS):
            self.lossy[row][layer, start] = ("lossy", self.serial)
        if self.write(row, start, start + 1, first, LAYERS):
            self.tables.mark_lossy(row, start)
        else:
            self.lossy[row] = before

    @rule(row=rows, share=st.floats(0, 1))
    def crop(self, row, share):
        held = self.tables.lengths(row)[0]
        length = int(share * held)
        try:
            self.tables.crop(row, length)
        except DeliberateError:
            assert length and any(
                FREED in self.tables.table(row, i) for i in range(len(self.groups))
            )
            return
        if length < held:
            self.cut(row, length)

    def cut(self, row, length):
        del self.texts[row][length:]
        self.lossy[row] = {at: v for at, v in self.lossy[row].items() if at[1] < length}

    @rule(row=rows, data=st.data())
    def run_and_roll_back(self, row, data):
        checkpoint = self.tables.checkpoint(row)
        self.run(row, 0, data.draw(st.integers(1, LAYERS)), data)
        self.run(row, data.draw(st.integers(1, LAYERS - 1)), LAYERS, data)
        changed = self.tables.lengths(row)[0] > checkpoint[0]
        try:
            self.tables.rollback(row, checkpoint)
        except DeliberateError:
            return
        assert tuple(self.tables.lengths(row)) == checkpoint
        if changed:
            self.cut(row, checkpoint[0])

    @rule(row=rows)
    def publish(self, row):
        self.tables.publish(row, self.texts[row])

    @rule(row=consumes(rows))
    def close(self, row):
        self.tables.close(row)
        del self.texts[row], self.lossy[row]

    @rule()
    def evict(self):
        self.tables.evict()

    @invariant()
    def nothing_leaks(self):
        self.tables.check()

    @invariant()
    def every_row_holds_its_own(self):
        for row in self.texts:
            lengths = self.tables.lengths(row)
            for group in self.groups:
                for layer in group.layers:
                    for position in range(first_needed(lengths[-1], group.window), lengths[layer]):
                        at = self.place(row, layer, position)
                        assert self.held[at] == self.expected(row, layer, position)

    def teardown(self):
        for row in list(self.texts):
            self.tables.close(row)
        self.tables.check()
        assert all(one.used == 0 for one in self.tables.allocators)
        self.tables.evict()
        for allocator in self.tables.allocators:
            assert allocator.free == BLOCKS and allocator.cached == 0


class TestLives(Lives.TestCase):
    settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class LivesOfOneGroup(Lives):
    groups = ONE


class TestLivesOfOneGroup(LivesOfOneGroup.TestCase):
    settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def filled(tables: BlockTables, tokens: list[int]) -> int:
    row = tables.open(tokens)
    held = tables.lengths(row)[0]
    tables.prepare(row, held, len(tokens), 0, LAYERS)
    tables.advance(row, len(tokens), 0, LAYERS)
    return row


def test_a_prompt_takes_up_full_blocks_of_an_earlier_one_and_runs_at_least_one_token():
    tables = BlockTables(ONE, SIZE, BLOCKS)
    filled(tables, [1, 2, 3, 4, 5, 6, 7])
    for prompt, held in (
        ([1, 2, 3, 4, 5, 6, 7], 6),
        ([1, 2, 3, 4, 5, 6], 3),
        ([1, 2, 3, 4, 5, 9, 9], 3),
        ([9, 2, 3, 4], 0),
        ([1], 0),
        ([], 0),
    ):
        assert tables.published_tokens(prompt) == held
        row = tables.open(prompt)
        assert tables.lengths(row) == [held] * LAYERS
        tables.close(row)


def test_blocks_are_published_only_up_to_the_top_layer():
    tables = BlockTables(ONE, SIZE, BLOCKS)
    row = tables.open([1, 2, 3, 4, 5, 6, 7])
    tables.prepare(row, 0, 7, 0, 2)
    tables.advance(row, 7, 0, 2)
    tables.prepare(row, 0, 5, 2, LAYERS)
    tables.advance(row, 5, 2, LAYERS)
    assert tables.published_tokens([1, 2, 3, 4, 5, 6, 7]) == 3


def test_lossy_keys_are_never_published_until_they_are_rolled_back():
    tables = BlockTables(ONE, SIZE, BLOCKS)
    row = filled(tables, [1, 2, 3, 4, 5, 6, 7])
    tables.mark_lossy(row, 4)
    assert tables.published_tokens([1, 2, 3, 4, 5, 6, 7]) == 3
    tables.crop(row, 3)
    tables.prepare(row, 3, 7, 0, LAYERS)
    tables.advance(row, 7, 0, LAYERS)
    tables.publish(row, [1, 2, 3, 4, 5, 6, 7])
    assert tables.published_tokens([1, 2, 3, 4, 5, 6, 7]) == 6


def test_rows_of_another_reuse_key_share_nothing():
    tables = BlockTables(ONE, SIZE, BLOCKS, reuse_key="weights A")
    filled(tables, [1, 2, 3, 4])
    assert tables.published_tokens([1, 2, 3, 4]) == 3
    assert tables.published_tokens([1, 2, 3, 4], "weights A, adapter B") == 0
    off = BlockTables(ONE, SIZE, BLOCKS, share=False)
    filled(off, [1, 2, 3, 4])
    assert off.published_tokens([1, 2, 3, 4]) == 0


def test_published_blocks_of_closed_rows_are_kept_until_blocks_are_scarce():
    tables = BlockTables(ONE, SIZE, 3)
    for text in ([1, 1, 1, 1], [2, 2, 2, 2]):
        tables.close(filled(tables, text))
    assert tables.free_blocks == 3 and tables.allocators[0].cached == 2
    row = filled(tables, [3, 3, 3, 3])  # two blocks: one was free, the oldest is evicted
    assert tables.published_tokens([1, 1, 1, 1]) == 0
    assert tables.published_tokens([2, 2, 2, 2]) == 3
    with pytest.raises(OutOfBlocks, match="close a row first"):
        tables.prepare(row, 4, 12, 0, LAYERS)
    assert tables.lengths(row) == [4] * LAYERS
    tables.check()


def test_a_fork_shares_blocks_until_one_of_them_writes():
    tables = BlockTables(ONE, SIZE, BLOCKS)
    row = filled(tables, [1, 2, 3, 4])
    fork = tables.fork(row)
    assert tables.allocators[0].used == 2
    (copy,) = tables.prepare(fork, 4, 5, 0, LAYERS)
    assert copy.source == tables.table(row, 0)[1] and copy.target == tables.table(fork, 0)[1]
    assert tables.table(row, 0)[0] == tables.table(fork, 0)[0]
    assert tables.prepare(row, 4, 5, 0, LAYERS) == []


def test_blocks_behind_a_window_are_freed_and_limit_how_far_a_row_rolls_back():
    groups = groups_by_window([0, 4, 0, 4])
    assert groups == (LayerGroup((0, 2)), LayerGroup((1, 3), 4))
    tables = BlockTables(groups, SIZE, BLOCKS)
    row = tables.open()
    for position in range(20):
        tables.prepare(row, position, position + 1, 0, LAYERS)
        tables.advance(row, position + 1, 0, LAYERS)
        # The window of a token and the block that is begun.
        assert tables.allocators[1].used <= 3
    assert tables.allocators[0].used == 7
    tables.crop(row, 19)
    with pytest.raises(DeliberateError, match="behind the window"):
        tables.crop(row, 8)
    assert tables.lengths(row) == [19] * LAYERS
    tables.crop(row, 0)
    assert tables.allocators[1].used == 0


def test_a_beginning_is_reused_where_the_window_at_its_end_is_still_held():
    tables = BlockTables(groups_by_window([0, 4, 0, 4]), SIZE, BLOCKS)
    text = list(range(14))
    row = tables.open(text)
    for position in range(14):
        tables.prepare(row, position, position + 1, 0, LAYERS)
        tables.advance(row, position + 1, 0, LAYERS)
    tables.close(row)
    assert tables.published_tokens(text) == 12
    again = tables.open(text)
    assert tables.table(again, 1)[:3] == [FREED] * 3 and FREED not in tables.table(again, 0)
    tables.close(again)
    tables.allocators[1].evict()
    assert tables.published_tokens(text) == 0


def test_keys_of_blocks_stand_for_all_tokens_before_them():
    root = root_key("model")
    keys = block_keys(root, [1, 2, 3, 4, 5, 6], 2, 3)
    other = block_keys(root, [0, 2, 3, 4, 5, 6], 2, 3)
    assert len(set(keys + other)) == 6
    assert block_keys(root, [1, 2, 3, 4], 2, 2) == keys[:2]
    assert block_keys(root_key("other"), [1, 2], 2, 1) != keys[:1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BlockAllocator(0),
        lambda: LayerGroup(()),
        lambda: LayerGroup((1, 0)),
        lambda: LayerGroup((0,), -1),
        lambda: BlockTables((LayerGroup((0,)), LayerGroup((2,))), 4, 4),
        lambda: BlockTables(ONE, 0, 4),
        lambda: BlockTables(ONE, 4, 4).close(0),
        lambda: BlockTables(ONE, 4, 4).crop(3, 0),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(wrong):
    with pytest.raises(DeliberateError) as refused:
        wrong()
    assert "\n" not in str(refused.value)


def test_blocks_are_never_freed_twice_or_shared_when_free():
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.release(block)
    for wrong in (allocator.release, allocator.share, allocator.withdraw):
        with pytest.raises(RuntimeError):
            wrong(block)
    with pytest.raises(RuntimeError):
        allocator.publish(block, b"key")
