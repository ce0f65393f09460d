"""One finding per check, and how they are shown: a line each for people, a list for scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `failed`: a run would not start, or not be what it asks for; `fix` says what helps."""

    topic: str
    name: str
    status: Status
    text: str
    fix: str = ""

    def line(self) -> str:
        """The finding in aligned columns."""
        remedy = f"; fix: {self.fix}" if self.fix else ""
        return f"{self.status:<9}{self.topic:<10}{self.name:<20}{self.text}{remedy}"


def any_failed(findings: Iterable[Finding]) -> bool:
    """Whether a script should stop here."""
    return any(finding.status == "failed" for finding in findings)


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(finding) for finding in findings]
