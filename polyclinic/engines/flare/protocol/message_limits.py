"""Limits on the data that a site or the server receives, stores and logs, checked before a file is fetched.

This module does not need PyTorch: a site's job process checks here before it writes a file to disk. A site's limits
come from its policy, the server's from the request and from ``server.toml``.
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

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.protocol.messages import Answer, BadMessage, Call
from polyclinic.engines.flare.protocol.paths import SetupError, read_json, read_small
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.errors import PolicyRefusal

CARRIES = ("do", "look", "secure")
"""Call kinds that may include a request as a file, and whose answers may."""
WRONG_FILES = 3
"""Number of files sent as start weights that were not those of the study, after which a site takes no more."""
KEEP_FREE = 500
"""Megabytes of disk that stay free unless the settings say otherwise (``keep_free_megabytes``)."""
REPLY_FACTOR, REPLY_EXTRA = 8, 64 * 2**20
"""Limit of a reply: this factor times the request, or the model if that is larger, plus this many bytes."""
ROUNDS_KEPT = 100


class TooMuch(PolicyRefusal):
    """Refusal of data beyond a limit. The message names the limit and the setting that decides it."""


# Disks
# ------------------------------------------------------------------------------------------------------------------


def check_room(folder: Path, size: int, keep_free: float = KEEP_FREE) -> None:
    """Check that writing ``size`` bytes leaves ``keep_free`` megabytes on the disk of ``folder``.

    Raises:
        OSError: If it does not.
    """
    free = shutil.disk_usage(folder).free
    if free - size < keep_free * 2**20:
        raise OSError(
            f"the disk is nearly full: {free / 2**20:.0f} MB are free at {folder.name}/, {size / 2**20:.0f} MB are to "
            f"be written, and {keep_free:g} MB stay free (keep_free_megabytes)"
        )


# At a site
# --------------------------------------------------------------------------------------------------------------


def bytes_allowed(policy: Path, default: Path, key: str) -> int:
    """Return the bytes that ``limits.KEY`` of the policy file, or else of the ``default`` policy, allows.

    Args:
        policy: The site's policy file.
        default: The policy file with the defaults.
        key: ``megabytes_per_round``, each way in a round, or ``weights_megabytes``, for start weights.

    Raises:
        SetupError: If the policy cannot be read. No file is then accepted.
    """
    for path in (policy, default):
        try:
            value = tomllib.loads(read_small(path)).get("limits", {}).get(key)
        except (OSError, tomllib.TOMLDecodeError, AttributeError) as error:
            raise SetupError(f"the policy cannot be read: {error}") from None
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SetupError(f"the policy's {key} is not a number")
            return int(value * 1e6)
    raise SetupError(f"the default policy does not set {key}")


class Received:
    """Bytes received by a site in each round of a run, stored in a file so that the count survives a restart.

    The same file for the same message counts once: a server that crashed sends it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = read_json(path, default={"rounds": {}})
        self._rounds: dict[int, dict[str, int]] = {int(n): dict(files) for n, files in table["rounds"].items()}

    def before(self, call: Call) -> int:
        """Return the bytes that arrived in the round of ``call``, without its own file."""
        files = self._rounds.get(call.round, {})
        return sum(size for key, size in files.items() if key != _key(call))

    def add(self, call: Call) -> None:
        """Record that the file of ``call`` is about to arrive."""
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
    """Check that this site may receive the file of ``call``: its purpose and its size.

    Args:
        limit: The policy's bytes per round.
        received: The bytes received before.

    Raises:
        TooMuch: If it may not.
    """
    if call.kind not in CARRIES:
        raise TooMuch(f"a call of the kind {call.kind!r} has no file")
    if call.round > int(order.plan["rounds"]):
        raise TooMuch(f"round {call.round}, and the study has {order.plan['rounds']} rounds")
    before = received.before(call)
    if before + call.size > limit:
        earlier = f" after {before / 1e6:g} MB in this round" if before else ""
        raise TooMuch(
            f"a file of {call.size / 1e6:g} MB{earlier}, and the policy allows {limit / 1e6:g} "
            "(limits.megabytes_per_round)"
        )


def check_weights(call: Call, order: RunRequest, limit: int, store: Path, wrong: int) -> None:
    """Check that this site may receive the file of ``call`` as the start weights of its study.

    Args:
        call: A call of the kind ``weights``.
        order: The run request, which states the file's hash and size.
        limit: The policy's bytes for start weights.
        store: The folder of the site's start weights.
        wrong: Number of wrong files that have come.

    Raises:
        TooMuch: If it may not.
    """
    stated = order.weights
    if not stated or (call.sha256, call.size) != (stated["sha256"], stated["bytes"]):
        raise TooMuch("the file is not the start weights that the study states")
    if call.size > limit:
        raise TooMuch(
            f"start weights of {call.size / 1e6:g} MB, and the policy allows {limit / 1e6:g} (limits.weights_megabytes)"
        )
    if (store / call.sha256).exists():
        raise TooMuch("the start weights are here already")
    if wrong >= WRONG_FILES:
        raise TooMuch(f"{wrong} files came as start weights that were not those of the study")


class Rate:
    """Rate limit: ``burst`` events at once, then ``per_second`` events per second."""

    def __init__(self, burst: int, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self._left, self._at = float(burst), time.monotonic()

    def wait(self) -> float:
        """Count one event and return the seconds to wait before it may happen."""
        now = time.monotonic()
        self._left = min(self.burst, self._left + (now - self._at) * self.per_second)
        self._at = now
        self._left -= 1
        return max(0.0, -self._left / self.per_second)


class Repeats:
    """Filter that selects which repeated refusals are logged: the 1st, 2nd, 4th, 8th, ... of the same in a row."""

    def __init__(self) -> None:
        self._same: tuple[str, str] = ("", "")
        self._times = 0

    def count(self, kind: str, reason: str) -> int:
        """Return how often the same was refused in a row, or 0 if this refusal need not be logged."""
        if (kind, reason) != self._same:
            self._same, self._times = (kind, reason), 0
        self._times += 1
        return self._times if self._times & (self._times - 1) == 0 else 0

    def over(self) -> None:
        """Reset the count after another event."""
        self._same, self._times = ("", ""), 0


# At the server
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Limits on what the server accepts from sites. The fields except ``counts`` and ``model`` are keys of
    ``server.toml``.

    Attributes:
        reply_megabytes: Largest reply to any request.
        keep_free_megabytes: Space that stays free on the server's disk.
        weight_ratio: Of ``core.reply_validation.ReplyValidator``, as ``norm_ratio``; 0 for none.
        max_examples: Largest number of examples accepted from a site's own report.
        counts: Number of examples that each site reported.
        model: Bytes of the model.
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
        """Build from ``server.toml`` and from what the sites reported about their data in the survey.

        Raises:
            SetupError: If a setting is not a number of at least 0.
        """
        given = {key: settings[key] for key in SETTINGS if key in settings}
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SetupError(f"server.toml: {key} must be a number of at least 0, not {str(value)[:40]!r}")
        most = float(given.get("max_examples", cls.max_examples))
        return cls(**given, counts=counts_of(descriptions, most))

    def reply(self, call: Call) -> int:
        """Return the largest file, in bytes, that may accompany an answer to ``call``."""
        most = int(self.reply_megabytes * 2**20)
        if call.kind not in CARRIES:
            return 0
        if call.job.partition("/")[0] in ("predict", "explain", "show"):  # the size of the site's images is not known
            return most
        return min(most, REPLY_FACTOR * max(call.size, self.model) + REPLY_EXTRA)


SETTINGS = ("reply_megabytes", "keep_free_megabytes", "weight_ratio", "norm_ratio", "max_examples")


def counts_of(descriptions: Mapping[str, Any], most: float) -> dict[str, float]:
    """Return the number of examples each site trains on, at most ``most``, without the sites that did not report it."""
    found: dict[str, float] = {}
    for site, description in descriptions.items():
        counts = [has["examples"] for role, has in description["roles"].items() if role in ("train", "unlabeled")]
        if counts and None not in counts:
            found[site] = min(float(sum(counts)), most)
    return found


def announced(text: object) -> int:
    """Return the file size that an answer announces, or 0 if the text is not an answer."""
    try:
        return Answer.from_json(text).size
    except BadMessage:
        return 0


def remove(*paths: Path | None) -> None:
    """Remove files that are no longer needed, if they exist."""
    for path in paths:
        if path is not None:
            try:
                os.unlink(path)
            except OSError:
                continue
