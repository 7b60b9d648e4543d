"""The plumbing of a run, one file for each job; this file defines UserError and warn, which all parts use."""

import contextlib
import os
import sys
from collections.abc import Iterator

_program = "main.py"  # the name that starts each message


class UserError(Exception):
    """A mistake that the user can fix; its text is one line that names the flag, the value and the remedy."""


def warn(message: str) -> None:
    """Print one line on stderr, from one process on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            print(f"{_program}: {' '.join(message.splitlines())}", file=sys.stderr)  # file names may hold line ends


@contextlib.contextmanager
def mistakes_in_one_line(program: str) -> Iterator[None]:
    """Turn a UserError in the with block into one line on stderr and exit status 2; warnings name the program too."""
    global _program
    before, _program = _program, program
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    finally:
        _program = before
