"""Outlier statistics of each site's updates, for the person who decides which sites take part.

Methods with a robust rule (``methods.robust.robust_method``) keep statistics of every site in the server's state. They
are read from the checkpoints of a run, during the run or after it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.errors import ConfigError, RunError
from polyclinic.methods import registry
from polyclinic.methods.robust.rules.outlier_watch import Note


class NoSiteOutliers(RunError, ValueError):
    """The run has no outlier statistics. The message says which methods keep them."""


@dataclass(frozen=True)
class SiteOutliers:
    """Outlier statistics of one method run.

    Attributes:
        arm: Name of the method run's folder: the method's label and the seed.
        round: The round of the checkpoint.
        notes: Statistics by site.
        alarms: A sentence for each site that a person should examine.
    """

    arm: str
    round: int
    notes: Mapping[str, Note]
    alarms: tuple[str, ...]


def read(run: Path) -> list[SiteOutliers]:
    """Read the outlier statistics of every method run of ``run`` that keeps them.

    Raises:
        ConfigError: If the folder is not a run.
        NoSiteOutliers: If no method of the run keeps them.
    """
    file = run / "run.json"
    if not file.is_file():
        raise ConfigError(f"{run}: there is no run here; name the folder that `polyclinic run` wrote")
    _know(json.loads(file.read_text(encoding="utf-8")))
    found = list(_arms(run))
    if not found:
        raise NoSiteOutliers(
            f"{run}: none of its methods keeps outlier statistics of sites. Methods with a robust rule do; to "
            'keep them with the plain mean, use the method "watched"'
        )
    return found


def _arms(run: Path) -> Iterator[SiteOutliers]:
    for file in sorted(run.glob("arms/*/checkpoint.safetensors")):
        at = states.load(file)
        if notes := notes_in(at.state):
            yield SiteOutliers(file.parent.name, at.round, dict(notes.notes), notes.alarms)


def at_the_end(notes: Any, records: Iterable[bytes]) -> set[str]:
    """Return the outliers at the end of training: sites named by an alarm, or with a refused reply.

    Args:
        notes: What ``notes_in`` returned for the last state of the server.
        records: The lines of the records of the method run.
    """
    alarmed = set() if notes is None else {alarm.partition(":")[0] for alarm in notes.alarms}
    lost = [json.loads(line) for line in records if line.startswith(b'{"kind":"quarantine"')]
    return alarmed | {fact["site"] for fact in lost if not fact["reason"].startswith(("dropped out", "no answer"))}


def notes_in(state: Any) -> Any:
    """Return the state with statistics of sites, which may be nested in those of wrapping methods; None if none is."""
    if isinstance(notes := getattr(state, "notes", None), Mapping) and notes:
        return state
    inner = getattr(state, "inner", None)
    return None if inner is None else notes_in(inner)


def _know(info: Mapping[str, Any]) -> None:
    """Import what defines the states in a run's checkpoints, so that their tags are registered."""
    import polyclinic.attacks.poisoning
    import polyclinic.studies.records.checkpoint  # noqa: F401

    named = [(method["name"], method.get("options", {}).get("over", "fedavg")) for method in info["methods"]]
    registry.import_methods([name for names in named for name in names])
