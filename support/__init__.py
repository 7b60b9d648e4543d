"""The plumbing of a run, one job a file, and the two ways in which every part of it speaks to the user."""

import contextlib
import os
import sys
from collections.abc import Iterator

_program = "main.py"  # which speaks to the user


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the flag, the value and the remedy."""


def warn(message: str) -> None:
    """Print a line to stderr, from one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            print(f"{_program}: {' '.join(message.splitlines())}", file=sys.stderr)  # a file's name may hold line ends


@contextlib.contextmanager
def mistakes_in_one_line(program: str) -> Iterator[None]:
    """Turn a UserError inside the with block into a line on stderr and exit status 2; warnings name the program too."""
    global _program
    before, _program = _program, program
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    finally:
        _program = before
