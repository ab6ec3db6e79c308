"""The `deliberate` command."""

from __future__ import annotations

import sys

from deliberate.errors import DeliberateError


def main() -> None:
    """Entry point (grows into the full command line)."""
    try:
        from deliberate.train.app import main as train_main

        train_main(sys.argv[2:])
    except DeliberateError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
