"""Errors of a command as one line on stderr: status 2 for a mistake, 130 for Ctrl-C."""

from __future__ import annotations

import errno
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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.errno is None and " requested and " in str(error):  # numpy's for a short write
            sys.exit(_fail(f"No space left on device, of bytes {error}{_FULL}"))
        sys.exit(_fail(f"{error}{_FULL if full else ''}"))
    except Exception as error:
        if _is_full(error):
            sys.exit(_fail(f"{error}{_FULL}"))
        message = getattr(error, "format_message", None)  # what typer raises for a mistyped option
        if message is None:
            raise
        sys.exit(_fail(message()))


_FULL = ": free space there, or write to another place"


def _is_full(error: Exception) -> bool:
    """Whether safetensors or tokenizers found no room: what they raise is no `OSError`."""
    from safetensors import SafetensorError

    full = (f"(os error {errno.ENOSPC})", f"(os error {errno.EDQUOT})")
    # The class of tokenizers' errors is `Exception` itself.
    written_in_rust = isinstance(error, SafetensorError) or type(error) is Exception
    return written_in_rust and any(code in str(error) for code in full)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE
