"""What sites hold once it is settled who trains: weak annotation, public images, places in videos, fast scans."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyclinic.data.annotations import Annotation, accelerated, annotated
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError, Examples, concat
from polyclinic.data.source import Info, Table
from polyclinic.data.splits import dice_for

Sites = dict[str, dict[str, Examples]]


@dataclass(frozen=True)
class Named:
    """Whom ``[data]`` names: the sites that nobody trains on, those whose images are public, and weak annotation."""

    external: tuple[str, ...]
    public: tuple[str, ...]
    weak: Mapping[str, Annotation]

    @classmethod
    def of(cls, spec: DataSpec, titles: Mapping[str, str]) -> "Named":
        """Finds the sites by name or by the data's own word for them (``titles`` by name).

        Raises:
            DataError: With every name that is no site's.
        """
        names = {title: name for name, title in titles.items()} | {name: name for name in titles}
        problems = [
            f'{key} names "{site}", which is no site of this data. There are {", ".join(titles)}'
            for key, given in (("external", spec.external), ("public", spec.public), ("annotations", spec.annotations))
            for site in given
            if site not in names
        ]

        def found(given: Iterable[str]) -> tuple[str, ...]:
            return tuple(sorted(names[site] for site in given if site in names))

        external, public = found(spec.external), found(spec.public)
        if not problems and not titles.keys() - {*external, *public}:
            who = " or public" if public else ""
            problems.append(f"every site is external{who}, so that nobody is left to train")
        weak = {names[site]: kind for site, kind in spec.annotations.items() if site in names}
        idle = weak.keys() & {*external, *public}
        problems += [f"annotations names {site}, which does not train: leave it out" for site in sorted(idle)]
        if problems:
            raise DataError(problems)
        return cls(external, public, weak)


def hold(sites: Sites, named: Named, spec: DataSpec, table: Table, seed: int) -> tuple[Sites, Examples | None]:
    """What each site holds by role, and what everybody does; the sites of public images are gone."""
    where = {name: row for row, name in enumerate(table.ids)}
    held = {}
    for site, roles in sites.items():
        weak = annotated(roles, named.weak.get(site, "full"), site)
        held[site] = {role: _placed(examples, table, where, spec) for role, examples in weak.items()}
    if spec.accelerate:
        for site, roles in held.items():
            rng = int(dice_for(seed, "columns", site).integers(2**31))
            held[site] = {
                role: accelerated(examples, spec.accelerate, spec.center, torch.Generator().manual_seed(rng))
                for role, examples in roles.items()
            }
    if not named.public:
        return held, None
    public = concat([examples for site in named.public for examples in held.pop(site).values()]).unlabeled()
    for site in held.keys() - {*named.external}:
        held[site]["public"] = public
    return held, public


def described(info: Info, named: Named, spec: DataSpec, titles: Mapping[str, str]) -> tuple[Info, list[str]]:
    """What the data is for now, and what a reader of a report must be told of it."""
    notes = []
    if named.public:
        called = ", ".join(titles[site] for site in named.public)
        notes.append(f"The images of {called} are public: every site and the server hold them, without labels.")
    if weak := {site: kind for site, kind in named.weak.items() if kind != "full"}:
        words = {"boxes": "boxes for masks", "labels": "labels of images for masks", "none": "no labels"}
        told = "; ".join(f"{titles[site]} {words[kind]}" for site, kind in sorted(weak.items()))
        notes.append(f"Training data are annotated in part: {told}.")
    if spec.accelerate:
        info = replace(info, task="reconstruction", classes=())
        notes.append(f"Acquisition {spec.accelerate:g} times as fast was imitated by leaving out columns of k-space.")
    return info, notes


def _placed(examples: Examples, table: Table, where: Mapping[str, int], spec: DataSpec) -> Examples:
    """``examples`` with the position or the video of each, where the study names a column for it."""
    found: dict[str, torch.Tensor] = {}
    for key, column in (("positions", spec.position), ("videos", spec.video)):
        if column is None:
            continue
        if column not in table.columns:
            there = ", ".join(name for name in table.columns if name != "site") or "none"
            raise DataError(f'{key[:-1]} = "{column}": there is no such column. There are {there}')
        values = [table.columns[column][where[name]] for name in examples.ids]
        found[key] = _numbered(values) if key == "videos" else _heights(values, column)
    return replace(examples, **found)  # type: ignore[arg-type]


def _numbered(values: list[str]) -> torch.Tensor:
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values], dtype=torch.int64)


def _heights(values: list[str], column: str) -> torch.Tensor:
    try:
        heights = np.array([float(value) for value in values], dtype=np.float32)
    except ValueError:
        raise DataError(f'position = "{column}" holds what is no number: give heights from 0 to 1') from None
    if len(heights) and not bool(((heights >= 0) & (heights <= 1)).all()):
        raise DataError(f'position = "{column}" must hold heights from 0 to 1')
    return torch.from_numpy(heights)
