"""The one exception type that reaches users as a single line."""

from __future__ import annotations

from deliberate.installation import refuse_other_project

# Again, since the package's own __init__ is one of the files that another project overwrites.
refuse_other_project()


class DeliberateError(ValueError):
    """A mistake in what the user gave: the message is one line that names the value and what
    would be right. The command line prints it without a traceback and exits with status 2."""


class Interrupted(Exception):
    """A command was stopped by Ctrl-C; the message names what was kept and how to resume."""
