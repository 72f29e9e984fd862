"""The installed packages that provide plug-ins: name, version, and a hash of their files.

A plug-in is an entry point in one of the groups ``polyclinic.methods``, ``polyclinic.networks``, ... of another
installed package. This module reads metadata and files and imports no module of such a package, so that a site can
refuse it before its code runs.

The hash covers the package that provides the entry point: the files listed in its metadata (RECORD,
https://packaging.python.org/en/latest/specifications/recording-installed-packages/), and all files in the folder of the
module that would be imported, which for an editable install is the source tree. It does not cover the package's
imports.
"""

import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

RULE = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[^@\s=]+)?(@[0-9a-f]{64})?$"


class Package(NamedTuple):
    """One installed package.

    Attributes:
        name: Its normalized name (PEP 503).
        version: Its installed version.
        hash: SHA-256 of its files, 64 hexadecimal digits.
    """

    name: str
    version: str
    hash: str


def packages_of(wanted: Mapping[str, Collection[str]]) -> tuple[Package, ...]:
    """Return the packages that provide the plug-ins ``wanted``, names by group. Other names need no package."""
    found = _entry_points(tuple(_entry_point_files()))
    points = [point for group, names in wanted.items() for point in found.get(group, ()) if point.name in names]
    return tuple(sorted({_package(point) for point in points}))


def entry_points_in(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of installed packages in ``group``, such as ``networks``."""
    return _entry_points(tuple(_entry_point_files())).get(group, ())


def texts_in(value: object) -> Iterator[str]:
    """Yield every text in a nest of mappings and sequences, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def allows(rule: str, package: Package) -> bool:
    """Return whether a rule such as ``name``, ``name==1.2``, ``name@HASH`` or ``name==1.2@HASH`` fits ``package``."""
    rest, _, hash = rule.partition("@")
    name, _, version = rest.partition("==")
    return normalized(name) == package.name and version in ("", package.version) and hash in ("", package.hash)


def exact_rule(package: Package) -> str:
    """Return the rule that fits only this package."""
    return f"{package.name}=={package.version}@{package.hash}"


def normalized(name: str) -> str:
    """Return a package's name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@lru_cache(maxsize=1)
def _entry_points(files: tuple[tuple[str, int, int], ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return the entry points by group. They are read again only if ``files``, those that declare them, differ."""
    found, ours = entry_points(), "polyclinic."
    groups = [group for group in found.groups if group.startswith(ours)]
    return {group.removeprefix(ours): tuple(found.select(group=group)) for group in groups}


def _entry_point_files() -> Iterator[tuple[str, int, int]]:
    """Yield the path, time of change and size of what declares the entry points of each installed package."""
    for place in sys.path:
        try:
            with os.scandir(place or ".") as entries:
                packages = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            packages = [place]  # an archive, or a folder that does not exist
        for path in packages:
            for file in (f"{path}/entry_points.txt", path):
                try:
                    about = os.stat(file)
                except OSError:
                    continue
                yield file, about.st_mtime_ns, about.st_size
                break


def _package(point: EntryPoint) -> Package:
    about = point.dist.metadata if point.dist is not None else {"Name": "unknown", "Version": "unknown"}
    hasher = hashlib.sha256()
    for label, path in sorted(set(_files(point))):
        content = path.read_bytes()
        hasher.update(f"{label}\n{len(content)}\n".encode() + content)
    return Package(normalized(about["Name"]), about["Version"], hasher.hexdigest())


def _files(point: EntryPoint) -> Iterator[tuple[str, Path]]:
    """Yield the files to hash: a label that is the same on every machine, and the path."""
    for file in (point.dist.files if point.dist is not None else None) or ():
        path = Path(str(file.locate()))
        if path.is_file() and not _derived(path) and not _about_this_install(path):
            yield f"installed {file.as_posix()}", path
    top = point.module.partition(".")[0]
    spec = _spec(top)
    if spec is None:
        return
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in folder.rglob("*"):
            if path.is_file() and not _derived(path):
                yield f"imported {top}/{path.relative_to(folder).as_posix()}", path
    if spec.submodule_search_locations is None and spec.origin and Path(spec.origin).is_file():
        yield f"imported {Path(spec.origin).name}", Path(spec.origin)


def _spec(top: str) -> ModuleSpec | None:
    """Return the location of a top-level module without importing it."""
    try:
        return find_spec(top)
    except (ImportError, ValueError):
        return None


def _derived(path: Path) -> bool:
    """Return whether a file is a compiled copy of a source, which differs between machines."""
    return path.suffix in (".pyc", ".pyo") or "__pycache__" in path.parts


def _about_this_install(path: Path) -> bool:
    """Return whether a file is the installer's (RECORD, INSTALLER, direct_url.json), except for entry points."""
    return path.parent.suffix in (".dist-info", ".egg-info") and path.name != "entry_points.txt"
