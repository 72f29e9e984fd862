"""Outlier statistics of each site over the rounds, and their description."""

from collections.abc import Mapping
from typing import NamedTuple

from polyclinic.core.serialization import savable
from polyclinic.methods.robust.rules.aggregation_rule import Standing


@savable("robust.SiteRecord", 1)
class Note(NamedTuple):
    """The outlier statistics of one site so far.

    Attributes:
        seen: Number of its updates that were examined. ``outlying``: number of outliers among them.
        score: Outlier score of the last one; above 3.5 is an outlier. ``norm``: its length, in multiples of the median
            length. ``cosine``: its agreement in direction with the others, -1 to 1.
        share: Its share of the last aggregate; None if the rule decides coordinate by coordinate.
        excluded: Why its last update had no weight; empty if it had.
    """

    seen: int = 0
    outlying: int = 0
    score: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    share: float | None = None
    excluded: str = ""

    def after(self, found: Standing | None, share: float | None, excluded: str) -> "Note":
        """Return this note after one more update, which was not examined if ``found`` is None."""
        if found is None:
            return self._replace(share=share, excluded=excluded)
        return Note(self.seen + 1, self.outlying + found.outlying, *found, share, excluded)


def alarms(notes: Mapping[str, Note], often: float = 0.5) -> tuple[str, ...]:
    """Return a sentence for each site that should be investigated, the most unusual first.

    Args:
        often: The fraction of its updates in which a site must have been an outlier.
    """
    odd = {site: n for site, n in notes.items() if n.excluded or (n.seen and n.outlying >= max(1, often * n.seen))}
    return tuple(_sentence(site, note) for site, note in sorted(odd.items(), key=lambda item: -item[1].score))


def _sentence(site: str, note: Note) -> str:
    if note.excluded and note.excluded != QUARANTINE:
        return f"{site}: its last update had no say, because {note.excluded}. Ask what happened there."
    seen = (
        f"{site}: {note.outlying} of its {note.seen} updates stood out; the last was {note.norm:.1f} times as long "
        f"as usual, and its direction agrees {note.cosine:+.2f} with the others'."
    )
    if note.excluded:
        return f"{seen} It is in quarantine."
    return f"{seen} Other patients, another scanner, a fault or an attack: look at its data before you quarantine it."


QUARANTINE = "it is in quarantine"
