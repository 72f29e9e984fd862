"""Roles of sites after the split: weak annotation, public images, slice positions and video frames, undersampling."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyclinic.data.annotations import Annotation, accelerated, annotated, column_generator
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError, Dataset, concat, in_memory
from polyclinic.data.source import Info, Table

Sites = dict[str, dict[str, Dataset]]


@dataclass(frozen=True)
class Named:
    """Sites that ``[data]`` names: external sites, sites with public images, and weak annotation."""

    external: tuple[str, ...]
    public: tuple[str, ...]
    weak: Mapping[str, Annotation]

    @classmethod
    def of(cls, spec: DataSpec, titles: Mapping[str, str]) -> "Named":
        """Resolve the sites by name or by their title in the data (``titles`` by name).

        Raises:
            DataError: With every name that does not match a site.
        """
        names = {title: name for name, title in titles.items()} | {name: name for name in titles}
        problems = [
            f'{key} names "{site}", which is not a site of this data. There are {", ".join(titles)}'
            for key, given in (("external", spec.external), ("public", spec.public), ("annotations", spec.annotations))
            for site in given
            if site not in names
        ]

        def resolved(given: Iterable[str]) -> tuple[str, ...]:
            return tuple(sorted(names[site] for site in given if site in names))

        external, public = resolved(spec.external), resolved(spec.public)
        if not problems and not titles.keys() - {*external, *public}:
            who = " or public" if public else ""
            problems.append(f"every site is external{who}, so no site is left to train")
        weak = {names[site]: kind for site, kind in spec.annotations.items() if site in names}
        idle = weak.keys() & {*external, *public}
        problems += [f"annotations names {site}, which does not train: leave it out" for site in sorted(idle)]
        if problems:
            raise DataError(problems)
        return cls(external, public, weak)


def hold(sites: Sites, named: Named, spec: DataSpec, table: Table, seed: int) -> tuple[Sites, Dataset | None]:
    """Return the examples of each site by role, without the sites of public images, and the public examples."""
    if named.weak:
        sites = {site: annotated(roles, named.weak.get(site, "full"), site) for site, roles in sites.items()}
    if spec.position is not None or spec.video is not None:
        where = {name: row for row, name in enumerate(table.ids)}
        sites = {s: {r: _placed(e, table, where, spec) for r, e in roles.items()} for s, roles in sites.items()}
    if spec.accelerate:
        sites = {site: _accelerated(roles, spec, site, seed) for site, roles in sites.items()}
    return _shared(sites, named) if named.public else (sites, None)


def described(info: Info, named: Named, spec: DataSpec, titles: Mapping[str, str]) -> tuple[Info, list[str]]:
    """Return the data set's description after these changes, and notes for the reader of a report."""
    notes = []
    if named.public:
        called = ", ".join(titles[site] for site in named.public)
        notes.append(f"The images of {called} are public: every site and the server hold them, without labels.")
    if weak := {site: kind for site, kind in named.weak.items() if kind != "full"}:
        words = {"boxes": "boxes for masks", "labels": "labels of images for masks", "none": "no labels"}
        listed = "; ".join(f"{titles[site]} {words[kind]}" for site, kind in sorted(weak.items()))
        notes.append(f"Training data are annotated in part: {listed}.")
    if spec.accelerate:
        info = replace(info, task="reconstruction", classes=())
        notes.append(f"Acquisition {spec.accelerate:g} times as fast was simulated by leaving out columns of k-space.")
    return info, notes


def _accelerated(roles: Mapping[str, Dataset], spec: DataSpec, site: str, seed: int) -> dict[str, Dataset]:
    """Return the examples of ``site`` as if acquired faster, with the same columns of k-space for each role."""
    return {
        role: accelerated(
            in_memory(examples, "accelerate = ..."), spec.accelerate, spec.center, column_generator(seed, site)
        )
        for role, examples in roles.items()
    }


def _shared(sites: Sites, named: Named) -> tuple[Sites, Dataset]:
    """Return the sites without those of public images, and these images, which every training site has, too."""
    public = concat([examples for site in named.public for examples in sites[site].values()]).unlabeled()
    data = {site: roles for site, roles in sites.items() if site not in named.public}
    for site in data.keys() - {*named.external}:
        data[site] = {**data[site], "public": public}
    return data, public


def _placed(examples: Dataset, table: Table, where: Mapping[str, int], spec: DataSpec) -> Dataset:
    """Return ``examples`` with the position or the video of each, if the study names a column for it."""
    values_by_field: dict[str, torch.Tensor] = {}
    for key, column in (("positions", spec.position), ("videos", spec.video)):
        if column is None:
            continue
        if column not in table.columns:
            known = ", ".join(name for name in table.columns if name != "site") or "none"
            raise DataError(f'{key[:-1]} = "{column}": there is no such column. There are {known}')
        values = [table.columns[column][where[name]] for name in examples.ids]
        values_by_field[key] = _numbered(values) if key == "videos" else _heights(values, column)
    return replace(examples, **values_by_field)  # type: ignore[type-var]  # both are dataclasses with these fields


def _numbered(values: list[str]) -> torch.Tensor:
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values], dtype=torch.int64)


def _heights(values: list[str], column: str) -> torch.Tensor:
    try:
        heights = np.array([float(value) for value in values], dtype=np.float32)
    except ValueError:
        raise DataError(
            f'position = "{column}" contains values that are not numbers: give heights from 0 to 1'
        ) from None
    if len(heights) and not bool(((heights >= 0) & (heights <= 1)).all()):
        raise DataError(f'position = "{column}" must contain heights from 0 to 1')
    return torch.from_numpy(heights)
