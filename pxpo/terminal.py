"""The terminal that a command runs in."""

import io
import sys


def print_anything() -> None:
    """From now on what the terminal's encoding has no sign for is printed as an escape (\\u65e5),
    and raises no error: cp1252 and ASCII are still met."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # there may be none, as under pythonw
            stream.reconfigure(errors="backslashreplace")
