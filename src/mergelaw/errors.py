"""Errors shown to users as one line."""

import difflib
import os
from collections.abc import Iterable


class MergelawError(Exception):
    """Bad input, or a state that mergelaw cannot work with.

    The message is one line: where, what is wrong, what to do.
    """


def system_message(error: OSError) -> str:
    """An error of the operating system as one line: the file and the system's reason."""
    reason = os.strerror(error.errno) if error.errno is not None else error
    return f"{error.filename or 'file system'}: {reason}; fix it and rerun"


def out_of_memory(error: BaseException) -> bool:
    """True for an error of Python, torch or the system that says that there is no memory left."""
    kinds, text = ("MemoryError", "OutOfMemoryError"), str(error).lower()
    words = ("allocate memory", "not enough memory", "out of memory", "os error 12")
    return type(error).__name__ in kinds or any(word in text for word in words)


def nearest(name: str, names: Iterable[str]) -> str:
    """Hint for an unknown name: the most similar known name, or a list of the known names."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
