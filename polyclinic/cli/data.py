"""``polyclinic data``: what data sets there are, and what a hospital does with its own before it joins."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.markup import escape

from polyclinic.cli.rendering import console
from polyclinic.cli.run import changes
from polyclinic.core import atomic

app = App(name="data", help="Data sets of the field, and the check of your own.")


def _line(text: str) -> None:
    """A line as it is: brackets are no markup, and nothing is broken in two."""
    console.print(text, markup=False, soft_wrap=True)


@app.command(name="list")
def list_(*, json_: bool = False) -> None:
    """List the data sets that a study may name with `use`.

    Args:
        json_: Print JSON instead.
    """
    from polyclinic.data.catalog.dataset_catalog import list_datasets

    found = list_datasets()
    if json_:
        print(json.dumps([asdict(one) for one in found], indent=1, default=dict))
        return
    for one in found:
        how = "[green]fetched by `data get`[/green]" if one.automatic else "[dim]by hand[/dim]"
        told = f"  [cyan]{one.name:<22}[/cyan] {one.title} [dim]{one.modality}, {one.task}, {one.license}[/dim] {how}"
        console.print(told, soft_wrap=True)
    console.print("\n[dim]polyclinic data show NAME tells how to get and how to use one.[/dim]")


@app.command
def show(name: str, *, json_: bool = False) -> None:
    """Tell what a data set is, its license, how to get it, and what to write into a study file.

    Args:
        name: As `polyclinic data list` says it.
        json_: Print JSON instead.
    """
    from polyclinic.data.catalog.dataset_catalog import show as told

    pairs = told(name)
    if json_:
        print(json.dumps(dict(pairs), indent=1))
        return
    for head, text in pairs:
        console.print(f"[bold]{head:<11}[/bold]", escape(text.replace("\n", "\n" + " " * 12)), soft_wrap=True)


@app.command
def get(name: str, *, size: int = 28, mirror: str | None = None) -> None:
    """Fetch a data set that allows it, with its published checksum. Going on after a break is automatic.

    Args:
        name: As `polyclinic data list` says it.
        size: Pixels along each side, for MedMNIST: 28, 64, 128 or 224.
        mirror: The address of a folder that holds the same files, such as one within a hospital.
    """
    from polyclinic.data.catalog import dataset_catalog

    _line(str(dataset_catalog.get(name, size, mirror or dataset_catalog.ZENODO)))


@app.command
def check(folder: Path, *, page: Path | None = None, labels: tuple[int, ...] = (), allow_health: bool = False) -> None:
    """Check a hospital's data before it joins: what is there, what is wrong, what must not leave.

    Args:
        folder: Images by class, nnU-Net, BIDS or DICOM folders, a manifest, an archive or a table.
        page: Write a page to look at, with thumbnails and histograms. It holds patients' images and stays here.
        labels: The values that masks may have.
        allow_health: Treat suspected personal information as a warning instead of an error.
    """
    from polyclinic.data.quality.quality_page import check_command

    sys.exit(check_command(str(folder), str(page) if page else None, labels, allow_health, _line))


@app.command
def plan(
    study: Path,
    *,
    out: Path | None = None,
    seed: int | None = None,
    by_site: bool = False,
    force: bool = False,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
) -> None:
    """Sum up a study's training data over its sites, and write the preprocessing that follows into a file to edit.

    The study then uses it with `plan = "FILE"` in `[data]`; `polyclinic data drift` compares later data with it.

    Args:
        study: The study file. Its `[data]` needs no steps yet.
        out: Where to write; by default beside the study, as NAME.plan.toml.
        seed: Whose split says what training data are; the study's first seed by default.
        by_site: Describe each site with at least 10 patients by itself as well. The sites' numbers are then in the
            file.
        force: Replace a file that is there.
        set_: Change one value of the study, such as `--set data.path=/data/new`. May be given several times.
    """
    from polyclinic.studies.config import study_config
    from polyclinic.studies.run.planning import plan as made

    to = out or study.with_name(f"{study.stem}.plan.toml")
    if to.exists() and not force:
        console.print(f"{escape(str(to))} is there already; --force replaces it", soft_wrap=True)
        sys.exit(2)
    checked = study_config.read(study, changes(set_ or []))
    chosen = checked.seeds[0] if seed is None else seed
    found = made(checked.data, checked.name, chosen, by_site)
    atomic.write(to, found.text())
    console.print(f"  [green]✓[/green] {escape(str(to))}", soft_wrap=True)
    for reason in found.why:
        console.print(f"    {escape(reason)}", soft_wrap=True)
    if len(checked.seeds) > 1:
        console.print(
            f"    [yellow]![/yellow] made from the training rows of seed {chosen}; the study's other "
            "seeds test on some of them",
            soft_wrap=True,
        )
    console.print(f'    next: plan = "{escape(str(to))}" in \\[data], in place of steps or statistics', soft_wrap=True)


@app.command
def drift(
    plan: Path,
    study: Path,
    *,
    json_: bool = False,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
) -> None:
    """Compare new data with those a model was trained on, site by site, by sums alone. Exit code 1 is an alarm.

    Args:
        plan: The file that `polyclinic data plan` wrote of the training data.
        study: The study file. All examples of its `[data]` count as new, whatever their split.
        json_: Print JSON instead.
        set_: Change one value of the study, such as `--set data.path=/data/2027`. May be given several times.
    """
    from polyclinic.data.fingerprint.preprocessing_plan import DataPlan
    from polyclinic.data.quality.drift import as_json, lines
    from polyclinic.studies.config import study_config
    from polyclinic.studies.run.planning import drifts

    found = drifts(DataPlan.read(plan), study_config.read(study, changes(set_ or [])).data)
    if json_:
        print(json.dumps([as_json(one) for one in found], indent=1))
    else:
        for one in found:
            for line in lines(one):
                console.print(escape(line), soft_wrap=True)
    sys.exit(any(one.alarm for one in found))


@app.command
def deidentify(
    source: Path,
    destination: Path,
    *,
    key: Path | None = None,
    approve: tuple[str, ...] = (),
    keep_characteristics: bool = False,
) -> None:
    """Copy a DICOM folder without what identifies patients. Nothing is overwritten; every file is scanned at the end.

    Args:
        source: The folder to read.
        destination: A new folder.
        key: The file with this site's secret for pseudonyms; made where it is missing, and kept apart from the data.
        approve: Modalities whose pixels a person has looked at, such as US.
        keep_characteristics: Keep age, size and weight.
    """
    from polyclinic.data.deidentification.folder_deidentification import deidentify_command

    given = str(key) if key else None
    sys.exit(deidentify_command(str(source), str(destination), given, approve, keep_characteristics, _line))
