"""The requests of an engine, by where they are in their life, and the cache rows of the running."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.admitted import Admitted, EngineStats, StepOutput
from deliberate.engine.recovery import Recovery
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.step_plan import RequestView
from deliberate.engine.strict import NearTies
from deliberate.utils.errors import DeliberateError


class Roster:
    """Requests that wait, that run in a row of the cache, or that are set aside.

    Args:
        runner: of the engine; it has the cache.
        max_running: most requests that have a cache row at a time.
        reuse_key: within the same key, as of their opening, rows share beginnings in blocks.
    """

    def __init__(
        self, runner: SegmentRunner, max_running: int, reuse_key: Callable[[], str | None]
    ) -> None:
        self._runner = runner
        self._cache = runner.cache
        self._max_running = max_running
        self._reuse_key = reuse_key
        self._block_size = runner.cache.block_size if isinstance(runner.cache, BlockCache) else 0
        self._waiting: dict[int, Admitted] = {}
        self._running: dict[int, Admitted] = {}
        self._aside: dict[int, Admitted] = {}
        self._near_ties: dict[int, NearTies] = {}
        self._recovery = Recovery(runner)
        self._stats = EngineStats()
        self._lock = threading.RLock()

    @property
    def cache(self) -> SegmentCache:
        """Keys and values of those that run."""
        return self._cache

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    @property
    def _alone(self) -> bool:
        """Whether one request runs and no other can join it, so that it need not be interrupted."""
        running = len(self._running)
        return running == 1 and (not self._waiting or running >= self._max_running)

    @contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Within, the model is not changed: the key of shared beginnings is named only once."""
        named, key = self._reuse_key, self._reuse_key()
        self._reuse_key = lambda: key
        try:
            yield
        finally:
            self._reuse_key = named

    def abort(self, number: int) -> bool:
        """Gives a request up between two steps; False where it was finished already."""
        with self._lock:
            if any(one.pop(number, None) for one in (self._waiting, self._aside)):
                self._near_ties.pop(number, None)
            else:
                entry = self._running.get(number)
                if entry is None:
                    return False
                self._end(entry)
            self._stats.aborted += 1
            return True

    def recover(self) -> tuple[list[StepOutput], list[int]]:
        """Makes the engine sound again after a step that failed: all that ran wait, with their
        accepted tokens.

        Returns:
            Outputs that the failed step had made, and the numbers of those that ran in it.
        """
        with self._lock:
            numbers = list(self._running)
            for entry in list(self._running.values()):
                self._preempt(entry, self._recovery.rewind(entry))
            outputs, self._recovery.outputs = self._recovery.outputs, []
            return outputs, numbers

    def set_aside(self, numbers: Collection[int] | None) -> None:
        """These are not stepped, nor counted as unfinished, until the next call; None: none."""
        with self._lock:
            self._waiting.update(self._aside)
            self._aside = {}
            for number in numbers or ():
                if number in self._running:
                    self._preempt(self._running[number])
                if number in self._waiting:
                    self._aside[number] = self._waiting.pop(number)

    def _waiting_views(self) -> list[RequestView]:
        cache, waiting = self._cache, self._waiting.values()
        if not waiting:  # naming the keys of a prefix compares weights, which takes time
            return []
        room = len(self._running) < self._max_running
        follows_length = self._runner.backbone.rope_follows_length
        # A reuse key compares weights: a part of a millisecond, for whom somebody waits only.
        if not waiting or not isinstance(cache, BlockCache) or not room or follows_length:
            return [entry.waiting_view() for entry in waiting]
        key, size = self._reuse_key(), cache.block_size
        return [one.waiting_view(cache.published_tokens(one.shared, key), size) for one in waiting]

    def _open(self, entry: Admitted) -> None:
        """Gives a waiting request a row of the cache.

        Raises:
            OutOfBlocks: there is none.
        """
        if entry.cache_row is None:
            shared = [] if self._runner.backbone.rope_follows_length else entry.shared
            row = self._cache.open_row(entry.most_tokens, shared, self._reuse_key())
        else:
            row = entry.cache_row
        entry.sequence.row = row
        self._place(entry)
        del self._waiting[entry.number]
        self._running[entry.number] = entry
        entry.prefilling = True

    def _place(self, entry: Admitted) -> None:
        """The images of its prompt may have rotary positions of their own."""
        if entry.request.seen:
            prompt = entry.request.prompt_ids
            self._runner.backbone.place_row(entry.sequence.row, prompt, entry.request.seen)

    def _end(self, entry: Admitted) -> None:
        """A running request is complete, or given up."""
        del self._running[entry.number]
        self._near_ties.pop(entry.number, None)
        self._close(entry)

    @torch.inference_mode()
    def _close(self, entry: Admitted) -> None:
        self._runner.forget(entry.sequence)
        if entry.drafts_aside is not None:
            entry.drafts_aside.forget()
        self._cache.close_row(entry.sequence.row)
        if entry.request.seen:
            self._runner.backbone.place_row(entry.sequence.row)

    def _make_room(self, error: DeliberateError) -> None:
        """Something was not begun for want of blocks: preempts the request that came last.

        Raises:
            DeliberateError: `error`, where it is the only one.
        """
        if len(self._running) < 2:
            raise error
        key = {n: (one.request.priority, -one.arrival, -n) for n, one in self._running.items()}
        self._preempt(self._running[min(key, key=key.__getitem__)])

    def _preempt(self, entry: Admitted, held: list[int] | None = None) -> None:
        """Closes a running sequence's row; it waits again, with its accepted tokens.

        Args:
            held: tokens that each segment's layers are to hold; None: as many as they do.
        """
        if held is None:
            fresh = entry.prefilling and entry.refill.new
            held = [] if fresh else self._runner.held(entry.sequence)
            if entry.prefilling and not entry.refill.new:
                held = [entry.refill.held(k) for k in range(len(held))]
        self._close(entry)
        entry.preempted(held)
        del self._running[entry.number]
        self._waiting[entry.number] = entry
        self._stats.preempted += 1
