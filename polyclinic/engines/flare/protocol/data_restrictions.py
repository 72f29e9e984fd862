"""What a study may say about a hospital's data, and what only the hospital says, in ``data.toml``. No PyTorch is
needed.

Which files, columns and patients are read is the hospital's to say. A study may ask for the preprocessing and the split
that must be alike at every site: the keys in ``FROM_STUDY``. Any other key is refused, and where both say something
about the same key and differ, the run does not start until people have agreed.
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
    "slices",  # images
    "fill",
    "scale",
    "indicators",  # tables
    "accelerate",
    "center",  # reconstruction
    "duplicates",
    "alike",  # checks
)
PREPARES = ("steps", "statistics", "declared")
"""What ``plan`` in data.toml says as well, so that both cannot be given."""


def refused(table: Mapping[str, Any]) -> list[str]:
    """Why a site refuses the ``[data]`` table of a study: a sentence for each key that is not the study's to set."""
    if table == {"rehearsal": True}:
        return []
    return [
        f"the study sets {key} = {_short(value)} of the data, which only the hospital sets, in {FILE}"
        for key, value in table.items()
        if key not in FROM_STUDY
    ]


def of_hospital(folder: Path) -> dict[str, Any] | None:
    """The hospital's own table, from ``data.toml`` in its data folder; None where there is none.

    Raises:
        SetupError: If it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return tomllib.loads(read_small(path))
    except (ValueError, OSError) as error:
        raise SetupError(f"{path}: {error}") from None


def conflicts(own: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, str]:
    """Where the study and the hospital say different things: a sentence for each key."""
    found = {
        key: f"{key}: the study asks for {_short(value)}, and {FILE} here says {_short(own[key])}. The hospital's own "
        f"counts: agree with the coordinator, or take the line out of {FILE}"
        for key, value in table.items()
        if key in FROM_STUDY and key in own and own[key] != value
    }
    for key in PREPARES if "plan" in own else ():
        if key in table:
            found[key] = f"{key}: the study says how the data are prepared, and so does `plan` in {FILE} here"
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:119]}…"
