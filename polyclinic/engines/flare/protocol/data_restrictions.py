"""Data settings that a study may request, and those that only the hospital may set in ``data.toml``. Requires no
PyTorch.

The hospital decides which files, columns and patients are read. A study may request the preprocessing and the split
that must be identical at every site: the keys in ``FROM_STUDY``. A site refuses any other key. If study and hospital
set the same key to different values, the run does not start until people have agreed on one.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.paths import SetupError, read_small

FILE = "data.toml"
FROM_STUDY = (
    "split",
    "unlabeled",  # roles
    "steps",
    "size",
    "mm",
    "view",
    "slices",
    "patch",  # images
    "fill",
    "scale",
    "indicators",  # tables
    "accelerate",
    "center",  # reconstruction
    "duplicates",
    "near_duplicates",  # checks
)
PREPARES = ("steps", "statistics", "declared")
"""Keys that ``plan`` in data.toml also determines, so that a study cannot set them in addition."""


def refused(table: Mapping[str, Any]) -> list[str]:
    """Return why a site refuses a study's ``[data]`` table: a sentence for each key that a study may not set."""
    if table == {"rehearsal": True}:
        return []
    return [
        f"the study sets {key} = {_short(value)} of the data, which only the hospital sets, in {FILE}"
        for key, value in table.items()
        if key not in FROM_STUDY
    ]


def stage_models(table: Mapping[str, Any]) -> list[str]:
    """Return the hashes of the models that the study's preprocessing applies (of a cascade's previous stage)."""
    steps = table.get("steps")
    tables = [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list | tuple) else []
    named = [models for step in tables if isinstance(models := step.get("models"), list | tuple)]
    return [str(model) for models in named for model in models]


def of_hospital(folder: Path) -> dict[str, Any] | None:
    """Return the hospital's table from ``data.toml`` in its data folder, or None if the file does not exist.

    Raises:
        SetupError: If the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return tomllib.loads(read_small(path))
    except (ValueError, OSError) as error:
        raise SetupError(f"{path}: {error}") from None


def conflicts(own: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for each key that the study and the hospital set to different values."""
    found = {
        key: f"{key}: the study asks for {_short(value)}, and {FILE} here says {_short(own[key])}. The hospital's "
        f"setting takes precedence: agree with the coordinator, or remove the line from {FILE}"
        for key, value in table.items()
        if key in FROM_STUDY and key in own and own[key] != value
    }
    for key in PREPARES if "plan" in own else ():
        if key in table:
            found[key] = f"{key}: both the study and `plan` in {FILE} here define the preprocessing"
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:119]}…"
