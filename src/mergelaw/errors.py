"""What a user is meant to read."""

import os


class MergelawError(Exception):
    """Bad input or a state that cannot be worked with.

    The message is one line: what is wrong, where, and what to do about it.
    """


def of_system(error: OSError) -> str:
    """The same of a file that cannot be read or written, of which the system tells why."""
    why = os.strerror(error.errno) if error.errno is not None else error
    return f"{error.filename or 'file system'}: {why}; mend it, run again"
