"""nnU-Net's plan of a study, from the federated statistics of its cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import atomic, serialization
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.data.collection import FromFiles
from polyclinic.data.config import DataSpec
from polyclinic.data.federation import rows_by_site
from polyclinic.data.fingerprint import nnunet_plan
from polyclinic.data.fingerprint.case_rows import CaseRows
from polyclinic.data.fingerprint.dataset_fingerprint import Numbered
from polyclinic.data.fingerprint.nnunet_plan import CASCADE
from polyclinic.data.fingerprint.nnunet_planner import CaseFacts, Intensities, Planned, planned
from polyclinic.data.preprocessing.previous_stage import PreviousStage
from polyclinic.data.source import Source
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import DataError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.case_sums import CHANNEL, HEAD, LARGEST, quantile, value_quantile
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.registry import import_methods
from polyclinic.methods.statistics.case_statistics import (
    CaseStatistics,
    State,
    axes_in,
    median,
    planned_spacing,
    spacing,
)
from polyclinic.studies.config import study_config

FEWEST = 10
"""Smallest number of training patients of a site whose sums are used."""


@dataclass(frozen=True)
class Made:
    """A plan with what it was made from.

    Attributes:
        text: Contents of the file.
        planned: The plan.
        configuration: Name of the configuration that a study takes.
        notes: Sentences for the reader.
    """

    text: str
    planned: Planned
    configuration: str
    notes: tuple[str, ...]


def statistics(sites: dict[str, CaseRows], intensities: bool) -> Tree:
    """Return the sums over ``sites``, computed by the federated method."""
    method = CaseStatistics(Classification(Network("mlp", (1,), 1)), intensities=intensities)
    engine = InProcess(method, {name: Site(name, {"train": rows}) for name, rows in sites.items()})
    state = method.init({})
    for step in train(method, engine, state, rounds=1):
        state = step.state
    return state.sums


def facts_of(sums: Tree, channels: Sequence[str], classes: int) -> CaseFacts:
    """Return the statistics that a plan follows from.

    Raises:
        DataError: If the number of channels is another one, volumes do not state their spacing, or nothing was counted.
    """
    if float(sums["cases"][0]) < 0.5 or min(planned_spacing(sums)[-axes_in(sums) :].tolist()) <= 0:
        raise DataError("the sums count no images, or no spacing: no plan follows from them")
    cases, count = int(sums["cases"][0].round()), len(sums["known"]) if "known" in sums else len(channels)
    if count != len(channels):
        raise DataError(_misnamed(count, channels))
    unknown = cases - int(sums["measured"][0].round())
    if axes_in(sums) == 3 and unknown:
        raise DataError(
            f"{unknown} of {cases} volumes do not state their voxel size, from which nnU-Net plans: correct the files, "
            "or leave those volumes out"
        )
    low, high, weight = quantile(sums["left"], 0.5)
    return CaseFacts(
        cases,
        round((low + (high - low) * weight) / 100, 4),
        tuple(_intensities(sums, channel) for channel in range(count)),
        tuple(channels),
        classes,
        not unknown,
    )


def _misnamed(count: int, channels: Sequence[str]) -> str:
    """Return why ``count`` channels need other names."""
    return (
        f"the images have {count} channels, and {len(channels)} are named ({', '.join(channels)}): name each with "
        "--channels"
    )


def _intensities(sums: Tree, channel: int) -> Intensities | None:
    if "known" not in sums or float(sums["known"][channel]) < 0.5:
        return None
    known = float(sums["known"][channel])
    mean = float(sums["mean"][channel]) / known
    variance = float(sums["square"][channel]) / known - mean**2
    shares = sums["values"][channel]
    return Intensities(mean, max(variance, 0.0) ** 0.5, value_quantile(shares, 0.005), value_quantile(shares, 0.995))


def plan_of(sums: Tree, channels: Sequence[str], classes: int, preset: str, memory_gb: float | None) -> Planned:
    """Return the plan that follows from the sums.

    Raises:
        DataError: If a channel is CT and no image has a foreground, or an image is too large to be counted.
    """
    facts, axes = facts_of(sums, channels, classes), axes_in(sums)
    for name, one in zip(facts.channels, facts.intensities, strict=True):
        if name.casefold() == "ct" and one is None:
            raise DataError(f"channel {name}: CT is scaled by its foreground values, and no mask has a foreground")
    size = median(sums["resampled"])[-axes:]
    if max(size) >= LARGEST:
        raise DataError(f"most images have {LARGEST} voxels or more along an axis after resampling: too large to plan")
    return planned(facts, planned_spacing(sums)[-axes:].tolist(), size, preset, memory_gb)


def plan(
    spec: DataSpec,
    study: str,
    seed: int = 0,
    channels: Sequence[str] = (),
    preset: str = "default",
    memory_gb: float | None = None,
    configuration: str = "",
    width: int = 32,
    sums: Tree | None = None,
    previous: PreviousStage | None = None,
) -> Made:
    """Compute the statistics of the training images of ``spec`` over its sites, and the plan that follows.

    Args:
        spec: The data.
        study: The study's name.
        seed: Seed of the split.
        channels: The name of each channel, such as ``CT``; by default what the data say.
        preset: A preset of ``nnunet_planner``.
        memory_gb: GPU memory in place of the preset's.
        configuration: ``3d_fullres``, ``3d_lowres``, ``3d_cascade_fullres`` or ``2d``; by default full resolution, of
            images 2-D.
        width: Features of the network's finest stage; fewer than 32 for training on a CPU.
        sums: The sums, if they were computed between hospitals.
        previous: The previous stage of a cascade.

    Raises:
        DataError: If the data cannot be read or planned, with every problem.
    """
    notes, about = list[str](), {"study": study, "data": "", "seed": seed, "patients": None}
    classes, named = 0, tuple(channels)
    if sums is None:
        source = spec.source()
        if not isinstance(source, FromFiles):
            raise DataError(
                "a plan is for image files of any size, which this data is not: set steps in [data] instead"
            )
        sites = rows_by_site(spec, seed, source)
        counts = {name: len(set(rows.patients)) for name, rows in sites.items()}
        if small := [name for name, count in counts.items() if count < FEWEST]:
            notes.append(f"Left out, with fewer than {FEWEST} training patients: {', '.join(small)}.")
        sites = {name: rows for name, rows in sites.items() if name not in small}
        if not sites:
            raise DataError(f"no site has {FEWEST} training patients: sums over fewer would reveal them")
        classes = len(Numbered(source).info.classes)
        count = (next(iter(sites.values())).shape[0] - HEAD) // CHANNEL
        named = named or channels_of(source, count)
        if len(named) != count:
            raise DataError(_misnamed(count, named))
        about |= {"data": source.fingerprint, "patients": sum(counts[name] for name in sites)}
        sums = statistics(sites, any(name.casefold() == "ct" for name in named))
    elif not named:
        raise DataError("the sums of a run between hospitals name no channels: name them with --channels")
    classes = classes or max([1, *sums["labels"].nonzero().flatten().tolist()]) + 1
    found = plan_of(sums, named, classes, preset, memory_gb)
    facts, axes = facts_of(sums, named, classes), axes_in(sums)
    names = [name for key, name in nnunet_plan.NAMES.items() if getattr(found, key) is not None]
    chosen = configuration or (CASCADE if previous else names[0])
    if (chosen == CASCADE) != (previous is not None):
        says = "needs --previous, the run of the low resolution" if chosen == CASCADE else "takes no --previous"
        raise DataError(f'configuration = "{chosen}": {says}')
    if previous is not None:
        _require_coarser(previous, found, facts)
    elif chosen not in names or (axes == 3 and chosen == "2d"):
        usable = [name for name in names if axes == 2 or name != "2d"]
        raise DataError(f'configuration = "{chosen}": this data can be trained on as {" or ".join(usable)}')
    if previous is not None and previous.known:
        notes.append(
            "The keys known and held_out are hashes of images: remove them before you give the plan to others."
        )
    if previous is not None and found.low is None:
        notes.append("nnU-Net would make no cascade: the patch covers at least a quarter of the median image.")
    elif previous is None and found.low is not None:
        notes.append(
            "The patch covers less than a quarter of the median image, so nnU-Net also trains at low resolution and "
            "makes a cascade: --configuration 3d_lowres, and after its run --previous RUN."
        )
    spacing_mm = spacing(sums, 0.5)[-axes:]
    text = nnunet_plan.text_of(found, facts, spacing_mm, chosen, about, width, tuple(notes), previous)
    return Made(text, found, chosen, tuple(notes))


def _require_coarser(previous: PreviousStage, found: Planned, facts: CaseFacts) -> None:
    """Require that a previous stage is one of lower resolution, for the same images.

    Raises:
        DataError: If it is not, with every problem.
    """
    problems, full = [], found.full
    if full is None:
        raise DataError("a cascade is for volumes, and these images have two dimensions")
    if previous.inputs[0] != (count := len(facts.channels)):
        problems.append(f"takes images of {previous.inputs[0]} channels, and these have {count}")
    if len(previous.inputs) != 4 or (given := previous.spacing_mm) is None:
        problems.append("does not resample volumes to a voxel size")
    elif math.prod(given) <= math.prod(full.spacing_mm) * 1.01:
        sizes = (" x ".join(f"{mm:g}" for mm in one) for one in (given, full.spacing_mm))
        problems.append("was trained at {} mm, which is no lower resolution than {} mm".format(*sizes))
    if problems:
        raise DataError([f"the previous stage {one}: name a run with a plan of 3d_lowres" for one in problems])


def plan_beside(study: Path, changes: Mapping[str, Any]) -> tuple[Path, bool]:
    """Return the file of the plan of a study with ``plan = "nnunet"``, which is written if there is none.

    Args:
        study: The study's file.
        changes: Changes of the study by dotted key.

    Returns:
        ``NAME.plan.toml`` next to the study, and whether it was written. An edited file is used as it is.

    Raises:
        BadStudy: If the study is invalid.
        DataError: If the data cannot be read or planned, with every problem.
    """
    to = study.with_name(f"{study.stem}.plan.toml")
    if to.exists():
        return to, False
    config = study_config.read(study, {**changes, "data.plan": None})
    width = config.task.options.get("width", 32)
    preset = "resenc-l" if config.task.network == "resenc" else "default"
    made = plan(config.data, config.name, config.seeds[0], preset=preset, width=width if type(width) is int else 32)
    atomic.write(to, made.text)
    return to, True


def channels_of(source: Source, count: int) -> tuple[str, ...]:
    """Return the names of ``count`` channels: those that the data state, else the modality for each."""
    info = source.collection.info if isinstance(source, FromFiles) else source.info
    names = tuple(part.strip() for part in info.modality.split(","))
    if len(names) == count:
        return names
    return ("CT" if info.modality.upper().startswith(("CT", "LUNG CT")) else info.modality,) * count


def read_statistics(path: Path) -> Tree:
    """Return the sums that a run of the method case-statistics collected, from its checkpoint.

    Raises:
        DataError: If the file is no such checkpoint, or the run is not complete.
    """
    from polyclinic.engines.flare.server import run_coordinator  # noqa: F401 - registers its checkpoint

    import_methods(["case-statistics"])
    try:
        state = serialization.load(path).state
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a checkpoint of a run of case-statistics ({error})") from None
    if not isinstance(state, State) or "resampled" not in state.sums:
        raise DataError(f"{path} is not the checkpoint of a complete run of case-statistics")
    return state.sums
