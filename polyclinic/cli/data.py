"""``polyclinic data``: what data sets there are, and what a hospital does with its own before it joins."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from cyclopts import App
from rich.console import Console
from rich.markup import escape

app = App(name="data", help="Data sets of the field, and the check of your own.")
console = Console(highlight=False)


@app.command(name="list")
def list_(*, json_: bool = False) -> None:
    """List the data sets that a study may name with `use`.

    Parameters
    ----------
    json_
        Print JSON instead.
    """
    from polyclinic.data.catalogue import list_datasets

    found = list_datasets()
    if json_:
        print(json.dumps([asdict(one) for one in found], indent=1, default=dict))
        return
    for one in found:
        how = "[green]fetched by `data get`[/green]" if one.automatic else "[dim]by hand[/dim]"
        told = f"  [cyan]{one.name:<22}[/cyan] {one.title} [dim]{one.modality}, {one.task}, {one.licence}[/dim] {how}"
        console.print(told, soft_wrap=True)
    console.print("\n[dim]polyclinic data show NAME tells how to get and how to use one.[/dim]")


@app.command
def show(name: str, *, json_: bool = False) -> None:
    """Tell what a data set is, its licence, how to get it, and what to write into a study file.

    Parameters
    ----------
    name
        As `polyclinic data list` says it.
    json_
        Print JSON instead.
    """
    from polyclinic.data.catalogue import show as told

    pairs = told(name)
    if json_:
        print(json.dumps(dict(pairs), indent=1))
        return
    for head, text in pairs:
        console.print(f"[bold]{head:<11}[/bold]", escape(text.replace("\n", "\n" + " " * 12)), soft_wrap=True)


@app.command
def get(name: str, *, size: int = 28, mirror: str | None = None) -> None:
    """Fetch a data set that allows it, with its published checksum. Going on after a break is automatic.

    Parameters
    ----------
    name
        As `polyclinic data list` says it.
    size
        Pixels along each side, where there are several: 28, 64, 128 or 224.
    mirror
        The address of a folder that holds the same files, such as one within a hospital.
    """
    from polyclinic.data import catalogue

    console.print(str(catalogue.get(name, size, mirror or catalogue.ZENODO)))


@app.command
def check(
    folder: Path, *, page: Path | None = None, labels: tuple[int, ...] = (), allow_health: bool = False
) -> None:  # fmt: skip
    """Check a hospital's data before it joins: what is there, what is wrong, what must not leave.

    Parameters
    ----------
    folder
        Images by class, nnU-Net, BIDS or DICOM folders, a manifest, an archive or a table.
    page
        Write a page to look at, with thumbnails and histograms. It holds patients' images and stays here.
    labels
        The values that masks may have.
    allow_health
        Treat suspected personal information as a warning instead of an error.
    """
    from polyclinic.data.check import check_command

    sys.exit(check_command(str(folder), str(page) if page else None, labels, allow_health, console.print))


@app.command
def deidentify(
    source: Path, destination: Path, *, key: Path | None = None, approve: tuple[str, ...] = (),
    keep_characteristics: bool = False,
) -> None:  # fmt: skip
    """Copy a DICOM folder without what identifies patients. Nothing is overwritten; every file is scanned at the end.

    Parameters
    ----------
    source
        The folder to read.
    destination
        A new folder.
    key
        The file with this site's secret for pseudonyms; made where it is missing, and kept apart from the data.
    approve
        Modalities whose pixels a person has looked at, such as US.
    keep_characteristics
        Keep age, size and weight.
    """
    from polyclinic.data.deidentify import deidentify_command

    given = str(key) if key else None
    sys.exit(deidentify_command(str(source), str(destination), given, approve, keep_characteristics, console.print))
