"""Requests that have ended and keep their keys and values, for one that goes on where they ended.

A chain of reasoning is decoded in stretches, and between two of them a fork of it is made to
answer. Each of these is a request whose prompt begins with the tokens of the one before it. It
takes over that one's row: the row is cut to the tokens that both have, and only what is new is run,
in one pass. Rows that are held are given up when others need their space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from deliberate.config import Fidelity
from deliberate.engine.admitted import Admitted, StepOutput
from deliberate.engine.request import Decoding, Request
from deliberate.engine.roster import Roster
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

# How a request is decoded while so many run, itself included; raises DeliberateError where that is
# not possible.
Resolve = Callable[[Request, int], Decoding]
# What a spec with these becomes does not depend on lengths and load.
_ALIKE = (Fidelity.DENSE, Fidelity.EXACT)


class HeldRows(Roster):
    """A roster whose requests may keep their rows after their end, and take over others'.

    Args:
        *args: of `Roster`.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._held: dict[int, Admitted] = {}
        self._constant = 0
        self._decodings: dict[DecodingSpec, Decoding] = {}

    @contextmanager
    def constant_weights(self) -> Iterator[None]:
        """As `Roster.constant_weights`; within, requests may be held."""
        with super().constant_weights():
            self._constant += 1
            try:
                yield
            finally:
                self._constant -= 1
                if not self._constant:
                    self._decodings.clear()
                    for number in list(self._held):
                        self.release(number)

    def release(self, number: int) -> bool:
        """Gives up the row of a held request; False where it is not, or no longer, held."""
        with self._lock:
            entry = self._held.pop(number, None)
            if entry is not None:
                self._close(entry)
            return entry is not None

    def recover(self) -> tuple[list[StepOutput], list[int]]:
        """As `Roster.recover`; no request is held afterwards."""
        with self._lock:
            while self._held:
                self._drop_oldest()
            return super().recover()

    def _decoding(self, resolve: Resolve, request: Request, running: int) -> Decoding:
        """How a request is decoded; while the weights are constant a spec is resolved once, where
        nothing of the request but its spec, length and end tokens matters."""
        own = (request.sampling, request.constraint, request.budget)
        alike = self._constant and request.end_tokens is not None and not any(own)
        known = self._decodings.get(request.spec) if alike else None
        if known is None:
            known = resolve(request, running)
            if alike and known.settings.fidelity in _ALIKE and not known.of_request_alone:
                self._decodings[request.spec] = known
            return known
        assert request.end_tokens is not None
        new, ends = request.max_new_tokens, frozenset(request.end_tokens)
        return replace(known, settings=replace(known.settings, max_new_tokens=new, end_tokens=ends))

    def _check_hold(self, hold: bool) -> None:
        if hold and not self._constant:
            raise DeliberateError(
                "hold=True outside Engine.constant_weights(): what is kept would not follow a "
                "change of the weights; hold requests within it"
            )

    def _end(self, entry: Admitted) -> None:
        if not entry.request.hold or not self._can_hold(entry):
            super()._end(entry)
            return
        del self._running[entry.number]
        self._runner.clear_row(entry.sequence.row)
        self._held[entry.number] = entry

    def _can_hold(self, entry: Admitted) -> bool:
        """Whether each layer's keys and values are those that dense decoding would have made, and
        nothing else belongs to them."""
        sequence = entry.sequence
        alone = sequence.gated or entry.near_ties is not None
        return sequence.defers and not alone and not self._runner.backbone.rope_follows_length

    def _take_over(self, entry: Admitted) -> bool:
        """Gives a new request the row of the held one that it comes after; whether it runs now."""
        number = entry.request.after
        held = None if number is None else self._held.pop(number, None)
        if held is None:
            return False
        row, prompt = held.sequence.row, entry.refill.tokens
        known = held.sequence.ids(len(held.sequence.records))
        kept = min(
            _common(known, prompt),
            self._cache.length(self._runner.boundaries[-1] - 1, row),
            len(prompt) - 1,
        )
        try:
            if kept < 1 or not self._can_hold(entry):
                raise DeliberateError("nothing of it can be taken over")
            self._cache.crop(kept, row)
        except DeliberateError:  # or a window has freed what comes before: all is run again
            self._close(held)
            return False
        entry.take_over(held, kept)
        self._runner.backbone.place_row(entry.sequence.row)
        self._place(entry)
        self._running[entry.number] = entry
        if not entry.prefilling:
            entry.prefilled(self._runner)
        return True

    def _open(self, entry: Admitted) -> None:
        while self._held and len(self._running) + len(self._held) >= self._max_running:
            self._drop_oldest()
        super()._open(entry)

    def _make_room(self, error: DeliberateError) -> None:
        if self._held:
            self._drop_oldest()
        else:
            super()._make_room(error)

    def _drop_oldest(self) -> None:
        self._close(self._held.pop(next(iter(self._held))))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both begin."""
    size = min(len(first), len(second))
    if first[:size] == second[:size]:
        return size
    return next(at for at in range(size) if first[at] != second[at])
