"""Data sets of PyTorch or MONAI in memory, one per hospital, as a source."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.examples import DataError, Examples
from polyclinic.data.source import Info, Table, Task, digest

KEYS = (("image", "label"), ("img", "seg"), ("x", "y"), ("input", "target"))
"""Pairs of keys under which items that are mappings, as those of MONAI, hold input and target."""


class MapStyle(Protocol):
    """A map-style data set, such as ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Datasets:
    """One data set per site; each item is (input, target), or a mapping with these under two keys.

    All items are read once, when the table is needed, and kept in memory.

    Attributes:
        name: The name of the data.
        sites: The data sets by site.
        patients: The patient of each item, by site; None if every item is another patient's.
        task: What the targets are; by default determined from the first one.
        classes: Names of the classes.
        keys: The keys of input and target in items that are mappings; usual ones by default.
    """

    def __init__(
        self,
        name: str,
        sites: Mapping[str, MapStyle],
        patients: Mapping[str, Sequence[Any]] | None,
        task: Task | None = None,
        classes: Sequence[str] = (),
        keys: tuple[str, str] | None = None,
    ) -> None:
        """Check the numbers of items and patients.

        Raises:
            DataError: If they differ, or a site has none. The message lists every problem.
        """
        self.name, self.sites, self.patients = name, dict(sites), patients
        self._task, self._classes, self.keys = task, tuple(classes), keys
        problems = [f"{site}: its data set is empty" for site, data in self.sites.items() if not len(data)]
        if patients is not None:
            problems += [f"patients: the site {site!r} has no data set" for site in patients.keys() - self.sites.keys()]
            problems += [
                f"{site}: {len(patients.get(site, ()))} patients for {len(data)} items: give the patient of each item"
                for site, data in self.sites.items()
                if len(patients.get(site, ())) != len(data)
            ]
        if problems or not self.sites:
            raise DataError(problems or "no site has a data set")

    @cached_property
    def _all(self) -> tuple[dict[str, int], Tensor, Tensor]:
        """The row of each id, all inputs and all targets."""
        rows, inputs, targets, problems = dict[str, int](), list[Tensor](), list[Tensor](), list[str]()
        for site, data in self.sites.items():
            for i in range(len(data)):
                try:
                    x, y = self._item(data[i])
                except (TypeError, ValueError, KeyError) as error:
                    problems.append(f"{site}, item {i}: {error}")
                    if len(problems) > 5:
                        raise DataError(problems) from None
                    continue
                rows[f"{site}/{i}"] = len(inputs)
                inputs.append(x)
                targets.append(y)
        for what, leaves in (("input", inputs), ("target", targets)):
            kinds = {(tuple(leaf.shape), leaf.dtype) for leaf in leaves}
            if len(kinds) > 1:
                listed = " and ".join(
                    sorted(f"{shape} {str(kind).removeprefix('torch.')}" for shape, kind in kinds)[:3]
                )
                problems.append(f"the {what}s of all items must have one shape and type, but there are {listed}")
        if problems:
            raise DataError(problems)
        return rows, torch.stack(inputs), torch.stack(targets)

    def _item(self, item: Any) -> tuple[Tensor, Tensor]:
        """Return the input and the target of an item as tensors.

        Raises:
            ValueError: If the item has not the expected form.
        """
        if isinstance(item, Mapping):
            pairs = [self.keys] if self.keys else [pair for pair in KEYS if set(pair) <= item.keys()]
            if not pairs or not set(pairs[0]) <= item.keys():
                raise ValueError(f"its keys are {', '.join(map(str, item))}: name those of input and target with keys=")
            given = item[pairs[0][0]], item[pairs[0][1]]
        elif isinstance(item, tuple | list) and len(item) == 2:
            given = item[0], item[1]
        else:
            raise ValueError(f"it is a {type(item).__name__}, not a pair of input and target")
        x, y = (
            torch.as_tensor(part if isinstance(part, Tensor) else np.asarray(part)).detach().cpu() for part in given
        )
        if not x.ndim:
            raise ValueError("its input is one number: give features [F] or an image [C, *spatial]")
        x = x if x.dtype == torch.uint8 else x.float()
        return x.as_subclass(Tensor), (y.float() if y.is_floating_point() else y.long()).as_subclass(Tensor)

    @property
    def task(self) -> Task:
        """What the targets are."""
        if self._task is not None:
            return self._task
        targets = self._all[2]
        if targets.ndim > 2:
            return "segmentation"
        if targets.is_floating_point():
            return "multilabel" if targets.ndim == 2 and targets.shape[1] > 1 else "regression"
        return "classification"

    @property
    def info(self) -> Info:
        """Description of the data."""
        targets = self._all[2]
        classes = self._classes
        if not classes and self.task in ("classification", "segmentation"):
            classes = tuple(f"class {i}" for i in range(int(targets.max()) + 1))
        if not classes and self.task == "multilabel":
            classes = tuple(f"label {i}" for i in range(targets.shape[1]))
        notes = (
            () if self.patients is not None else ("Every item is taken for another patient's, as the program states.",)
        )
        return Info(self.name, self.name, "as given", "", self.task, classes, notes=notes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all items and patients."""
        rows, inputs, targets = self._all
        parts = [inputs.contiguous().numpy().tobytes(), targets.contiguous().numpy().tobytes()]
        return digest(list(rows), self._patients, *parts)

    @property
    def _patients(self) -> tuple[str, ...]:
        if self.patients is None:
            return tuple(self._all[0])
        return tuple(str(patient) for site in self.sites for patient in self.patients[site])

    def table(self) -> Table:
        """Return one row per item."""
        rows, _, targets = self._all
        columns = {"site": tuple(name.rpartition("/")[0] for name in rows)}
        labels: np.ndarray[Any, Any] | None = None
        if self.task != "segmentation":
            flat = targets[:, None] if self.task == "regression" and targets.ndim == 1 else targets
            labels = flat.numpy()
        return Table(tuple(rows), self._patients, labels, columns, ("site",), self.task == "survival")

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named items."""
        rows, inputs, targets = self._all
        index = torch.tensor([rows[name] for name in ids])
        known = self._patients
        if self.task == "segmentation" and targets.ndim == inputs.ndim and targets.shape[1] == 1:
            targets = targets[:, 0]
        if self.task == "regression" and targets.ndim == 1:
            targets = targets[:, None]
        return Examples(inputs[index], targets[index], tuple(known[i] for i in index.tolist()), tuple(ids))
