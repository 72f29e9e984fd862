"""Catalog of the field's public data sets: description, access and reader of each.

The tables are ``dataset_catalog.toml`` (sets that need registrations or agreements, each with instructions),
``medmnist.toml`` (the 18 sets of MedMNIST) and ``decathlon.toml`` (the ten tasks of the Medical Segmentation
Decathlon); the latter two are downloaded with their published checksums. Data are downloaded by ``get`` in advance,
never while a study runs.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polyclinic.errors import DataError

if TYPE_CHECKING:  # what reads and downloads is imported on use, so that a list is printed without PyTorch
    from polyclinic.data.source import Info, Task

ZENODO = "https://zenodo.org/records/10519652/files/"
MEDMNIST = "Yang et al., Scientific Data 10:41 (2023), doi:10.1038/s41597-022-01721-8"
DECATHLON = "Antonelli et al., Nature Communications 13:4128 (2022), doi:10.1038/s41467-022-30695-9"
MONAI = "https://msd-for-monai.s3-us-west-2.amazonaws.com/"
USUAL = 28


@dataclass(frozen=True)
class Dataset:
    """Entry of the catalog.

    Attributes:
        name: Value of ``use = ...`` in a study file.
        title: One line.
        modality: Imaging modality or other type of data.
        organ: Organ shown.
        task: Type of prediction.
        sites: Number and kind of its sites.
        size: Number of examples or patients.
        license: As stated by the publisher; check it before use.
        citation: Publication to cite.
        url: Origin of the data.
        get: How to get it.
        classes: The names of the classes, in order.
        kind: Kind of source (a key of ``polyclinic.data.config.KINDS``); "" if this version has no reader.
        file: File that ``path`` names below the folder that the user gives.
        embedded: File of this package that is read if the user gives no path.
        options: Options of the source; a study can override them.
        md5: If ``get`` downloads one file per image size: the published checksums by size in pixels.
        link: If ``get`` downloads one archive: its address.
        checksum: The archive's published MD5.
        inside: The folder within the archive that contains the data.
    """

    name: str
    title: str
    modality: str
    organ: str
    task: str
    size: str
    license: str
    sites: str = ""
    citation: str = ""
    url: str = ""
    get: str = ""
    classes: tuple[str, ...] = ()
    kind: str = ""
    file: str = ""
    embedded: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    md5: Mapping[int, str] = field(default_factory=dict)
    link: str = ""
    checksum: str = ""
    inside: str = ""

    @property
    def automatic(self) -> bool:
        """Whether ``get`` can download it."""
        return bool(self.md5 or self.link)

    @property
    def info(self) -> "Info":
        """Description for a report."""
        from polyclinic.data.source import Info

        return Info(
            self.name,
            self.title,
            self.modality,
            self.organ,
            cast("Task", self.task),
            self.classes,
            self.license,
            self.citation,
            self.url,
        )

    def where(self, size: int = USUAL) -> Path:
        """Return the path to which ``get`` downloads it."""
        from polyclinic.data.cache import folder

        if self.link:
            return folder() / "downloads" / self.name
        return folder() / "downloads" / (f"{self.name}.npz" if size == USUAL else f"{self.name}_{size}.npz")


def list_datasets() -> tuple[Dataset, ...]:
    """Return all data sets, by name."""
    return tuple(_entries()[name] for name in sorted(_entries()))


def entry(name: str) -> Dataset:
    """Return the data set ``name``.

    Raises:
        DataError: If there is none, with the most similar name.
    """
    dataset = _entries().get(name)
    if dataset is None:
        near = difflib.get_close_matches(name, list(_entries()), 1, 0.6)
        also = f' Did you mean "{near[0]}"?' if near else " `polyclinic data list` shows them"
        raise DataError(f'no data set is called "{name}".{also}')
    return dataset


def show(name: str) -> tuple[tuple[str, str], ...]:
    """Return the description of a data set as headings and texts; the last is a ``[data]`` table to copy."""
    one = entry(name)
    pairs = [
        ("name", one.name),
        ("what", one.title),
        ("modality", one.modality),
        ("organ", one.organ),
        ("task", one.task),
        ("classes", ", ".join(one.classes)),
        ("sites", one.sites),
        ("size", one.size),
        ("license", one.license),
        ("cite", one.citation),
        ("from", one.url),
        ("get", one.get),
        ("study file", example(one)),
    ]
    return tuple((head, text) for head, text in pairs if text)


def example(one: Dataset) -> str:
    """Return a ``[data]`` table that uses the data set; empty if this version cannot read it."""
    if not one.kind:
        return ""
    lines = ["[data]", f'use = "{one.name}"']
    if not one.automatic and not one.embedded and one.kind != "nodules":
        lines.append(f'path = "/data/{one.name}"' + (f"   # the folder that holds {one.file}" if one.file else ""))
    if "simulate" in one.sites:
        partition = "iid" if one.task == "segmentation" else "dirichlet"
        lines.append(f'sites = {{partition = "{partition}", count = 4}}')
    if one.md5:
        lines.append('split = "official"')
    return "\n".join(lines)


def get(name: str, size: int = USUAL, base: str = ZENODO) -> Path:
    """Download a data set, unless it is present or does not permit it.

    Args:
        name: The data set.
        size: Pixels along each side of its images: 28, 64, 128 or 224 (3-D: 28 or 64).
        base: Address of the folder with the files, such as a mirror within a hospital.

    Returns:
        The path of the file.

    Raises:
        DataError: If it cannot be downloaded, with what to do instead.
    """
    from polyclinic.data.download import fetch

    one = entry(name)
    if not one.automatic:
        raise DataError(f"{name} cannot be fetched automatically. {one.get} License: {one.license}. See {one.url}")
    if one.link:
        return _archive(one, None if base == ZENODO else base)
    if size not in one.md5:
        raise DataError(f"{name} has no size {size}: choose {', '.join(map(str, one.md5))}")
    to = one.where(size)
    query = "?download=1" if base == ZENODO else ""
    return fetch(f"{base}{to.name}{query}", to, one.md5[size])


def resolve(name: str, path: str | None, own: Mapping[str, Any]) -> tuple[str, dict[str, Any], "Info"]:
    """Return the kind of source, its options and the description for a study's ``use = ...``.

    Args:
        name: The data set.
        path: The user's folder (or file), if given.
        own: Options that the study sets.

    Raises:
        DataError: If the data set is unknown, not present, or not readable by this version.
    """
    one, given = entry(name), dict(own)
    if not one.kind:
        raise DataError(f'"{name}" is listed with its recipe only; this version has no reader for it. {one.get}')
    if one.link and path is None:
        return one.kind, {**one.options, **given, "path": str(one.where() / one.inside)}, one.info
    if one.md5:
        size = given.pop("size", USUAL)
        if size not in one.md5:
            raise DataError(f"size = {size}: {name} comes in {', '.join(map(str, one.md5))} pixels")
        return one.kind, {**one.options, **given, "path": _medmnist(one, size, path)}, one.info
    if one.kind == "nodules":
        return one.kind, given if path is None else {**given, "path": path}, one.info
    if path is None and one.embedded:
        return one.kind, {**one.options, **given, "path": str(_embedded(one))}, one.info
    if path is None:
        raise DataError(
            f"{name} cannot be fetched automatically. {one.get} Then set path = the folder"
            + (f" that holds {one.file}" if one.file else "")
        )
    below = (
        path if not one.file or path.endswith((".csv", ".parquet", ".gz", ".npz")) else f"{path.rstrip('/')}/{one.file}"
    )
    return one.kind, {**one.options, **given, "path": below}, one.info


def _embedded(one: Dataset) -> Path:
    """Return the path of the file that is part of this package."""
    return Path(str(resources.files("polyclinic.data.catalog").joinpath(one.embedded)))


def _archive(one: Dataset, base: str | None) -> Path:
    """Download an archive, unpack it, and delete it."""
    from polyclinic.data.archives import ENDINGS, unpack
    from polyclinic.data.download import fetch

    home, name = one.where(), one.link.partition("?")[0].rpartition("/")[2]
    if not home.is_dir():
        kind = next(ending for ending in ENDINGS if name.endswith(ending))
        packed = fetch(one.link if base is None else base + name, home.with_name(home.name + kind), one.checksum)
        unpack(packed, home)
        packed.unlink()
    return home


def _medmnist(one: Dataset, size: int, path: str | None) -> str:
    """Return the path of the archive: in the user's folder, the user's own file, or where ``get`` stores it."""
    if path is None:
        return str(one.where(size))
    return path if path.endswith(".npz") else f"{path.rstrip('/')}/{one.where(size).name}"


@cache
def _entries() -> dict[str, Dataset]:
    entries = {}
    for name, values in _read("dataset_catalog.toml").items():
        entries[name] = Dataset(name, **{**values, "classes": tuple(values.get("classes", ()))})
        entries[name] = dataclasses.replace(entries[name], get=" ".join(entries[name].get.split()))
    for name, values in _read("decathlon.toml").items():
        entries[name] = Dataset(
            name,
            **{**values, "classes": tuple(values["classes"])},
            task="segmentation",
            license="CC BY-SA 4.0",
            citation=DECATHLON,
            url="http://medicaldecathlon.com/",
            kind="pairs",
            link=f"{MONAI}{values['inside']}.tar",
            get=f"`polyclinic data get {name}` ({values['inside']}.tar).",
        )
    for name, values in _read("medmnist.toml").items():
        values.pop("channels")
        md5 = {int(k): v for k, v in values.pop("md5").items()}
        entries[name] = Dataset(
            name,
            **{**values, "classes": tuple(values["classes"])},
            md5=md5,
            sites="none: simulate sites",
            citation=MEDMNIST,
            url="https://medmnist.com/",
            kind="npz",
            get=f"`polyclinic data get {name}` (Zenodo record 10519652; sizes {', '.join(map(str, md5))}).",
        )
    return entries


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("polyclinic.data.catalog").joinpath(name).read_text(encoding="utf-8"))
