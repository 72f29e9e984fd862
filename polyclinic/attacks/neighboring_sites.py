"""Small synthetic sites with a task's shapes, and their neighbors, in which one patient is changed.

Two data sets are neighbors if they differ in the data of one protected unit (Cynthia Dwork and Aaron Roth, "The
Algorithmic Foundations of Differential Privacy", 2014, definition 2.4, https://doi.org/10.1561/0400000042). Here a unit
is replaced and never removed, so that the number of examples, which a site's weight reveals and which is treated as
public, is the same in both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from polyclinic.core.metering import Unit
from polyclinic.core.site import Site

Kind = Literal["classification", "multilabel", "segmentation", "regression", "survival", "reconstruction"]
ROLES = ("train", "val", "test", "unlabeled")
PATIENTS = 6


@dataclass(frozen=True)
class Cohort:
    """Examples in memory, with the patient of each.

    Attributes:
        x: Inputs [n, *shape].
        y: Targets [n, ...].
        patients: The patient of each example; a patient may have several.
    """

    x: Tensor
    y: Tensor
    patients: tuple[str, ...]

    @property
    def targets(self) -> Tensor:
        """The targets, under the name that data sets of the library use."""
        return self.y

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an example."""
        return tuple(self.x.shape[1:])

    @property
    def videos(self) -> Tensor:
        """The video of each example: those of a patient are its frames."""
        numbers = {patient: i for i, patient in enumerate(dict.fromkeys(self.patients))}
        return torch.tensor([numbers[patient] for patient in self.patients])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class Neighbor:
    """A site whose data differ in one unit.

    Attributes:
        site: The site with the changed data.
        role: The role of the changed data.
        change: Description of the change.
        patient: The changed patient; None if the unit is the whole site.
    """

    site: Site
    role: str
    change: str
    patient: str | None


def cohort(kind: Kind, inputs: Sequence[int], outputs: int, seed: int, role: str, patients: int = PATIENTS) -> Cohort:
    """Generate examples of ``patients`` patients, of which the first two have two each."""
    rng = torch.Generator().manual_seed(seed)
    whose = tuple(f"{role}-{i}" for i in [*range(patients), 0, 1][: patients + min(2, patients)])
    y = targets(kind, inputs, outputs, len(whose), rng)
    x = torch.randn(len(whose), *inputs, generator=rng)
    if kind == "classification":
        x = x + y.view(-1, *[1] * len(inputs))
    elif kind == "segmentation":
        x = x * 0.3 + y[:, None]
    elif kind == "reconstruction":
        x = y + 0.3 * x
    return Cohort(x, y, whose)


def targets(kind: Kind, inputs: Sequence[int], outputs: int, count: int, rng: torch.Generator) -> Tensor:
    """Generate targets for ``count`` examples."""
    match kind:
        case "classification":
            return torch.arange(count) % outputs
        case "multilabel":
            return torch.randint(0, 2, (count, outputs), generator=rng).float()
        case "regression":
            return torch.randn(count, outputs, generator=rng)
        case "survival":  # one unit of time for each interval
            when = (1 - torch.rand(count, generator=rng)) * (outputs + 1)
            return torch.stack([when, (torch.arange(count) % 3 > 0).float()], 1)
        case "segmentation":
            coarse = torch.randint(0, outputs, (count, *[2] * len(inputs[1:])), generator=rng)
            for axis, size in enumerate(inputs[1:], start=1):
                coarse = coarse.repeat_interleave(-(-size // 2), axis).narrow(axis, 0, size)
            return coarse
        case "reconstruction":
            return torch.randn(count, outputs, *inputs[1:], generator=rng)


def sites(kind: Kind, inputs: Sequence[int], outputs: int, names: Sequence[str], seed: int = 0) -> dict[str, Site]:
    """Generate sites ``names``, each with its own data in every role, and the same ``public`` data."""
    public = cohort(kind, inputs, outputs, 10_000 + seed, "public")
    return {
        name: Site(
            name,
            {role: cohort(kind, inputs, outputs, 1000 * seed + 10 * k + i, role) for i, role in enumerate(ROLES)}
            | {"public": public},
        )
        for k, name in enumerate(names)
    }


def neighbors(site: Site, kind: Kind, outputs: int, unit: Unit, full: bool, seed: int = 0) -> Iterator[Neighbor]:
    """Yield sites that differ from ``site`` in one unit: a patient's images and targets, or all data of a role.

    Args:
        full: Whether to yield four for the training data rather than two, and one for the test data too.
    """
    for role in ROLES if full else ("train", "val", "unlabeled"):
        data: Cohort = site.data[role]
        count = 1 if role != "train" else 4 if full else 2
        for number in range(count):
            patient = f"{role}-{number % len(set(data.patients))}"
            mine = [i for i, who in enumerate(data.patients) if who == patient]
            rng = torch.Generator().manual_seed(99 + 7 * seed + number)
            outlier = number % 2 == 0
            changed = _changed(data, mine[:1] if unit == "record" else mine, kind, outputs, rng, outlier)
            how = "an outlier in place of" if outlier else "another patient in place of"
            yield Neighbor(_with(site, role, changed), role, f"{how} {patient}", patient)
        if unit == "site":
            everyone = list(range(len(data)))
            changed = _changed(data, everyone, kind, outputs, torch.Generator().manual_seed(12345 + seed), False)
            yield Neighbor(_with(site, role, changed), role, "other data in the whole role", None)


def _with(site: Site, role: str, data: Cohort) -> Site:
    return replace(site, data={**site.data, role: data})


def _changed(data: Cohort, which: list[int], kind: Kind, outputs: int, rng: torch.Generator, outlier: bool) -> Cohort:
    """Return ``data`` with other images and targets at the indices ``which``."""
    x, y = data.x.clone(), data.y.clone()
    x[which] = torch.randn(x[which].shape, generator=rng) * (30.0 if outlier else 1.0)
    match kind:
        case "classification":
            y[which] = (y[which] + 1) % outputs
        case "multilabel":
            y[which] = 1 - y[which]
        case "survival":
            y[which] = torch.stack([y[which][:, 0] * (0.01 if outlier else 0.5), 1 - y[which][:, 1]], 1)
        case "segmentation":
            y[which] = (y[which] + 1) % outputs
        case _:
            y[which] = torch.randn(y[which].shape, generator=rng) * (30.0 if outlier else 3.0)
    return Cohort(x, y, data.patients)
