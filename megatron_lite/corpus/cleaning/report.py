"""What a cleaning run did: counts by rule with a few examples, as JSON and in print."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_lite.corpus.cleaning.page import Change, Drop
from megatron_lite.corpus.reader import Problem

_EXAMPLES = 5


class Cleaned(NamedTuple):
    """What became of the record at path:line; bytes are of its text in UTF-8.

    dropped: what dropped it, or None
    content: the record to write
    """

    path: str
    line: int
    bytes_read: int
    bytes_kept: int
    dropped: Drop | None
    changes: list[Change]
    content: dict[str, Any]


@dataclass
class _Tally:
    """One rule's part: documents, of dropped ones their bytes, of changed ones what was changed; the first few."""

    documents: int = 0
    bytes: int = 0
    count: int = 0
    unit: str = ""
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.documents += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {reason}")


@dataclass
class CleanReport:
    """Documents read = kept + dropped + rejected; bytes are of the texts in UTF-8.

    dropped: by the first rule that dropped the document
    changed: of kept documents alone, which may count under several rules
    """

    kept: int = 0
    dropped: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    seconds: float = 0.0
    rejections: _Tally = field(default_factory=_Tally)
    dropped_by: dict[str, _Tally] = field(default_factory=dict)
    changed_by: dict[str, _Tally] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        return self.rejections.documents

    @property
    def read(self) -> int:
        return self.kept + self.dropped + self.rejected

    def add(self, document: Cleaned) -> None:
        """Count one document."""
        where = f"{document.path}:{document.line}"
        self.bytes_read += document.bytes_read
        if document.dropped is not None:
            self.dropped += 1
            tally = self.dropped_by.setdefault(document.dropped.check, _Tally())
            tally.add(where, document.dropped.reason)
            tally.bytes += document.bytes_read
            return
        self.kept += 1
        self.bytes_kept += document.bytes_kept
        for change in document.changes:
            tally = self.changed_by.setdefault(change.check, _Tally(unit=change.unit))
            tally.add(where, f"{change.amount:,} {change.unit}")
            tally.count += change.amount

    def reject(self, problem: Problem) -> None:
        self.rejections.add(f"{problem.path}:{problem.line}", problem.reason)

    def to_json(self, settings: Any) -> str:
        """The report without times: the same for the same input and settings, whatever the workers."""
        content = {
            "documents": {
                "read": self.read,
                "kept": self.kept,
                "dropped": self.dropped,
                "rejected": self.rejected,
            },
            "bytes": {"read": self.bytes_read, "kept": self.bytes_kept},
            "dropped": {
                name: {"documents": tally.documents, "bytes": tally.bytes, "examples": tally.examples}
                for name, tally in _by_size(self.dropped_by)
            },
            "changed": {
                name: {
                    "documents": tally.documents,
                    "count": tally.count,
                    "unit": tally.unit,
                    "examples": tally.examples,
                }
                for name, tally in _by_size(self.changed_by)
            },
            "rejected": self.rejections.examples,
            "settings": settings,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        lines = [
            f"documents read {self.read:,} = kept {self.kept:,} + dropped {self.dropped:,} + rejected "
            f"{self.rejected:,}",
            f"bytes of text read {self.bytes_read:,}, kept {self.bytes_kept:,} "
            f"({self.bytes_kept / max(self.bytes_read, 1):.1%})",
        ]
        for name, tally in _by_size(self.dropped_by):
            lines.append(f"dropped by {name}: {tally.documents:,} documents, {tally.bytes:,} bytes")
            lines += [f"    {example}" for example in tally.examples[:2]]
        for name, tally in _by_size(self.changed_by):
            lines.append(f"changed by {name}: {tally.documents:,} documents, {tally.count:,} {tally.unit}")
        megabytes = self.bytes_read / 1e6
        lines.append(
            f"{megabytes:.1f} MB in {self.seconds:.1f} s: {megabytes / max(self.seconds, 1e-9):.1f} MB/s"
        )
        return "\n".join(lines)


def _by_size(tallies: dict[str, _Tally]) -> list[tuple[str, _Tally]]:
    return sorted(tallies.items(), key=lambda item: (-item[1].documents, item[0]))
