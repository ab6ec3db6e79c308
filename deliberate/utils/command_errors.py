"""Errors of a command as one line on stderr: status 2 for a mistake, 130 for Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deliberate.utils.errors import DeliberateError, Interrupted

MISTAKE, INTERRUPTED = 2, 130


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the errors that a user can mend into one line and an exit status.

    Raises:
        SystemExit: with the status; any other exception is a bug and passes through.
    """
    try:
        yield
    except DeliberateError as error:
        sys.exit(_fail(str(error)))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that became unwritable: no bug
        sys.exit(_fail(str(error)))
    except Exception as error:
        message = getattr(error, "format_message", None)  # what typer raises for a mistyped option
        if message is None:
            raise
        sys.exit(_fail(message()))


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE
