"""``polyclinic data``: public data sets, and the preparation of a hospital's own data."""

import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from polyclinic.cli.rendering import Json, console, document, done, hint, line
from polyclinic.cli.run import Set, changes, data_changes, require_file
from polyclinic.core import atomic
from polyclinic.errors import ConfigError

app = App(name="data", help="Find public data sets, and check, plan and de-identify your own data.")


@app.command(name="list")
def list_(*, json_: Json = False) -> None:
    """List the data sets that a study can name with `use`."""
    from polyclinic.data.catalog.dataset_catalog import list_datasets

    with document(json_) as emit:
        sets = list_datasets()
        emit([asdict(one) for one in sets])
        for one in sets:
            access = "[green]fetched by `data get`[/green]" if one.automatic else "[dim]by hand[/dim]"
            about = f"{one.title} [dim]{one.modality}, {one.task}, {one.license}[/dim]"
            console.print(f"  [cyan]{one.name:<22}[/cyan] {about} {access}", soft_wrap=True)
    if not json_:
        hint("\npolyclinic data show NAME explains how to get and use one.")


@app.command
def show(name: str, *, json_: Json = False) -> None:
    """Show what a data set contains, its license, how to get it, and the lines for a study file.

    Args:
        name: The name, as in `polyclinic data list`.
    """
    from polyclinic.data.catalog.dataset_catalog import show as described

    with document(json_) as emit:
        facts = described(name)
        emit(dict(facts))
        for head, text in facts:
            console.print(f"[bold]{head:<11}[/bold]", end=" ")
            line(text.replace("\n", "\n" + " " * 12))


@app.command
def get(name: str, *, size: int = 28, mirror: str | None = None, json_: Json = False) -> None:
    """Download a data set that allows it, and verify its published checksum. An interrupted download continues.

    Args:
        name: The name, as in `polyclinic data list`.
        size: Pixels along each side, for MedMNIST: 28, 64, 128 or 224.
        mirror: Address of a folder that holds the same files, such as one within a hospital.
    """
    from polyclinic.data.catalog import dataset_catalog

    with document(json_) as emit:
        path = dataset_catalog.get(name, size, mirror or dataset_catalog.ZENODO)
        line(str(path))
        emit({"name": name, "path": path})


@app.command
def check(
    folder: Path,
    *,
    page: Path | None = None,
    labels: tuple[int, ...] = (),
    allow_health: bool = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check a hospital's data before it joins: contents, errors, and personal information. Exit code 1 means errors.

    Args:
        folder: Images by class, nnU-Net, BIDS or DICOM folders, a manifest, an archive or a table.
        page: Write an HTML page with thumbnails and histograms. It contains patients' images: keep it at this site.
        labels: The values that masks may have.
        allow_health: Treat suspected personal information as a warning instead of an error.
        set_: Set one key of `[data]` as a study would, such as `--set data.fill=0`, `data.ignore=255`,
            `data.regions=[1,2]`, `data.geometry_tolerance_mm=0.1` or `data.series.description="T1*"`. May be given
            several times.
    """
    from polyclinic.data.quality.quality_page import write_page
    from polyclinic.data.quality.site_check import check_folder

    if page is not None and not page.resolve().parent.is_dir():
        raise ConfigError(f"--page {page}: there is no folder {page.parent}")
    given = data_changes(set_ or [])
    with document(json_) as emit:
        report = check_folder(str(folder), labels, "warning" if allow_health else "error", given=given)
        for text in report.lines():
            line(text)
        if page is not None:
            line(f"page for inspection (patients' images: keep it at this site): {write_page(report, page)}")
        counts = ("classes", "splits", "sites", "modalities", "orientations", "mask_labels")
        emit(
            {
                "ok": report.ok,
                "kind": report.kind,
                "examples": report.examples,
                "patients": report.patients,
                **{name: _counts(getattr(report, name)) for name in counts},
                "spacing_mm": report.spacing_mm,
                "sizes": report.sizes,
                "findings": report.findings,
                "recognized": report.why,
                "data": report.data,
                "page": page,
            }
        )
    if not report.ok:
        sys.exit(1)


def _counts(counter: Counter[Any]) -> dict[str, int]:
    return {str(key): count for key, count in sorted(counter.items(), key=lambda item: str(item[0]))}


@app.command
def segments(file: Path, *, json_: Json = False) -> None:
    """List the names in a DICOM segmentation or structure set, for `segments = [...]` in `[data]`.

    Args:
        file: A file of the modality SEG or RTSTRUCT.
    """
    from polyclinic.data.formats.dicom.segments import segments_of

    with document(json_) as emit:
        names = segments_of(file)
        for number, name in names.items():
            line(f"{number:>4}  {name}")
        emit({"file": file, "segments": {str(number): name for number, name in names.items()}})


def _plan_file(study: Path, out: Path | None, force: bool) -> Path:
    """Return the file to which the plan of ``study`` is written.

    Raises:
        ConfigError: If there is no such study, or the file exists and ``force`` is not given.
    """
    require_file(study)
    to = out or study.with_name(f"{study.stem}.plan.toml")
    require_file(to)
    if to.exists() and not force:
        raise ConfigError(f"{to} exists already; --force replaces it")
    return to


@app.command
def plan(
    study: Path,
    *,
    out: Path | None = None,
    seed: int | None = None,
    by_site: bool = False,
    force: bool = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Summarize a study's training data over its sites, and write a preprocessing plan to edit.

    The study then uses it with `plan = "FILE"` in `[data]`; `polyclinic data drift` compares later data with it.

    Args:
        study: The study file. Its `[data]` needs no steps yet.
        out: The file to write; by default NAME.plan.toml next to the study.
        seed: The seed of the split that defines the training data; the study's first seed by default.
        by_site: Also describe each site with at least 10 patients. The file then contains statistics of single sites.
        force: Replace an existing file.
        set_: Change one value of the study, such as `--set data.path=/data/new`. May be given several times.
    """
    from polyclinic.studies.config import study_config
    from polyclinic.studies.run.planning import plan as made

    to = _plan_file(study, out, force)
    with document(json_) as emit:
        config = study_config.read(study, changes(set_ or []))
        chosen = config.seeds[0] if seed is None else seed
        result = made(config.data, config.name, chosen, by_site)
        atomic.write(to, result.text())
        done(str(to))
        notes = [*result.why]
        if len(config.seeds) > 1:
            notes.append(
                f"made from the training rows of seed {chosen}; the study's other seeds use some of them as test rows"
            )
        for note in notes:
            line(f"    {note}")
        emit({"plan": to, "seed": chosen, "notes": notes})
        hint(f'    next: plan = "{to}" in [data], in place of steps or statistics')


def case_plan(
    study: Path,
    *,
    out: Path | None = None,
    preset: Literal["default", "resenc-m", "resenc-l", "resenc-xl"] = "default",
    memory_gb: float | None = None,
    configuration: Literal["3d_fullres", "3d_lowres", "3d_cascade_fullres", "2d"] | None = None,
    previous: Path | None = None,
    previous_method: str = "",
    channels: str = "",
    width: int = 32,
    seed: int | None = None,
    statistics: Path | None = None,
    force: bool = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Plan a segmentation study as nnU-Net does, from sums over its sites, and write the plan to edit.

    The study then takes preprocessing, patch, batch and network from it, with `plan = "FILE"` in `[data]` and
    `network = "nnunet"` (or `"resenc"`, of a preset that says so) in `[task]`.

    Args:
        study: The study file. Its `[data]` needs no steps yet.
        out: The file to write; by default NAME.plan.toml next to the study.
        preset: nnU-Net's plain U-Net, or one with a residual encoder for 8, 24 or 40 GB of GPU memory.
        memory_gb: GPU memory of the smallest machine, in place of the preset's.
        configuration: Full resolution, low resolution, full resolution after low resolution, or slices; by default full
            resolution, of images 2d.
        previous: For the cascade: the run of the low resolution, whose masks become inputs of the full resolution.
        previous_method: Label of its method; by default the main method of its report.
        channels: The name of each channel, such as `CT` or `T1,FLAIR`. `CT` is scaled by the values of all sites.
        width: Features of the network's finest stage. Fewer than 32, such as 8, make training on a CPU possible.
        seed: The seed of the split that defines the training data; the study's first seed by default.
        statistics: The checkpoint of a run of the method case-statistics between hospitals, in place of this machine's
            data.
        force: Replace an existing file.
        set_: Change one value of the study, such as `--set data.path=/data/new`. May be given several times.
    """
    from polyclinic.data.fingerprint.dataset_fingerprint import Numbered
    from polyclinic.studies.config import study_config
    from polyclinic.studies.inference.previous_stage import previous_stage
    from polyclinic.studies.run import case_planning

    to = _plan_file(study, out, force)
    if width < 1 or (memory_gb is not None and not 0 < memory_gb < math.inf):
        raise ConfigError("--width and --memory-gb need numbers above 0")
    with document(json_) as emit:
        config = study_config.read(study, {**changes(set_ or []), "data.plan": None})
        chosen = config.seeds[0] if seed is None else seed
        stage = None
        if previous is not None:
            info = None if statistics else Numbered(config.data.source()).info
            stage = previous_stage(previous, info, previous_method)
        made = case_planning.plan(
            config.data,
            config.name,
            chosen,
            [name.strip() for name in channels.split(",") if name.strip()],
            preset,
            memory_gb,
            configuration or "",
            width,
            None if statistics is None else case_planning.read_statistics(statistics),
            stage,
        )
        atomic.write(to, made.text)
        done(str(to))
        used = made.planned.low if made.configuration == "3d_lowres" else made.planned.full
        used = made.planned.slices if used is None else used
        line(f"    {made.configuration}: patch {list(used.patch)}, batch {used.batch_size}, {len(used.strides)} stages")
        notes = list(made.notes)
        if len(config.seeds) > 1 and statistics is None:
            notes.append(
                f"made from the training images of seed {chosen}; the study's other seeds use some of them as test "
                "images"
            )
        for note in notes:
            line(f"    {note}")
        emit({"plan": to, "seed": chosen, "configuration": made.configuration, "used": used, "notes": notes})
        hint(f'    next: plan = "{to}" in [data], and network = "{made.planned.network}" in [task]')


@app.command
def look(
    study: Path,
    *,
    out: Path | None = None,
    method: str = "",
    seed: int | None = None,
    images: int = 4,
    samples: int = 6,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Draw training samples as a study would, with its patches and augmentation, and write them as a picture.

    The picture shows patients' images: keep it at this site.

    Args:
        study: The study file.
        out: The PNG file to write; by default NAME.samples.png in this folder.
        method: The label of the method whose settings are used; the first by default.
        seed: The seed of the split and the samples; the study's first seed by default.
        images: The number of training images, taken from the sites in turn.
        samples: The number of samples of each image.
        set_: Change one value of the study, such as `--set augmentation.recipe=light`. May be given several times.
    """
    from polyclinic.studies.config import study_config
    from polyclinic.studies.run.sample_pictures import picture, sample_rows

    require_file(study)
    for name, number in (("--images", images), ("--samples", samples)):
        if not 1 <= number <= 50:
            raise ConfigError(f"{name} {number}: give a number from 1 to 50")
    with document(json_) as emit:
        config = study_config.read(study, changes(set_ or []))
        to = out or Path(f"{config.name}.samples.png")
        if to.is_dir() or not to.resolve().parent.is_dir():
            raise ConfigError(f"--out {to}: name a file in a folder that exists")
        rows, notes = sample_rows(config, method, seed, images, samples)
        atomic.write_private(to, picture(rows))
        done(f"{to} (patients' images: keep it at this site)")
        for note in notes:
            line(f"    {note}")
        emit({"picture": to, "images": [row.caption for row in rows], "samples": samples, "notes": notes})


@app.command
def drift(plan: Path, study: Path, *, set_: Set = None, json_: Json = False) -> None:
    """Compare new data with the training data, site by site, from sums alone. Exit code 1 means an alarm.

    Args:
        plan: The file that `polyclinic data plan` wrote from the training data.
        study: The study file. All examples of its `[data]` count as new, whatever their split.
        set_: Change one value of the study, such as `--set data.path=/data/2027`. May be given several times.
    """
    from polyclinic.data.fingerprint.preprocessing_plan import DataPlan
    from polyclinic.data.quality.drift import as_json, lines
    from polyclinic.studies.config import study_config
    from polyclinic.studies.run.planning import drifts

    require_file(study)
    with document(json_) as emit:
        sites = drifts(DataPlan.read(plan), study_config.read(study, changes(set_ or [])).data)
        emit([as_json(one) for one in sites])
        for one in sites:
            for text in lines(one):
                line(text)
    if any(one.alarm for one in sites):
        sys.exit(1)


@app.command
def duplicates(
    study: Path,
    *,
    checkpoint: Path | None = None,
    seed: int | None = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Count the images that pairs of sites share, by private set intersection. Exit code 1 means that some are shared.

    On one machine the sites of the study exchange the same messages as hospitals do, and every number is shown. Of a
    run between hospitals, numbers below 5 are hidden.

    Args:
        study: The study file.
        checkpoint: The checkpoint of a run of the method duplicate-search between hospitals, in place of this machine's
            data.
        seed: The seed of simulated sites; the study's first seed by default.
        set_: Change one value of the study, such as `--set data.path=/data/new`. May be given several times.
    """
    from polyclinic.studies.audits import duplicate_counts
    from polyclinic.studies.config import study_config

    require_file(study)
    with document(json_) as emit:
        config = study_config.read(study, changes(set_ or []))
        if checkpoint is None:
            state = duplicate_counts.search(config.data, config.seeds[0] if seed is None else seed)
        else:
            state = duplicate_counts.read(checkpoint)
        found = duplicate_counts.pairs(state, 0 if checkpoint is None else duplicate_counts.MIN_COUNT)
        emit([asdict(pair) for pair in found])
        for pair in found:
            line(f"    {pair.line()}")
    if any(pair.found for pair in found):
        sys.exit(1)


@app.command
def deidentify(
    source: Path,
    destination: Path,
    *,
    key: Path | None = None,
    approve: tuple[str, ...] = (),
    keep_characteristics: bool = False,
    json_: Json = False,
) -> None:
    """Copy a DICOM folder without information that identifies patients. Exit code 1 means that files were refused.

    No file is overwritten, and every written file is scanned at the end.

    Args:
        source: The folder to read.
        destination: A new folder.
        key: The file with this site's secret for pseudonyms, created if it is missing. Keep it apart from the data.
        approve: Modalities whose pixels a person has inspected, such as US.
        keep_characteristics: Keep age, size and weight.
    """
    from polyclinic.data.deidentification.folder_deidentification import default_key, deidentify_folder
    from polyclinic.data.deidentification.image_deidentification import Deidentification

    with document(json_) as emit:
        secret = key or default_key()
        released = deidentify_folder(
            str(source), str(destination), secret, Deidentification(approve, keep_characteristics)
        )
        for text in released.lines():
            line(text)
        emit(
            {
                "destination": released.destination,
                "key": released.key,
                "written": released.written,
                "patients": released.patients,
                "changed_elements": sum(released.removed.values()),
                "refused": [str(one) for one in released.refused],
                "not_copied": released.left,
            }
        )
    if released.refused:
        sys.exit(1)
