"""How each site's updates stood among the others', for the person who decides who is heard.

Methods under a robust rule (``methods.robust.robust_method``) keep a note of every site in the server's state. It is
read from a run's checkpoints, while the run goes on as well as after.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.errors import ConfigError, RunError
from polyclinic.methods import registry
from polyclinic.methods.robust.rules.outlier_watch import Note


class NoStanding(RunError, ValueError):
    """The run has no notes of sites. The message says which methods keep them."""


@dataclass(frozen=True)
class Standings:
    """One arm's notes.

    Attributes:
        arm: The method's label and the seed, as the arm's folder is called. ``round``: after which round.
        notes: By site. ``alarms``: a sentence for each site that a person should look at.
    """

    arm: str
    round: int
    notes: Mapping[str, Note]
    alarms: tuple[str, ...]


def read(run: Path) -> list[Standings]:
    """The standings in every arm of the run at ``run`` that keeps some.

    Raises:
        FileNotFoundError: Where there is no run.
        NoStanding: Where no method of it looks at sites one by one.
    """
    file = run / "run.json"
    if not file.is_file():
        raise ConfigError(f"{run}: there is no run here; name the folder that `polyclinic run` wrote")
    _know(json.loads(file.read_text(encoding="utf-8")))
    found = list(_arms(run))
    if not found:
        raise NoStanding(
            f"{run}: none of its methods keeps a note of every site's updates. Those under a robust rule do; to look "
            'without withstanding anything, study "watched"'
        )
    return found


def _arms(run: Path) -> Iterator[Standings]:
    for file in sorted(run.glob("arms/*/checkpoint.safetensors")):
        at = states.load(file)
        if notes := _notes(at.state):
            yield Standings(file.parent.name, at.round, dict(notes.notes), notes.alarms)


def at_the_end(
    state: Any, sites: Sequence[str], hostile: Sequence[str], records: Iterable[bytes]
) -> Iterator[tuple[str, bool, bool]]:
    """For each of ``sites``: its name, whether it is one to look at, and whether it is among the ``hostile``.

    One to look at is whom an alarm of a robust rule names, or of whom a reply was refused. Nothing is said where there
    is neither such a rule nor an attack.

    Args:
        state: The server's, at the end of training.
        records: The lines of the arm's records.
    """
    notes = _notes(state)
    if notes is None and not hostile:
        return
    alarmed = set() if notes is None else {alarm.partition(":")[0] for alarm in notes.alarms}
    lost = [json.loads(line) for line in records if line.startswith(b'{"kind":"quarantine"')]
    refused = {fact["site"] for fact in lost if not fact["reason"].startswith(("dropped out", "no answer"))}
    for site in sites:
        yield site, site in alarmed | refused, site in hostile


def _notes(state: Any) -> Any:
    """The state that keeps notes, however deep it lies in the states of methods that wrap."""
    if isinstance(notes := getattr(state, "notes", None), Mapping) and notes:
        return state
    inner = getattr(state, "inner", None)
    return None if inner is None else _notes(inner)


def _know(info: Mapping[str, Any]) -> None:
    """Import what defines the states in a run's checkpoints, so that their tags are registered."""
    import polyclinic.attacks.poisoning
    import polyclinic.studies.records.checkpoint  # noqa: F401

    named = [(method["name"], method.get("options", {}).get("over", "fedavg")) for method in info["methods"]]
    registry.import_methods([name for names in named for name in names])
