"""Checks before a run: optional packages, the output folder and free space. All problems are reported at once."""

import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from polyclinic.data.preprocessing.pipeline_config import parsed
from polyclinic.data.preprocessing.previous_stage import PreviousStage
from polyclinic.errors import ConfigError, DataError, MissingDependency
from polyclinic.studies.config.study_config import Study

FREE_BYTES = 200 * 2**20
"""Free space that a run needs at least: checkpoints, predictions and the report."""
_TRANSFORMS = {
    "zstd": ("privacy", "Zstd needs zstandard", ("zstandard",)),
}


def preflight(studies: Sequence[Study], out: Path) -> None:
    """Check what a run needs in addition to its study file, before any training.

    Args:
        studies: The studies of one file.
        out: The folder for run folders, which may not exist yet.

    Raises:
        ConfigError: If something is missing. The message lists every problem, one per line.
    """
    found = [p for study in studies for p in (*_device(study), *_packages(study), *_models(study))]
    problems = list(dict.fromkeys([*found, *_folder(out)]))
    if problems:
        raise ConfigError("\n".join(problems))


def _device(study: Study) -> Iterator[str]:
    """Why the study's device cannot be used here, if so."""
    try:
        _ = study.engine.device_here
    except ConfigError as error:
        yield f"[engine] {error}"


def _packages(study: Study) -> Iterator[str]:
    """Packages that are not installed and that this study needs."""
    private = study.privacy is not None or any(study.training_of(method).get("private") for method in study.methods)
    if private and find_spec("dp_accounting") is None:
        yield str(MissingDependency("privacy", "privacy accounting needs dp-accounting"))
    for method in study.methods:
        for step in (*method.uplink, *method.downlink):
            name = step if isinstance(step, str) else str(step.get("name", ""))
            extra, purpose, packages = _TRANSFORMS.get(name, ("", "", ()))
            if any(find_spec(package) is None for package in packages):
                yield str(MissingDependency(extra, purpose))
    if study.engine.kind == "ray" and find_spec("ray") is None:
        yield str(MissingDependency("ray", 'kind = "ray" needs Ray'))
    if find_spec("matplotlib") is None:
        yield "the report needs matplotlib, which is not installed: pip install matplotlib"


def _models(study: Study) -> Iterator[str]:
    """Models of a cascade's previous stage that are not here, or were changed."""
    tables = study.data.options.get("steps") or ()
    for stage in parsed([table for table in tables if table.get("step") == PreviousStage.name]):
        try:
            stage.require_models()  # type: ignore[attr-defined]
        except DataError as error:
            yield str(error)


def _folder(out: Path) -> Iterator[str]:
    """Why no run folder can be made in ``out``, if so."""
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield f"--out {out}: {place} is a file. Name a folder"
        return
    if not os.access(place, os.W_OK | os.X_OK):
        yield f"--out {out}: {place} is not writable. Name another folder, or ask for the permission"
    if (free := shutil.disk_usage(place).free) < FREE_BYTES:
        yield (
            f"--out {out}: {free / 2**20:.0f} MB are free, and a run needs at least {FREE_BYTES / 2**20:.0f} MB. Free "
            "some disk space, or name another folder"
        )
