"""Warnings of fits and points: sentences with a code for programs."""


class Note(str):
    """A warning: its text, with ``code`` to tell kinds of warnings apart."""

    code: str

    def __new__(cls, code: str, text: str) -> "Note":
        note = super().__new__(cls, text)
        note.code = code
        return note

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Arguments of ``__new__`` for pickle and copy."""
        return self.code, str(self)
