"""How much may arrive, be kept and be written down, at a site and at the server; decided before a byte is fetched.

Nothing here needs PyTorch: a site's job process asks before it lets a file onto its disk. The bounds of a site come
from its policy, those of the server from what it asked and from ``server.toml``.
"""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.messages import Answer, BadMessage, Call
from polyclinic.engines.flare.protocol.paths import SetupError, read_json, read_small, write_private
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.errors import PolicyRefusal

CARRIES = ("do", "look", "secure")
"""The calls that may bring a file, and whose answers may."""
KEEP_FREE = 500
"""Megabytes that stay free on a disk, unless the settings say otherwise (``keep_free_megabytes``)."""
REPLY_FACTOR, REPLY_EXTRA = 8, 64 * 2**20
"""Limit of a reply: this factor times the request, or the model if that is larger, plus this many bytes."""
ROUNDS_KEPT = 100


class TooMuch(PolicyRefusal):
    """More than may arrive here now. The message says what, and which setting decides."""


# Disks
# ------------------------------------------------------------------------------------------------------------------


def check_room(folder: Path, size: int, keep_free: float = KEEP_FREE) -> None:
    """Checks that ``size`` bytes fit on the disk of ``folder`` beside ``keep_free`` megabytes.

    Raises:
        OSError: If they do not.
    """
    free = shutil.disk_usage(folder).free
    if free - size < keep_free * 2**20:
        raise OSError(
            f"the disk is nearly full: {free / 2**20:.0f} MB are free at {folder.name}/, {size / 2**20:.0f} MB are to "
            f"be written, and {keep_free:g} MB stay free (keep_free_megabytes)"
        )


# At a site
# --------------------------------------------------------------------------------------------------------------


def round_limit(policy: Path, default: Path) -> int:
    """The bytes that may go each way in a round, as the policy file says, or the ``default`` policy if it does not.

    Raises:
        SetupError: If the policy cannot be read; then nothing may arrive.
    """
    for path in (policy, default):
        try:
            value = tomllib.loads(read_small(path)).get("limits", {}).get("megabytes_per_round")
        except (OSError, tomllib.TOMLDecodeError, AttributeError) as error:
            raise SetupError(f"the policy cannot be read: {error}") from None
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SetupError("the policy's megabytes_per_round is no number")
            return int(value * 1e6)
    raise SetupError("the default policy says nothing of megabytes_per_round")


class Received:
    """What arrived at a site in each round of a run, in a file, so that a restart does not forget it.

    The same file for the same message counts once: a server that crashed sends it a second time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = read_json(path, default={"rounds": {}})
        self._rounds: dict[int, dict[str, int]] = {int(n): dict(files) for n, files in table["rounds"].items()}

    def before(self, call: Call) -> int:
        """The bytes that arrived in the round of ``call``, without its own file."""
        files = self._rounds.get(call.round, {})
        return sum(size for key, size in files.items() if key != _key(call))

    def add(self, call: Call) -> None:
        """Notes that the file of ``call`` is about to arrive."""
        files = self._rounds.setdefault(call.round, {})
        if files.get(_key(call)) == call.size:
            return
        files[_key(call)] = call.size
        for old in sorted(self._rounds)[:-ROUNDS_KEPT]:
            del self._rounds[old]
        write_private(self.path, json.dumps({"rounds": self._rounds}))


def _key(call: Call) -> str:
    return f"{call.number} {call.stage} {call.sha256[:16]}"


def check_call(call: Call, order: RunRequest, limit: int, received: Received) -> None:
    """Checks that the file of ``call`` may come to this site: what it is for, and how large it is.

    Args:
        limit: The policy's bytes for a round.
        received: What came before.

    Raises:
        TooMuch: If it may not.
    """
    if call.kind not in CARRIES:
        raise TooMuch(f"a call of the kind {call.kind!r} brings no file")
    if call.round > int(order.plan["rounds"]):
        raise TooMuch(f"round {call.round} of a study of {order.plan['rounds']}")
    before = received.before(call)
    if before + call.size > limit:
        beside = f" after {before / 1e6:g} MB in this round" if before else ""
        raise TooMuch(
            f"a file of {call.size / 1e6:g} MB{beside}, and the policy allows {limit / 1e6:g} "
            "(limits.megabytes_per_round)"
        )


class Rate:
    """How often something may happen: ``burst`` times at once, and then ``per_second`` times a second."""

    def __init__(self, burst: int, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self._left, self._at = float(burst), time.monotonic()

    def wait(self) -> float:
        """Seconds to wait before it may happen again; it counts as having happened then."""
        now = time.monotonic()
        self._left = min(self.burst, self._left + (now - self._at) * self.per_second)
        self._at = now
        self._left -= 1
        return max(0.0, -self._left / self.per_second)


class Repeats:
    """Which of many refusals are worth a line in the journal: a new one, and then the 2nd, 4th, 8th... of the same."""

    def __init__(self) -> None:
        self._same: tuple[str, str] = ("", "")
        self._times = 0

    def count(self, kind: str, reason: str) -> int:
        """How often the same was refused in a row; 0 if this time need not be written down."""
        if (kind, reason) != self._same:
            self._same, self._times = (kind, reason), 0
        self._times += 1
        return self._times if self._times & (self._times - 1) == 0 else 0

    def over(self) -> None:
        """Something else happened."""
        self._same, self._times = ("", ""), 0


# At the server
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the server takes from sites. The fields but ``counts`` and ``model`` are keys of ``server.toml``.

    Attributes:
        reply_megabytes: The largest reply, whatever was asked.
        keep_free_megabytes: What stays free on the server's disk.
        weight_ratio: ``core.reply_validation.ReplyValidator``'s, and ``norm_ratio``; 0 for none.
        max_examples: How many examples a site is believed to have, at most, when it says so itself.
        counts: How many examples each site said that it has.
        model: The bytes of the model.
    """

    reply_megabytes: float = 4096
    keep_free_megabytes: float = KEEP_FREE
    weight_ratio: float = 10
    norm_ratio: float = 100
    max_examples: float = 10_000_000
    counts: Mapping[str, float] = field(default_factory=dict)
    model: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any], descriptions: Mapping[str, Any]) -> "Limits":
        """From ``server.toml``, and what the sites said of their data in the survey.

        Raises:
            SetupError: If a setting is not a number of at least 0.
        """
        given = {key: settings[key] for key in SETTINGS if key in settings}
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SetupError(f"server.toml: {key} is a number of at least 0, not {str(value)[:40]!r}")
        most = float(given.get("max_examples", cls.max_examples))
        return cls(**given, counts=counts_of(descriptions, most))

    def reply(self, call: Call) -> int:
        """The largest file, in bytes, that an answer to ``call`` may bring."""
        most = int(self.reply_megabytes * 2**20)
        if call.kind not in CARRIES:
            return 0
        if call.job.partition("/")[0] in ("predict", "explain"):  # as large as the site's images, which nobody knows
            return most
        return min(most, REPLY_FACTOR * max(call.size, self.model) + REPLY_EXTRA)


SETTINGS = ("reply_megabytes", "keep_free_megabytes", "weight_ratio", "norm_ratio", "max_examples")


def counts_of(descriptions: Mapping[str, Any], most: float) -> dict[str, float]:
    """How many examples each site trains on, at most ``most``; without the sites that did not say."""
    found: dict[str, float] = {}
    for site, description in descriptions.items():
        counts = [has["examples"] for role, has in description["roles"].items() if role in ("train", "unlabeled")]
        if counts and None not in counts:
            found[site] = min(float(sum(counts)), most)
    return found


def announced(text: object) -> int:
    """How many bytes an answer says that its file has; 0 if it is no answer."""
    try:
        return Answer.from_json(text).size
    except BadMessage:
        return 0


def remove(*paths: Path | None) -> None:
    """Removes files that are not needed any more, if they are there."""
    for path in paths:
        if path is not None:
            try:
                os.unlink(path)
            except OSError:
                continue
