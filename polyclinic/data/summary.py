"""Table of sites for a report: counts only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.core.serialization import savable
from polyclinic.data.examples import Dataset
from polyclinic.data.source import Info


@savable("data.RoleSummary", 1)
@dataclass(frozen=True)
class RoleSummary:
    """Counts of one role at a site.

    Attributes:
        patients: Number of patients.
        examples: Number of examples.
        classes: Examples per class (or with each of several labels; for survival, censored ones and events); empty for
            numbers and masks.
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
        title: Name of the site in the data.
        external: Whether it does not train.
        roles: Counts by role.
    """

    name: str
    title: str
    external: bool
    roles: Mapping[str, RoleSummary]


def summarize(name: str, title: str, external: bool, roles: Mapping[str, Dataset], info: Info) -> SiteSummary:
    """Count the examples of one site, by role and class."""
    counts = {}
    for role, examples in roles.items():
        classes: Sequence[int] = ()
        if role == "public":
            continue  # public images are identical at all sites
        labels = None if role == "unlabeled" else examples.labels
        if labels is not None and labels.ndim == 1:
            classes = np.bincount(labels.numpy(), minlength=len(info.classes)).tolist()
        elif labels is not None and info.task == "multilabel":
            classes = labels.sum(0).long().tolist()
        elif labels is not None and info.task == "survival":
            events = int(labels[:, 1].sum())
            classes = [len(labels) - events, events]
        counts[role] = RoleSummary(len(set(examples.patients)), len(examples), tuple(classes))
    return SiteSummary(name, title, external, counts)
