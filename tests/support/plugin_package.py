"""Packages with plug-ins, installed as pip would, except that their files stay in place."""

import tomllib
from collections.abc import Mapping
from pathlib import Path


def installed(folder: Path) -> Path:
    """Write the metadata of the package whose ``pyproject.toml`` is in ``folder``, which then has to be on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return with_metadata(folder, project["name"], project["version"], project["entry-points"])


def with_metadata(folder: Path, name: str, version: str, groups: Mapping[str, Mapping[str, str]]) -> Path:
    """Write the metadata of a package with the entry points ``groups``."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "entry_points.txt")))
    return folder
