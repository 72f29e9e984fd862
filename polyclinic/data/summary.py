"""The table of sites that a report shows: counts, never data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.core.serialization import savable
from polyclinic.data.examples import Examples
from polyclinic.data.source import Info


@savable("data.RoleSummary", 1)
@dataclass(frozen=True)
class RoleSummary:
    """What a site has for one role.

    Attributes:
        patients: How many.
        examples: How many.
        classes: Examples per class (or with each of several labels); empty for numbers and masks.
    """

    patients: int
    examples: int
    classes: tuple[int, ...] = ()


@savable("data.SiteSummary", 1)
@dataclass(frozen=True)
class SiteSummary:
    """One row of the table of sites.

    Attributes:
        name: The site.
        title: As the data called it.
        external: Whether nobody trains on it.
        roles: By role.
    """

    name: str
    title: str
    external: bool
    roles: Mapping[str, RoleSummary]


def summarize(name: str, title: str, external: bool, roles: Mapping[str, Examples], info: Info) -> SiteSummary:
    """Counts the examples of one site, by role and class."""
    found = {}
    for role, examples in roles.items():
        classes: Sequence[int] = ()
        if role == "public":
            continue  # nobody's patients, and the same everywhere
        if role != "unlabeled" and examples.targets.ndim == 1:
            classes = np.bincount(examples.targets.numpy(), minlength=len(info.classes)).tolist()
        elif role != "unlabeled" and info.task == "multilabel":
            classes = examples.targets.sum(0).long().tolist()
        found[role] = RoleSummary(len(set(examples.patients)), len(examples), tuple(classes))
    return SiteSummary(name, title, external, found)
