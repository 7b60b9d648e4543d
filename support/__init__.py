"""The plumbing of a run, one job a file, and the two ways in which every part of it speaks to the user."""

import contextlib
import os
import sys


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the flag, the value and the remedy."""


def warn(message: str) -> None:
    """Print a line to stderr, from one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            print(f"main.py: {' '.join(message.splitlines())}", file=sys.stderr)  # a file's name may hold line ends
