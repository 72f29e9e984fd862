"""Messages between server and site: a call and an answer, each with at most one file.

Both are flat tables of plain values, validated strictly because the other end may be hostile. A message is identified
by run, number and site. Numbers increase within a run, and a number identifies one content permanently. Files are
values as ``core.serialization`` writes them; the message contains their length and SHA-256. Requires no PyTorch.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Self, get_type_hints

from polyclinic.engines.flare.protocol.paths import NAME
from polyclinic.errors import ProtocolError

VERSION = 2
MAX_MESSAGE = 2**20
KINDS = ("hello", "weights", "do", "look", "secure", "end")
WAITS_FOR_WEIGHTS = "waits for the start weights"
"""The beginning of the reason why a site without start weights, which the server may send, does not take part yet."""
STAGES = ("", "advertise", "share", "mask", "agree", "reveal")


class BadMessage(ProtocolError):
    """Invalid message. The text names the field and the reason."""


@dataclass(frozen=True)
class _Message:
    """Common fields of calls and answers: run, number, site, journal hash and the accompanying file."""

    version: int
    run: str
    number: int
    site: str
    head: str
    size: int
    sha256: str

    def to_json(self) -> str:
        """Return the message as text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: object) -> Self:
        """Parse a message.

        Raises:
            BadMessage: If ``text`` is not a valid message.
        """
        if not isinstance(text, str) or len(text) > MAX_MESSAGE:
            raise BadMessage("a message is text of at most one megabyte")
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadMessage(f"not JSON: {error}") from None
        if not isinstance(table, dict):
            raise BadMessage("a message is a table")
        if table.get("version") != VERSION:
            other = str(table.get("version"))[:20]
            raise BadMessage(
                f"the other end uses version {other} and this end version {VERSION}: "
                "install the same version of polyclinic at both ends"
            )
        wanted = {field.name for field in fields(cls)}
        if odd := sorted(table.keys() ^ wanted):
            raise BadMessage(f"the field {odd[0][:40]!r} is {'missing' if odd[0] in wanted else 'not known'}")
        kinds = get_type_hints(cls)
        for key, value in table.items():
            kind = float if kinds[key] is float else kinds[key]
            if isinstance(value, int) and kind is float and not isinstance(value, bool):
                table[key] = value = float(value)
            if type(value) is not kind:
                raise BadMessage(f"the field {key!r} is not {kind.__name__}")
        message = cls(**table)
        message.check()
        return message

    def check(self) -> None:
        """Check that every field is in its range."""
        for key in ("run", "site"):
            if not NAME.fullmatch(getattr(self, key)):
                raise BadMessage(f"the field {key!r} is not a name")
        if not (0 <= self.number < 2**53 and 0 <= self.size < 2**53):
            raise BadMessage("a number is out of range")
        if (self.sha256 and not _is_hash(self.sha256)) or bool(self.size) != bool(self.sha256):
            raise BadMessage("the file's length and hash do not belong together")
        if self.head and not _is_hash(self.head):
            raise BadMessage("the field 'head' is not a hash")


@dataclass(frozen=True)
class Call(_Message):
    """Request from the server to a site.

    Attributes:
        kind: ``hello`` (may this run?), ``weights`` (the same, with the study's start weights as the file), ``do`` (the
            request in the file), ``look`` (the same from the site state of
            ``keep``, for scores only), ``secure`` (a stage of a secure sum of its result) or ``end`` (the run is over).
        order: SHA-256 of the run request that the call belongs to.
        round: Round of the request. ``job``: its job.
        after: Number of the message whose site state to start from; 0 for none.
        confirmed: Last message of this site that the server has stored. Later ones may be rolled back.
        keep: Message after which the best model was made; its site state is kept for the test. 0 for none.
        deadline: Seconds after which the server stops waiting for the answer; 0 for no limit.
        stage: Stage of a secure sum; empty otherwise.
        head: Latest hash of the server's journal.
    """

    kind: str
    order: str
    round: int
    job: str
    after: int
    confirmed: int
    keep: int
    deadline: float
    stage: str

    def check(self) -> None:
        """Check that every field is in its range."""
        super().check()
        if self.kind not in KINDS:
            raise BadMessage(f"there is no call of the kind {self.kind[:20]!r}")
        if not _is_hash(self.order):
            raise BadMessage("the field 'order' is not a hash")
        if not 0 <= self.confirmed <= self.after < 2**53 or not 0 <= self.round < 2**53:
            raise BadMessage("a number is out of range")
        if not 0 <= self.keep <= self.after:
            raise BadMessage("a number is out of range")
        if self.stage not in STAGES or bool(self.stage) != (self.kind == "secure"):
            raise BadMessage(f"no secure sum has the stage {self.stage[:20]!r}")
        if self.kind == "look" and self.job.partition("/")[0] not in ("score", "predict"):
            raise BadMessage("a look is for scores and predictions, and nothing else")
        if self.kind in ("do", "look", "secure") and not (self.after < self.number and self.size):
            raise BadMessage("a request has a file and a number above those before it")
        if self.kind == "weights" and not self.size:
            raise BadMessage("a call of the kind 'weights' has a file")
        if self.kind in ("hello", "end") and self.size:
            raise BadMessage(f"a call of the kind {self.kind!r} has no file")
        if not 0 <= self.deadline < 1e9:
            raise BadMessage("the deadline is out of range")
        if len(self.job) > 100:
            raise BadMessage("a job's name is too long")


@dataclass(frozen=True)
class Answer(_Message):
    """Answer from a site to a call.

    Attributes:
        lost: Why there is no reply; empty if there is one.
        forgot: Whether the site no longer has the site state to start from.
        seconds: Computing time.
        code: SHA-256 of the code that computes at this site.
        stage: Stage of the call.
        signature: Signature of the site over run, number, head and file.
    """

    lost: str
    forgot: bool
    seconds: float
    code: str
    stage: str
    signature: str

    def check(self) -> None:
        """Check that every field is in its range."""
        super().check()
        if not 0 <= self.seconds < 1e9:
            raise BadMessage("the seconds are out of range")
        if self.stage not in STAGES:
            raise BadMessage(f"no secure sum has the stage {self.stage[:20]!r}")
        if len(self.lost) > 4000 or len(self.code) > 64 or len(self.signature) > 2000:
            raise BadMessage("a text is too long")

    @property
    def signed(self) -> bytes:
        """Return the bytes that the signature covers."""
        return f"{self.run}\n{self.number}\n{self.site}\n{self.head}\n{self.sha256}".encode()


def _is_hash(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def printable(text: str, limit: int = 500) -> str:
    """Return ``text`` on one line, without characters that a terminal or a log would interpret."""
    clean = "".join(c if c.isprintable() else "�" for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
