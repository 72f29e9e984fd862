"""Append-only record of a run's requests and answers at a site, on disk before a reply leaves.

Neither a rollback nor a lost site state removes entries. Its size is bounded by the schedule: one entry for each
content of each job of each round, and for at most two repetitions of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.core.atomic import sync_folder
from polyclinic.core.audit_log import Journal, verify
from polyclinic.engines.request_schedule import Progress, Request

REPETITIONS = 2


@dataclass
class Answered:
    """Answers to one content of one job in one round.

    Attributes:
        times: Number of executions that were answered.
        sha256: Hash of the reply.
        marks: Digests of the request's trees by name.
    """

    times: int = 0
    sha256: str = ""
    marks: Mapping[str, str] = field(default_factory=dict)


class Usage:
    """Record of one run at one site."""

    def __init__(self, path: Path) -> None:
        """Open or create the record at ``path``.

        Raises:
            Broken: If it was changed.
        """
        self.path = path
        self._journal: Journal | None = None
        self._entries: dict[tuple[int, str], dict[str, Answered]] = {}
        if path.exists():
            self._journal = Journal(path)
            for entry in verify(path):
                self._take(entry)

    @property
    def progress(self) -> Progress:
        """The requests so far."""
        return Progress({key: frozenset(contents) for key, contents in self._entries.items()})

    def find(self, asked: Request) -> Answered:
        """Return the answers to this content so far."""
        return self._entries.get((asked.round, asked.job), {}).get(asked.content, Answered())

    def marks(self, round: int, jobs: Sequence[str]) -> list[Mapping[str, str]]:
        """Return the digests of the trees in requests for ``jobs`` in ``round``, one table per answered content."""
        entries = (entry for job in jobs for entry in self._entries.get((round, job), {}).values())
        return [entry.marks for entry in entries if entry.marks]

    def begin(self, asked: Request, number: int) -> None:
        """Record, before execution, that this is a content of its round and job."""
        self._write("begun", asked, {"number": number})

    def answer(self, asked: Request, number: int, sha256: str, marks: Mapping[str, str]) -> None:
        """Record, before the reply leaves, that it was executed."""
        self._write("answered", asked, {"number": number, "reply": sha256, "marks": dict(marks)})

    def close(self) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _write(self, event: str, asked: Request, details: Mapping[str, object]) -> None:
        if self._journal is None:
            self._journal = Journal(self.path)
            self.path.chmod(0o600)
            sync_folder(self.path.parent)
        entry = {"round": asked.round, "job": asked.job, "content": asked.content, **details}
        self._journal.write(event, entry)
        self._take({"event": event, **entry})

    def _take(self, entry: Mapping[str, object]) -> None:
        key = (int(str(entry["round"])), str(entry["job"]))
        answered = self._entries.setdefault(key, {}).setdefault(str(entry["content"]), Answered())
        if entry["event"] == "answered":
            answered.times += 1
            answered.sha256 = str(entry["reply"])
            marks = entry["marks"]
            assert isinstance(marks, Mapping)
            answered.marks = marks
