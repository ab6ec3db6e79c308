"""`deliberate lm-eval`: lm-evaluation-harness with our model and our tasks known to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deliberate.utils.errors import DeliberateError

TASKS = Path(__file__).parent / "tasks"


def main(arguments: Sequence[str]) -> None:
    """Runs the harness's own command line with ``--model deliberate`` unless it names another.

    Raises:
        DeliberateError: the harness is not installed.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError:
        raise DeliberateError(
            "lm-evaluation-harness is missing: pip install 'deliberate-depth[lm-eval]'"
        ) from None
    from deliberate.eval.lm_evaluation import model  # registers "deliberate"

    given = list(arguments)
    if not given or given[0] not in ("run", "ls", "validate", "-h", "--help"):
        given.insert(0, "run")
    if given[0] == "run" and not {"-h", "--help"} & set(given):
        if not any(one == "--model" or one.startswith("--model=") for one in given):
            given += ["--model", "deliberate"]
        if not any(one.startswith("--include_path") for one in given):
            given += ["--include_path", str(TASKS)]
    setup_logging()
    assert model.DeliberateLM is not None
    before, sys.argv = sys.argv, ["deliberate lm-eval", *given]
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = before
