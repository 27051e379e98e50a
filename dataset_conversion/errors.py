"""The exceptions that converters raise for data or settings they cannot use."""

from __future__ import annotations

import os


class ConversionError(ValueError):
    """A case, or a whole run, that cannot be converted, with the reason in words a user can act on.

    Attributes:
        what: what is wrong, naming tag and value where there are any.
        remedy: what would make it convertible, or None.
        file: the file or folder that shows the fault, or None.
    """

    def __init__(self, what: str, remedy: str | None = None, file: str | os.PathLike[str] | None = None) -> None:
        self.what = what
        self.remedy = remedy
        self.file = None if file is None else os.fspath(file)
        super().__init__(what, remedy, self.file)

    def __str__(self) -> str:
        text = self.what if self.file is None else f"{self.file}: {self.what}"
        return text if self.remedy is None else f"{text}; {self.remedy}"

    def located(self, file: str | os.PathLike[str]) -> ConversionError:
        """Return this error with ``file`` filled in where it was still unknown."""
        if self.file is None:
            self.file = os.fspath(file)
            self.args = (self.what, self.remedy, self.file)
        return self


def where(error: BaseException) -> str:
    """Return type, message and the innermost line of an exception nobody expected, on one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"


class UsageError(ConversionError):
    """A setting (flag, environment variable, dataset ID) that stops the whole run before anything is written."""
