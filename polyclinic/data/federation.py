"""Construction of a federation, sites with training, validation and test examples, from a ``[data]`` table."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from polyclinic.data.cases.cases import Cases
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError, Dataset, concat, in_memory
from polyclinic.data.fingerprint.case_rows import CaseRows, case_rows
from polyclinic.data.fingerprint.dataset_fingerprint import PLAIN, Numbered
from polyclinic.data.formats.column_roles import missing_at, named_column, no_column
from polyclinic.data.partition import Divided
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.quality.exact_duplicates import Duplicate, duplicates, without_duplicates
from polyclinic.data.quality.near_duplicates import near_duplicate_notes, near_duplicates
from polyclinic.data.simulation.simulated_scanners import Scanner, badge
from polyclinic.data.site_roles import Named, described, hold
from polyclinic.data.source import FittedSource, Info, Source, Table, digest, slug
from polyclinic.data.splits import (
    ROLES,
    Fold,
    fold_patients,
    official,
    rng_for,
    split_patients,
    strata,
    without_test,
)
from polyclinic.data.summary import RoleSummary, SiteSummary, summarize
from polyclinic.data.texts import joined, taken

__all__ = ["DataError", "DataSpec", "Federated", "RoleSummary", "SiteSummary", "federate", "fingerprint_of"]


@dataclass(frozen=True, eq=False)
class Federated:
    """Data at sites, ready for an engine, with everything that a report must state about it.

    Attributes:
        sites: Examples by site and role (``"train"``, ``"val"``, ``"test"``, ``"unlabeled"``, ``"boxed"``,
            ``"tagged"``, ``"public"``). External sites have ``"test"`` only. Roles without examples are absent, except
            the ``"train"`` of a site with weak annotation.
        external: The sites without training.
        info: Description of the data set.
        simulated: Sentence that accompanies every result if sites are simulated; None if they are real.
        fingerprint: Hash of content, options and seed, identical on every machine for identical data.
        rows: The table of sites, in the order of ``sites``.
        duplicates: Equal inputs anywhere in the federation.
        notes: Further sentences for the reader of a report.
        public: Public images without targets, identical at all sites and the server.
        statistics: For tables, the statistics with which each site's rows are filled and scaled.
        nearly_equal: Pairs of nearly equal images, if the study asks for them.
    """

    sites: Mapping[str, Mapping[str, Dataset]]
    external: tuple[str, ...]
    info: Info
    simulated: str | None
    fingerprint: str
    rows: tuple[SiteSummary, ...]
    duplicates: tuple[Duplicate, ...] = ()
    notes: tuple[str, ...] = ()
    public: Dataset | None = None
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    nearly_equal: tuple[Duplicate, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, *spatial) or (F,)."""
        return next(iter(next(iter(self.sites.values())).values())).shape

    @property
    def training(self) -> tuple[str, ...]:
        """The sites that train."""
        return tuple(name for name in self.sites if name not in self.external)

    @property
    def pooled(self) -> Mapping[str, Dataset]:
        """Training and validation examples of all training sites together, by role."""
        parts = [self.sites[name] for name in self.training]
        filled = {role: [part[role] for part in parts if len(part.get(role, ()))] for role in ("train", "val")}
        return {role: concat(examples) for role, examples in filled.items() if examples}


def federate(spec: DataSpec, seed: int = 0, fold: Fold | None = None, source: Source | None = None) -> Federated:
    """Read the data that ``spec`` names and distribute them to sites.

    The same ``spec``, content, ``seed`` and ``fold`` give the same federation, independent of the order of files on
    disk.

    Args:
        spec: The ``[data]`` table.
        seed: Seed of every random choice.
        fold: Fold of a cross-validation; None for a single split by ``spec.split``.
        source: ``spec.source()`` if already available, to avoid reading it again.

    Raises:
        DataError: With every problem.
    """
    source = source or spec.source()
    full = source.table()
    if not len(full):
        raise DataError(f"{source.info.name} has no examples")
    _require_site_column(spec, full, source)
    notes: list[str] = []
    table, titles = _at_sites(full, spec, seed, notes)
    named = Named.of(spec, titles)
    held_out = fold is not None and fold.by == "sites"
    if fold is not None and held_out:
        named = _without(named, fold, titles)
    outside = named.external + named.public
    places = _places(table, _roles(table, spec, seed, outside, named.weak, fold))
    sites: dict[str, dict[str, Dataset]] = {}
    readers: Mapping[str, Source] = dict.fromkeys(titles, source)
    statistics = dict[str, Statistics]()
    if isinstance(source, FittedSource):
        readers = source.fitted(_fitted_rows(places, titles, outside), outside)
        statistics = {
            site: fit
            for site, one in readers.items()
            if isinstance(fit := getattr(one, "statistics", None), Statistics)
        }
    for site in titles:
        order = [role for role in (*ROLES, "unlabeled") if (site, role) in places]
        sites[site] = {role: readers[site].examples(places[site, role]) for role in order}
        if "unlabeled" in sites[site]:
            sites[site]["unlabeled"] = sites[site]["unlabeled"].unlabeled()
    alike: tuple[Duplicate, ...] = ()
    if spec.near_duplicates != "ignore":
        alike = near_duplicates(sites, source.fingerprint)
        notes += near_duplicate_notes(alike, spec.near_duplicates == "refuse")
    if spec.scanners:
        sites = {s: {r: Scanner.of(s, spec.scanners, seed)(e) for r, e in roles.items()} for s, roles in sites.items()}
    if copies := duplicates(sites):
        sites = without_duplicates(sites, copies, outside, spec.duplicates, notes)
    sites, public = hold(sites, named, spec, table, seed)
    _complete(sites, named.external, held_out)
    _require_new_to_previous_stage(sites)
    info, more = described(source.info, named, spec, titles)
    rows = tuple(summarize(site, titles[site], site in named.external, sites[site], info) for site in sites)
    badges = [spec.partition.badge] if spec.partition else []
    badges += [badge(spec.scanners)] if spec.scanners else []
    badges += [source.info.simulated] if source.info.simulated else []
    return Federated(
        sites,
        named.external,
        info,
        " ".join(badges) or None,
        fingerprint_of(spec, seed, fold, source),
        rows,
        copies,
        (*source.info.notes, *notes, *more),
        public,
        statistics,
        alike,
    )


def fingerprint_of(spec: DataSpec, seed: int, fold: Fold | None, source: Source) -> str:
    """Return the ``fingerprint`` of what ``federate`` returns for these arguments, without decoding data."""
    common = spec.model_dump(mode="json", include=set(DataSpec.model_fields) - {"use", "path", "kind", "plan"})
    return digest("federated", 1, source.fingerprint, sorted(common.items()), seed, *([vars(fold)] if fold else []))


def rows_by_site(spec: DataSpec, seed: int, source: Source) -> dict[str, CaseRows]:
    """Return the rows of each training site's training images, in the split of ``seed``."""
    rows, found = case_rows(source), {}
    data = federate(spec.model_copy(update=PLAIN), seed, source=Numbered(source))
    for name in data.training:
        roles = data.sites[name]
        where = [
            in_memory(roles[role], "a plan").inputs[:, 0].long() for role in ("train", "unlabeled") if role in roles
        ]
        found[name] = rows.subset(torch.cat(where))
    return found


def _require_site_column(spec: DataSpec, table: Table, source: Source) -> None:
    """Require that the column that ``spec.sites`` names is known, if the source has the key ``site`` for it.

    Raises:
        DataError: If it is not known. The message suggests the key.
    """
    known = {name.casefold() for name in ("natural", *table.columns)}
    if isinstance(spec.sites, str) and spec.sites.casefold() not in known and hasattr(source, "site"):
        raise DataError(
            f'sites = "{spec.sites}": there is no such column among those that can name sites '
            f"({', '.join(table.columns) or 'none'}). If the file has it, name it with the key site = "
            f'"{spec.sites}", and leave sites out'
        )


def _at_sites(table: Table, spec: DataSpec, seed: int, notes: list[str]) -> tuple[Table, dict[str, str]]:
    """Return the table with a column ``site``, each patient at one site, and the sites' titles in name order."""
    if isinstance(spec.partition, Divided):
        table, names, titles = _divided(table, spec.partition, seed, notes)
    elif spec.partition is not None:
        if table.labels is None and spec.partition.name in ("dirichlet", "pathological"):
            raise DataError(
                f'partition = "{spec.partition.name}" distributes patients by class, and masks have none: use '
                '"iid" or "quantity"'
            )
        numbers = spec.partition.deal(strata(table), rng_for(seed, "partition"))
        wide = len(str(spec.partition.count))
        names = [f"site-{numbers[p] + 1:0{wide}d}" for p in table.patients]
        titles = {name: name.replace("-", " ") for name in names}
    else:
        table, names, titles = _natural(table, str(spec.sites), notes)
    table = dataclasses.replace(table, columns={**table.columns, "site": tuple(names)})
    patients = {site: set[str]() for site in sorted(titles)}
    for site, patient in zip(names, table.patients, strict=True):
        patients[site].add(patient)
    small = {site: len(found) for site, found in patients.items() if len(found) < spec.min_patients}
    if small:
        listed = ", ".join(f"{site} ({count})" for site, count in small.items())
        notes.append(f"Left out, with fewer than {spec.min_patients} patients: {listed}.")
    if len(small) == len(patients):
        largest = max(small.values())
        raise DataError(f"no site has min_patients = {spec.min_patients} patients; the largest has {largest}")
    chosen = set[str]()
    for site, found in patients.items():
        if site not in small:
            order, most = sorted(found), spec.max_patients or len(found)
            chosen |= {order[i] for i in rng_for(seed, "max", site).permutation(len(order))[:most]}
    kept = table.take([i for i, patient in enumerate(table.patients) if patient in chosen])
    return kept, {site: titles[site] for site in patients if site not in small}


def _divided(table: Table, divided: Divided, seed: int, notes: list[str]) -> tuple[Table, list[str], dict[str, str]]:
    """Like ``_natural``, with the patients of some hospitals distributed to several sites."""
    table, homes, titles = _natural(table, divided.by, notes)
    if unknown := divided.parts.keys() - titles.keys():
        raise DataError(f"parts.{min(unknown)}: there is no such site. There are {', '.join(titles)}")
    home, groups = dict(zip(table.patients, homes, strict=True)), strata(table)
    dealt: dict[str, str] = {}
    for site in titles:
        local = {patient: group for patient, group in groups.items() if home[patient] == site}
        dealt |= divided.deal(site, local, rng_for(seed, "partition", site))
    named = {name: titles[home[p]] + name.removeprefix(home[p]).replace("-", " ") for p, name in dealt.items()}
    return table, [dealt[patient] for patient in table.patients], named


def _natural(table: Table, column: str, notes: list[str]) -> tuple[Table, list[str], dict[str, str]]:
    """Return rows with a known site, each patient at one site only; the site of each row; and the sites' titles."""
    if column == "natural":
        if not table.sites:
            raise DataError(
                'sites = "natural", but this data does not name the hospital of an example: name a column, or '
                'simulate sites with sites = {partition = "dirichlet", count = 4}'
            )
        column = table.sites[0]
    known = named_column(table.columns, column)
    if known is None:
        raise DataError(f'sites = "{column}": the data {no_column(table.columns, column)}')
    column, values = known, list(table.columns[known])
    if missing := missing_at(values):
        gone = set(missing)
        values = ["" if i in gone else value for i, value in enumerate(values)]
        notes.append(f"Left out: {len(missing)} examples whose {column} is missing.")
    titles: dict[str, str] = {}
    name_of = {value: slug(value) for value in sorted({*values}) if value.strip()}
    for value, name in name_of.items():
        if titles.setdefault(name, value) != value:
            raise DataError(f"two sites would have the name {name}: {titles[name]!r} and {value!r}")
    names = [name_of.get(value) for value in values]
    home = _homes(table.patients, names)
    rows = [
        i for i, (patient, name) in enumerate(zip(table.patients, names, strict=True)) if name and name == home[patient]
    ]
    if away := len(table) - names.count(None) - len(rows):
        several = len(
            {patient for patient, name in zip(table.patients, names, strict=True) if name and name != home[patient]}
        )
        notes.append(
            f"{several} patients were seen at several sites; each is kept where most examples are, and {away} examples "
            "at other sites are left out."
        )
    return table.take(rows), [name_of[values[i]] for i in rows], titles


def _homes(patients: Sequence[str], sites: Sequence[str | None]) -> dict[str, str]:
    """Return the site where each patient has most rows, and the first in alphabetical order of several such sites."""
    home: dict[str, str] = {}
    several = set[str]()
    for patient, site in zip(patients, sites, strict=True):
        if site is not None and home.setdefault(patient, site) != site:
            several.add(patient)
    counts: dict[str, Counter[str]] = {patient: Counter() for patient in several}
    for patient, site in zip(patients, sites, strict=True) if several else ():
        if site is not None and patient in counts:
            counts[patient][site] += 1
    return home | {patient: min(found, key=lambda s, n=found: (-n[s], s)) for patient, found in counts.items()}  # type: ignore[misc]


def _places(table: Table, roles: Mapping[str, str]) -> dict[tuple[str, str], Sequence[str]]:
    """Return the names of the examples of each site and role, in alphabetical order, given each patient's role."""
    numbers: dict[tuple[str, str], int] = {}
    keys = zip(table.columns["site"], map(roles.__getitem__, table.patients), strict=True)
    groups = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(table))
    names = list(table.ids)
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    del names
    order = order[np.argsort(groups[order], kind="stable")]
    parts = np.split(order, np.cumsum(np.bincount(groups, minlength=len(numbers)))[:-1])
    return {key: taken(table.ids, part) for key, part in zip(numbers, parts, strict=True)}


def _fitted_rows(
    places: Mapping[tuple[str, str], Sequence[str]], titles: Mapping[str, str], external: tuple[str, ...]
) -> Mapping[str, Sequence[str]]:
    """Return the examples of each site from which statistics are computed: of training, or all of an external site."""
    return {
        site: joined(
            [places.get((site, role), ()) for role in (("test",) if site in external else ("train", "unlabeled"))]
        )
        for site in titles
    }


def _without(named: Named, fold: Fold, titles: Mapping[str, str]) -> Named:
    """Return ``named`` with the site that a fold by sites tests added to the external sites.

    Raises:
        DataError: If the number of sites differs from the number of folds.
    """
    sites = sorted(titles.keys() - {*named.external, *named.public})
    if len(sites) < 2 or len(sites) != fold.count:
        raise DataError(f"leaving one of {fold.count} sites out: there are {len(sites)} that train")
    out = sites[fold.index]
    return dataclasses.replace(
        named,
        external=tuple(sorted((*named.external, out))),
        weak={site: kind for site, kind in named.weak.items() if site != out},
    )


def _roles(
    table: Table, spec: DataSpec, seed: int, external: tuple[str, ...], weak: Mapping[str, str], fold: Fold | None
) -> dict[str, str]:
    """Return the role of each patient. Labels are withheld from a share of the training patients, class by class."""
    site_of = dict(zip(table.patients, table.columns["site"], strict=True))
    groups = strata(table)
    fixed = official(table) if spec.split == "official" else {}
    roles: dict[str, str] = {}
    at_site: dict[str, dict[str, int]] = {site: {} for site in sorted(set(site_of.values()))}
    for patient, site in site_of.items():
        at_site[site][patient] = groups[patient]
    for site, local in at_site.items():
        if site in external:
            found = dict.fromkeys(local, "test")
        elif isinstance(spec.split, tuple) and fold is not None and fold.by == "patients":
            found = fold_patients(local, fold, spec.split, rng_for(seed, "split", site))
        elif isinstance(spec.split, tuple) and fold is not None:
            found = split_patients(local, without_test(spec.split), rng_for(seed, "split", site))
        elif isinstance(spec.split, tuple):
            found = split_patients(local, spec.split, rng_for(seed, "split", site))
        else:
            found = {patient: fixed[patient] for patient in local}
        if share := 1.0 if weak.get(site) == "none" else spec.unlabeled:
            train = {patient: local[patient] for patient, role in found.items() if role == "train"}
            shares = (1 - share, 0.0, share)
            withheld = split_patients(train, shares, rng_for(seed, "unlabeled", site))
            found |= {patient: "unlabeled" for patient, role in withheld.items() if role == "test"}
        roles |= found
    return roles


def _require_new_to_previous_stage(sites: Mapping[str, Mapping[str, Dataset]]) -> None:
    """Require that the previous stage of a cascade was trained on no test image.

    Raises:
        DataError: If it was.
    """
    tested = [data for roles in sites.values() if isinstance(data := roles.get("test"), Cases)]
    if seen := [name for data in tested for name in data.seen_before]:
        some = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "")
        raise DataError(
            f"the previous stage of the cascade was trained on {len(seen)} test images ({some}), so that their scores "
            "would be too good: use the seeds, the split and the folds of its study"
        )


def _complete(sites: Mapping[str, Mapping[str, Dataset]], external: tuple[str, ...], held_out: bool = False) -> None:
    problems = [
        f"site {site} has no {'training' if role == 'train' else 'test'} data: leave it out with a larger "
        "min_patients, change the split, or name it external"
        for site, roles in sites.items()
        for role in (("test",) if site in external else ("train",) if held_out else ("train", "test"))
        if role not in roles
    ]
    if problems:
        raise DataError(problems)
