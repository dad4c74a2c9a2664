"""The one exception that a user is meant to read."""


class MergelawError(Exception):
    """Bad input or a state that cannot be worked with.

    The message is one line: what is wrong, where, and what to do about it.
    """
