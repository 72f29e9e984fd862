"""Reading of a study file as text and as a table, without validation and without importing PyTorch."""

import codecs
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.core.config_problems import Problem
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.method_runs import PLAN
from polyclinic.studies.config.diagnostics import BadStudy

AUTOMATIC = "nnunet"
"""The value of ``data.plan`` with which ``polyclinic run`` makes the plan."""


def text_of(path: Path) -> str:
    """Return the text of the study file at ``path``.

    Raises:
        ConfigError: If there is no such file, or it is not text in UTF-8, or in UTF-16 with a byte order mark.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such study file. `polyclinic new {path.name}` writes one")
    try:
        data = path.read_bytes()
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not {error.encoding.upper()}. Save the file as UTF-8 text; a study file is "
            "TOML"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Make the study file readable") from None


def table_of(text: str, path: Path | str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the table in ``text`` with ``changes`` by dotted key, without validation.

    In a run folder, ``data.plan`` is the run's own copy of the plan.

    Raises:
        BadStudy: If the text is not TOML.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadStudy(path, text, {}, [Problem((), f"this is not TOML: {error}")]) from None
    own = Path(path).parent / PLAN
    if named_plan(data) not in (None, AUTOMATIC) and own.is_file():
        data["data"]["plan"] = str(own)
    for key, value in (changes or {}).items():
        set_key(data, key.split("."), value)
    return data


def plan_content(text: str, folder: Path | None) -> bytes | None:
    """Return the content of the plan of the study in ``text``; None if it has none.

    Args:
        text: The study file.
        folder: The folder whose copy of the plan is preferred to the file that the study names, if there is a copy.

    Raises:
        DataError: If there is neither.
    """
    from polyclinic.data.files import placed

    named = named_plan(tomllib.loads(text))
    if named is None or named == AUTOMATIC:
        return None
    own = None if folder is None else folder / PLAN
    return (own if own is not None and own.is_file() else placed(named, "plan")).read_bytes()


def named_plan(table: Mapping[str, Any]) -> str | None:
    """Return ``data.plan``, the path of a file or ``AUTOMATIC``; None if it is not given."""
    data = table.get("data")
    plan = data.get("plan") if isinstance(data, Mapping) else None
    return plan if isinstance(plan, str) else None


def set_key(data: dict[str, Any], path: list[str], value: Any) -> None:
    """Set ``value`` at ``path`` in ``data``, and create the tables that are missing."""
    for part in path[:-1]:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    data[path[-1]] = value
