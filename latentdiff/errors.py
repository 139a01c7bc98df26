"""The one exception that a user's mistake raises, and how programs show it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what it is and what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a program; a user's mistake ends it with one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        sys.exit(_failed(error))


def _failed(error: InputError) -> int:
    print(f"latentdiff: {error}", file=sys.stderr)
    return 2
