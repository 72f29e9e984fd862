"""Simulated sites: distribution of one source's patients to simulated hospitals.

Every patient belongs to one site with all examples. A result on such sites carries ``badge``, because real hospitals
differ in more ways than these.

* Dirichlet label skew, class by class: Yurochkin et al., "Bayesian nonparametric federated learning of neural
  networks", ICML 2019, https://proceedings.mlr.press/v97/yurochkin19a.html. There a site may be empty; here the
  assignment is drawn again until no site has fewer patients than ``least``.
* Pathological classes: McMahan et al., "Communication-efficient learning of deep networks from decentralized data",
  AISTATS 2017, section 3, https://proceedings.mlr.press/v54/mcmahan17a.html. There shards of sorted images are
  distributed; here sites get whole classes and share a class's patients evenly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np

from polyclinic.data.examples import DataError

TRIES = 200


@dataclass(frozen=True)
class Iid:
    """Patients distributed at random in equal numbers, evenly within each class."""

    name: ClassVar[str] = "iid"
    count: int = 4
    least: int = 1

    @property
    def badge(self) -> str:
        """The sentence that accompanies every result on these sites."""
        return f"Simulated sites: patients of one source were dealt at random to {self.count} equal sites."

    def deal(self, groups: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
        """Return a site number for each patient. ``groups`` holds each patient's class."""
        _enough(self.count, self.least, groups)
        order = sorted(_shuffled(groups, rng), key=lambda patient: groups[patient])
        return {patient: i % self.count for i, patient in enumerate(order)}


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: each class is distributed over the sites in shares drawn from Dirichlet(α)."""

    name: ClassVar[str] = "dirichlet"
    count: int = 4
    alpha: float = 0.5
    least: int = 10

    @property
    def badge(self) -> str:
        """The sentence that accompanies every result on these sites."""
        return (
            f"Simulated sites: patients of one source were dealt to {self.count} sites with label skew, "
            f"Dirichlet({self.alpha:g})."
        )

    def deal(self, groups: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
        """Return a site number for each patient. ``groups`` holds each patient's class."""
        _positive("alpha", self.alpha)
        _enough(self.count, self.least, groups)
        for _ in range(TRIES):
            sites: dict[str, int] = {}
            for label in sorted(set(groups.values())):
                patients = [p for p in _shuffled(groups, rng) if groups[p] == label]
                shares = rng.dirichlet(np.full(self.count, self.alpha))  # p_c ~ Dir(α)
                sites |= _by_share(patients, shares)
            if _fewest(sites, self.count) >= self.least:
                return sites
        raise DataError(
            f"no deal of {len(groups)} patients to {self.count} sites with alpha = {self.alpha:g} left every site "
            f"{self.least} patients in {TRIES} draws: use fewer sites, a larger alpha or a smaller least"
        )


@dataclass(frozen=True)
class Quantity:
    """Quantity skew: sites differ in size, in shares drawn from Dirichlet(α), but not in class distribution."""

    name: ClassVar[str] = "quantity"
    count: int = 4
    alpha: float = 1.0
    least: int = 10

    @property
    def badge(self) -> str:
        """The sentence that accompanies every result on these sites."""
        return (
            f"Simulated sites: patients of one source were dealt at random to {self.count} sites of unequal size, "
            f"Dirichlet({self.alpha:g})."
        )

    def deal(self, groups: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
        """Return a site number for each patient."""
        _positive("alpha", self.alpha)
        _enough(self.count, self.least, groups)
        spare = len(groups) - self.least * self.count  # every site gets the minimum, the rest by share
        sizes = self.least + _whole(rng.dirichlet(np.full(self.count, self.alpha)) * spare)
        return dict(zip(_shuffled(groups, rng), np.repeat(np.arange(self.count), sizes).tolist(), strict=True))


@dataclass(frozen=True)
class Pathological:
    """Class-limited sites: each site has only some of the classes."""

    name: ClassVar[str] = "pathological"
    count: int = 4
    classes: int = 1
    least: int = 1

    @property
    def badge(self) -> str:
        """The sentence that accompanies every result on these sites."""
        return (
            f"Simulated sites: patients of one source were dealt to {self.count} sites, each with {self.classes} of "
            "the classes only."
        )

    def deal(self, groups: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
        """Return a site number for each patient. ``groups`` holds each patient's class."""
        _enough(self.count, self.least, groups)
        labels = sorted(set(groups.values()))
        if not 1 <= self.classes <= len(labels):
            raise DataError(
                f"classes = {self.classes}: this data has {len(labels)} classes, so choose 1 to {len(labels)}"
            )
        if self.count * self.classes < len(labels):
            raise DataError(
                f"{self.count} sites with {self.classes} classes each cannot hold {len(labels)} classes: "
                "use more sites or more classes a site"
            )
        turn = rng.permutation(len(labels))
        has = {
            k: {labels[turn[(k * self.classes + j) % len(labels)]] for j in range(self.classes)}
            for k in range(self.count)
        }
        sites: dict[str, int] = {}
        for label in labels:
            holders = [k for k in range(self.count) if label in has[k]]
            patients = [p for p in _shuffled(groups, rng) if groups[p] == label]
            sites |= {patient: holders[i % len(holders)] for i, patient in enumerate(patients)}
        if (fewest := _fewest(sites, self.count)) < self.least:
            raise DataError(f"a site would have {fewest} patients, fewer than least = {self.least}: use fewer sites")
        return sites


@dataclass(frozen=True)
class Divided:
    """Real sites, some of them divided into several, which keeps the real differences and increases the number of
    sites.

    Attributes:
        parts: Number of sites to which a hospital's patients are distributed, evenly within each class; 1 if not
            listed.
        by: ``"natural"``, or the column that names the hospital.
    """

    name: ClassVar[str] = "divided"
    parts: dict[str, int] = field(default_factory=dict)
    by: str = "natural"

    @property
    def badge(self) -> str:
        """The sentence that accompanies every result on these sites."""
        listed = ", ".join(f"{site} to {count}" for site, count in self.parts.items())
        return f"Simulated sites: the patients of hospitals were dealt at random to several sites ({listed})."

    def deal(self, site: str, groups: Mapping[str, int], rng: np.random.Generator) -> dict[str, str]:
        """Return a site name for each patient of the hospital ``site``. ``groups`` holds each patient's class."""
        count = self.parts.get(site, 1)
        if count < 1:
            raise DataError(f"parts.{site} = {count}: a hospital is dealt to at least one site")
        if count == 1:
            return dict.fromkeys(groups, site)
        numbers, wide = Iid(count).deal(groups, rng), len(str(count))
        return {patient: f"{site}-{number + 1:0{wide}d}" for patient, number in numbers.items()}


Partition: TypeAlias = Iid | Dirichlet | Quantity | Pathological | Divided
PARTITIONS: dict[str, type[Partition]] = {p.name: p for p in (Iid, Dirichlet, Quantity, Pathological, Divided)}


def _shuffled(groups: Mapping[str, int], rng: np.random.Generator) -> list[str]:
    order = sorted(groups)
    return [order[i] for i in rng.permutation(len(order))]


def _by_share(patients: Sequence[str], shares: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> dict[str, int]:
    sizes = _whole(shares * len(patients))
    return dict(zip(patients, np.repeat(np.arange(len(shares)), sizes).tolist(), strict=True))


def _whole(sizes: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Round ``sizes`` to integers with the same (integer) sum, by the largest remainders."""
    floor = np.floor(sizes).astype(np.int64)
    missing = round(float(sizes.sum())) - int(floor.sum())
    floor[np.argsort(floor - sizes, kind="stable")[:missing]] += 1
    return floor


def _fewest(sites: Mapping[str, int], count: int) -> int:
    return int(np.bincount(list(sites.values()), minlength=count).min())


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise DataError(f"{name} = {value:g}: it must be more than 0")


def _enough(count: int, least: int, groups: Mapping[str, int]) -> None:
    if count < 1 or least < 0:
        raise DataError(f"count = {count}, least = {least}: at least one site, and no negative number of patients")
    if len(groups) < count * max(least, 1):
        raise DataError(f"{len(groups)} patients are too few for {count} sites of at least {max(least, 1)}")
