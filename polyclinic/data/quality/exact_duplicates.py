"""Byte-identical inputs anywhere in a federation: reported, dropped or refused."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from polyclinic.data.examples import DataError, Dataset


@dataclass(frozen=True)
class Duplicate:
    """Examples with byte-identical inputs.

    Attributes:
        ids: Their names.
        places: Location of each, as (site, role).
    """

    ids: tuple[str, ...]
    places: tuple[tuple[str, str], ...]

    @property
    def across_roles(self) -> bool:
        """Whether training, validation and test data share it."""
        return len({role for _, role in self.places}) > 1

    @property
    def across_sites(self) -> bool:
        """Whether two sites share it."""
        return len({site for site, _ in self.places}) > 1


def duplicates(sites: Mapping[str, Mapping[str, Dataset]]) -> tuple[Duplicate, ...]:
    """Return inputs that occur more than once anywhere in the federation."""
    found: dict[bytes, list[tuple[str, tuple[str, str]]]] = defaultdict(list)
    for site, roles in sites.items():
        for role, examples in roles.items():
            for name, key in zip(examples.ids, examples.input_hashes(), strict=True):
                found[key].append((name, (site, role)))
    many = [sorted(copies, key=lambda c: (c[1], c[0])) for copies in found.values() if len(copies) > 1]
    return tuple(Duplicate(tuple(n for n, _ in c), tuple(p for _, p in c)) for c in sorted(many))


def without_duplicates(
    sites: dict[str, dict[str, Dataset]],
    copies: tuple[Duplicate, ...],
    external: tuple[str, ...],
    what: Literal["report", "drop", "refuse"],
    notes: list[str],
) -> dict[str, dict[str, Dataset]]:
    """Report, drop or refuse inputs that occur more than once, and return the examples that remain.

    Args:
        copies: What ``duplicates`` returned for ``sites``; not empty.
        notes: List to which the result is appended.

    Raises:
        DataError: If duplicates exist and are to be refused.
    """
    leaks = [d for d in copies if d.across_roles]
    across = sum(d.across_sites for d in copies)
    says = (
        f"{len(copies)} inputs occur more than once, byte for byte; {len(leaks)} of them in two of training, "
        f"validation and test, {across} at two sites."
    )
    if what == "refuse":
        examples = "; ".join(" = ".join(d.ids[:3]) for d in (leaks or copies)[:3])
        raise DataError(f'{says} Remove the copies, or set duplicates = "drop" ({examples})')
    if what == "report":
        notes.append(says)
        return sites
    seen, dropped, kept = set[bytes](), 0, {site: dict(roles) for site, roles in sites.items()}
    for role in ("test", "val", "train", "unlabeled"):  # copies in test data are kept
        for site in sorted(kept, key=lambda s: (s not in external, s)):
            if role in kept[site]:
                fresh = []
                for i, key in enumerate(kept[site][role].input_hashes()):
                    if key not in seen:
                        fresh.append(i)
                        seen.add(key)
                dropped += len(kept[site][role]) - len(fresh)
                kept[site][role] = kept[site][role].subset(torch.tensor(fresh, dtype=torch.int64))
    notes.append(f"{says} {dropped} copies were dropped; where one is test data, that one was kept.")
    return {s: {r: e for r, e in roles.items() if len(e)} for s, roles in kept.items()}
