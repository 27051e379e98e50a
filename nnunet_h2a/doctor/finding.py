"""One line of ``h2a_doctor``."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        level: :data:`OK`; :data:`NOTE`, good to know; :data:`WARNING`, it may go wrong; :data:`PROBLEM`, it will.
        text: one line.
        fix: what to do, often a command.
    """

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {self.text}" + (f"; {self.fix}" if self.fix else "")


def some(names: list[str], most: int = 3) -> str:
    """Return a few of many names in words."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
