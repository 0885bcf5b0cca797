"""Errors as sentences."""

import sys
from functools import cache


def first_line(error):
    """The first line of an exception's text; its class, if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warning(text):
    print(f"warning: {text}", file=sys.stderr)


warn_once = cache(warning)  # prints the same text once in a process


class UserError(Exception):
    """A mistake of the user, or a fault of their files or machine.

    The text is one sentence that says what is wrong and what to do. The commands print it without
    a traceback and exit with status 2 (support/cli.py). `details`, for example the traceback of a
    user's own function, is printed below it.
    """

    def __init__(self, text, details=""):
        super().__init__(text)
        self.details = details
