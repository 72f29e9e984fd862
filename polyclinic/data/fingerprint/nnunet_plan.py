"""File of a plan as nnU-Net makes it: what a study takes from it, and what it follows from.

A TOML file that people can read and edit. ``polyclinic plan`` writes it, and a study uses it with ``plan = "FILE"`` in
``[data]``: the preprocessing, the patch and, unless the study sets them, the network's stages and the batch size. It
holds sums over patients and nothing of a single one, except for a cascade's hashes of images (``PreviousStage.known``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.toml_text import dumps, inline
from polyclinic.data.fingerprint.nnunet_planner import CaseFacts, Configuration, Planned
from polyclinic.data.formats.safe_reading import read_toml
from polyclinic.data.preprocessing.pipeline_config import plain
from polyclinic.data.preprocessing.previous_stage import PreviousStage
from polyclinic.errors import DataError

KIND = "nnunet"
VERSION = 1
OPTIONS = ("kernels", "strides", "width", "deep_supervision")
"""Keys of ``[use]`` that are options of the network."""
NAMES = {"full": "3d_fullres", "slices": "2d", "low": "3d_lowres"}
CASCADE = "3d_cascade_fullres"
"""The configuration of full resolution with the mask of a previous stage."""


@dataclass(frozen=True)
class NnunetPlan:
    """What a study takes from a plan.

    Attributes:
        steps: The preprocessing, as tables of a study file.
        patch: Size of a patch.
        batch_size: Patches in a batch.
        network: Name of the network.
        options: Options of the network.
        batch_dice: Whether the Dice loss is computed over the patches of a batch together.
    """

    steps: tuple[Mapping[str, Any], ...]
    patch: tuple[int, ...]
    batch_size: int
    network: str
    options: Mapping[str, Any]
    batch_dice: bool

    @property
    def data_options(self) -> dict[str, Any]:
        """The keys of ``[data]`` that the plan determines."""
        return {"steps": [dict(step) for step in self.steps], "patch": list(self.patch)}

    @property
    def task_options(self) -> dict[str, Any]:
        """The keys of ``[task]`` that the plan determines."""
        return {"batch_dice": self.batch_dice}

    @classmethod
    def read(cls, path: Path) -> "NnunetPlan | None":
        """Read the plan at ``path``, which a person may have edited; None if it is a plan of another kind.

        Raises:
            DataError: If it is not a valid plan, with every problem.
        """
        table = read_toml(path)
        if table.get("kind") != KIND:
            return None
        if table.get("version") != VERSION:
            raise DataError(f"{path.name} is a plan of another version: create one with `polyclinic plan STUDY`")
        use = table.get("use")
        if not isinstance(use, dict):
            raise DataError(f"{path.name} has no table [use]: create one with `polyclinic plan STUDY`")
        return cls._of_table(use, path.name)

    @classmethod
    def _of_table(cls, use: Mapping[str, Any], name: str) -> "NnunetPlan":
        problems = [f"{name}: [use] has no key {key!r}" for key in _KEYS if key not in use]
        problems += [f"{name}: [use] must not contain {key!r}" for key in sorted(use.keys() - _KEYS.keys())]
        problems += [
            f"{name}: {key} = {inline(use[key])} must be {_KEYS[key][1]}"
            for key in _KEYS
            if key in use and not _KEYS[key][0](use[key])
        ]
        if not problems:
            axes = {len(use["patch"]), *map(len, use["kernels"]), *map(len, use["strides"])}
            if len(axes) > 1 or len(use["kernels"]) != len(use["strides"]):
                problems.append(
                    f"{name}: patch, kernels and strides need the same number of axes, and kernels and strides one "
                    "entry for each stage"
                )
            else:
                for axis, n in enumerate(use["patch"]):
                    total = 1
                    for stride in use["strides"]:
                        total *= stride[axis]
                    if n % total:
                        problems.append(f"{name}: patch = {use['patch']}: {n} is no multiple of the strides' {total}")
        if problems:
            raise DataError(problems)
        return cls(
            tuple(use["steps"]),
            tuple(use["patch"]),
            use["batch_size"],
            use["network"],
            {key: use[key] for key in OPTIONS},
            use["batch_dice"],
        )


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 3) and all(_whole(n) for n in value)


def _odd(value: Any) -> bool:
    return _stages(value) and all(n % 2 for entry in value for n in entry)


def _stages(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(_sizes(entry) for entry in value)


_KEYS: Mapping[str, tuple[Any, str]] = {
    "steps": (lambda v: isinstance(v, list) and all(isinstance(s, dict) for s in v), "a list of steps"),
    "patch": (_sizes, "two or three whole numbers"),
    "batch_size": (_whole, "a whole number from 1"),
    "network": (lambda v: v in ("nnunet", "resenc"), '"nnunet" or "resenc"'),
    "kernels": (_odd, "one list of odd numbers for each stage"),
    "strides": (_stages, "one list of numbers for each stage"),
    "width": (_whole, "a whole number from 1"),
    "deep_supervision": (lambda v: isinstance(v, bool), "true or false"),
    "batch_dice": (lambda v: isinstance(v, bool), "true or false"),
}


def steps_of(planned: Planned, facts: CaseFacts, spacing_mm: tuple[float, ...], used: Configuration) -> list[Any]:
    """Return the preprocessing of a configuration, in nnU-Net's order.

    Args:
        planned: The plan.
        facts: Statistics of the cases, for the scaling of CT.
        spacing_mm: Median spacing along (z, y, x), of which two-dimensional images use the last two.
        used: The configuration.
    """
    steps: list[dict[str, Any]] = []
    if planned.transpose != tuple(range(len(planned.transpose))) and len(used.patch) == len(planned.transpose):
        steps.append({"step": "transpose", "axes": list(planned.transpose)})
    steps.append({"step": "crop_nonzero"})
    schemes = ["none" if scheme == "bytes" else scheme for scheme in planned.schemes]
    scaling: dict[str, Any] = {"step": "normalize", "schemes": schemes}
    if any(planned.masked):
        scaling["nonzero"] = list(planned.masked)
    if "ct" in schemes:
        known = [facts.intensities[i] if scheme == "ct" else None for i, scheme in enumerate(schemes)]
        for key in ("low", "high", "mean", "deviation"):
            scaling[key] = [round(getattr(one, key), 6) if one else float(key == "deviation") for one in known]
    steps.append(scaling)
    if facts.measured:
        steps.append({"step": "resample_cubic", "mm": [float(f"{mm:.9g}") for mm in used.spacing_mm]})
    return steps


def text_of(
    planned: Planned,
    facts: CaseFacts,
    spacing_mm: tuple[float, ...],
    chosen: str,
    about: Mapping[str, Any],
    width: int,
    notes: tuple[str, ...] = (),
    previous: PreviousStage | None = None,
) -> str:
    """Return the contents of the file.

    Args:
        planned: The plan.
        facts: Statistics of the cases.
        spacing_mm: Median spacing along (z, y, x) or (y, x).
        chosen: Which configuration is used: one of ``NAMES``' values, or ``CASCADE``.
        about: What the plan was made from: study, hash of the data, seed, patients.
        width: Features of the finest stage.
        notes: Sentences for the reader, as comments.
        previous: The previous stage of a cascade.
    """
    by_name = {name: getattr(planned, key) for key, name in NAMES.items() if getattr(planned, key) is not None}
    used = by_name[NAMES["full"] if chosen == CASCADE else chosen]
    use = {
        "steps": [*steps_of(planned, facts, spacing_mm, used), *plain([previous] if previous else [])],
        "patch": list(used.patch),
        "batch_size": used.batch_size,
        "network": planned.network,
        "kernels": [list(k) for k in used.kernels],
        "strides": [list(s) for s in used.strides],
        "width": width,
        "deep_supervision": len(used.strides) > 2,
        "batch_dice": used.batch_dice,
    }
    lines = [
        f"# The plan of {about['study']}, by the rules of nnU-Net, from sums over all sites.",
        '# A study uses it with plan = "this file" in [data] and network = "nnunet" in [task]. Edit [use] as needed;',
        "# the rest is information.",
        *(f"# {note}" for note in notes),
        f"version = {VERSION}",
        f'kind = "{KIND}"',
        dumps({**about, "preset": planned.preset, "configuration": chosen}).rstrip("\n"),
        "",
        "[use]",
        "steps = [",
        *(f"    {inline(step)}," for step in use.pop("steps")),  # type: ignore[attr-defined]  # a list of tables
        "]",
        dumps(use).rstrip("\n"),
    ]
    facts_table: dict[str, Any] = {
        "cases": facts.cases,
        "classes": facts.classes,
        "channels": list(facts.channels),
        "median_spacing_mm": list(spacing_mm),
        "part_left_after_cropping": facts.cropped,
    }
    lines += ["", "[facts]", dumps(facts_table).rstrip("\n")]
    for name, one in by_name.items():
        table = {key: _listed(value) for key, value in vars(one).items()}
        lines += ["", f"[configurations.{name}]", dumps(table).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _listed(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_listed(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
