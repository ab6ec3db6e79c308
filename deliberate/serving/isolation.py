"""A step that fails is run again without the request that makes it fail, which is found by halving.

All requests of the failed step are tried together, since what failed may not fail again; then in
halves, the halves of a half that fails, and so on: with one culprit among n, about 2 log2 n trials.
The others keep their tokens and go on where they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from deliberate.config import Fidelity
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec

logger = logging.getLogger(__name__)
# Steps of a trial, after which a group counts as sound: its prompts are run, in chunks, and then
# each request gets a token.
_TRIAL_STEPS = 256


class EngineBroken(Exception):
    """The engine cannot decode the simplest request any more."""


class Isolation:
    """Finds the requests that make steps fail.

    Args:
        engine: that nothing else steps meanwhile.
        deliver: takes what requests have got.
        step: steps the engine.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[StepOutput]], None],
        step: Callable[[], list[StepOutput]],
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._step = step

    def after(self, error: Exception, unfinished: Collection[int]) -> dict[int, Exception]:
        """A step has failed: runs its requests again, but for the culprits, which are aborted.

        Args:
            error: of the step.
            unfinished: numbers of all requests.

        Returns:
            Why each culprit failed; none where the step did not fail again.

        Raises:
            EngineBroken: a request that can do no harm fails too.
        """
        culprits: dict[int, Exception] = {}
        try:
            ran = self._recover()
            groups = [ran or list(unfinished)]
            while groups:
                group = groups.pop()
                failure = self._trial(group, [one for one in unfinished if one not in group])
                if failure is None:
                    continue
                self._recover()
                if len(group) == 1:
                    self._engine.abort(group[0])
                    culprits[group[0]] = failure
                    continue
                groups += [group[len(group) // 2 :], group[: len(group) // 2]]
            if culprits or not ran:
                self._probe(unfinished)
        except EngineBroken:
            raise
        except Exception as second:
            raise EngineBroken(f"{_text(error)}, and then {_text(second)}") from second
        finally:
            self._engine.set_aside(None)
        return culprits

    def _recover(self) -> list[int]:
        outputs, ran = self._engine.recover()
        self._deliver(outputs)
        return ran

    def _trial(self, group: Collection[int], others: Collection[int]) -> Exception | None:
        """Steps a group alone until each of it has got something; why that fails."""
        self._engine.set_aside(others)
        missing = set(group)
        for _ in range(_TRIAL_STEPS):
            if not missing or not self._engine.unfinished:
                break
            try:
                outputs = self._step()
            except Exception as error:
                logger.warning("%d requests failed in a trial: %s", len(group), _text(error))
                return error
            self._deliver(outputs)
            missing -= {output.id for output in outputs}
        return None

    def _probe(self, unfinished: Collection[int]) -> None:
        """Decodes one token after one token."""
        self._engine.set_aside(unfinished)
        request = Request([0], 1, spec=DecodingSpec(fidelity=Fidelity.DENSE), end_tokens=())
        number = self._engine.add(request)
        failure = self._trial([number], unfinished)
        if failure is not None:
            self._recover()
            self._engine.abort(number)
            raise EngineBroken(_text(failure))


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
