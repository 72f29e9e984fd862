"""Uses of finished runs: ``compare``, ``plan-size``, ``panel``, ``export``, ``explain``, ``pictures`` and ``track``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from polyclinic.cli.panel_table import number, panel_json, show_panel
from polyclinic.cli.rendering import Json, document, done, line
from polyclinic.cli.run import Set, changes, require_file, run_all
from polyclinic.errors import ConfigError

if TYPE_CHECKING:
    from polyclinic.evaluation.study_size import Pilot


def compare(run_folders: list[Path], *, reference: str = "", json_: Json = False) -> None:
    """Compare the methods of several runs with one of them, paired by test patient.

    Args:
        run_folders: Runs of the same task on the same patients.
        reference: RUN/METHOD to compare with; by default the main method of the first run's report.
    """
    from polyclinic.evaluation.run_comparison import compare as compared

    with document(json_) as emit:
        rows = compared(run_folders, reference)
        emit(rows)
        line(f"  {'run':<28} {'method':<18} {'mean':>7}  {'diff':>7}  result")
        for row in (row for row in rows if not row.declared):
            difference = "" if row.difference is None else f"{row.difference.value:+.3f}"
            line(f"  {row.run:<28} {row.method:<18} {number(row.mean.value):>7}  {difference:>7}  {row.verdict}")
        for row in (row for row in rows if row.declared and row.difference is not None):
            d = row.difference
            assert d is not None
            margin = "" if d.margin is None else f", margin {d.margin:g}"
            line(f"  declared: {row.run}/{row.method} and {row.reference}, {d.question}{margin}: {row.verdict}")


def plan_size(
    run_folder: Path | None = None,
    *,
    kind: Literal["difference", "non-inferiority", "equivalence"] = "difference",
    difference: float = 0.0,
    margin: float | None = None,
    power: float = 0.8,
    sites: list[int] | None = None,
    seeds: int = 1,
    method: str = "",
    reference: str = "",
    sd: float | None = None,
    seed_sd: float | None = None,
    auc: float | None = None,
    correlation: float = 0.5,
    prevalence: float = 0.5,
    disagreement: float | None = None,
    json_: Json = False,
) -> None:
    """Plan how many test patients and sites would show a difference, non-inferiority or equivalence of two methods.

    The variation comes from a pilot run, or from one assumption: --sd, --auc or --disagreement. Values are in units of
    the metric: 0.02 is two points of AUC.

    Args:
        run_folder: A pilot run with both methods.
        kind: What is to be shown.
        difference: The true difference; for non-inferiority and equivalence the one that is assumed, 0 by default.
        margin: The margin of non-inferiority or equivalence.
        power: The probability of showing it.
        sites: Numbers of sites to plan for; by default 3, 5, 10 and that of the pilot.
        seeds: Training seeds of the planned study.
        method: The method in the pilot; by default the first that is not the reference.
        reference: The method that it is compared with; by default FedAvg.
        sd: Standard deviation of one patient's difference, for metrics that are means over patients.
        seed_sd: Standard deviation of the difference between seeds; by default the pilot's.
        auc: The AUC of the methods, if it is the metric.
        correlation: Correlation of the two AUCs, with --auc.
        prevalence: Fraction of positive patients, with --auc.
        disagreement: Fraction of patients that only one of the methods classifies correctly, if accuracy is the metric.
    """
    from polyclinic.evaluation import study_size
    from polyclinic.statistics import power as powers

    given = {"a run": run_folder, "--sd": sd, "--auc": auc, "--disagreement": disagreement}
    problems = [
        *_size_problems(kind, difference, margin, power, sites or [], seeds),
        *_assumption_problems([name for name, value in given.items() if value is not None]),
        *_range_problems({"--sd": sd, "--seed-sd": seed_sd}, 0, math.inf),
        *_range_problems({"--auc": auc, "--prevalence": prevalence, "--disagreement": disagreement}, 0, 1),
        *_range_problems({"--correlation": correlation}, -1, 1),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    with document(json_) as emit:
        found = study_size.pilot(run_folder, method, reference) if run_folder is not None else None
        if found is not None:
            variance = study_size.of_pilot(found)
        elif auc is not None:
            variance = powers.of_auc(auc, correlation, prevalence)
        elif disagreement is not None:
            variance = powers.of_accuracy(disagreement, difference)
        else:
            variance = powers.by_patient(sd or 0.0)
        between = seed_sd if seed_sd is not None else found.planned_seed_sd if found is not None else 0.0
        numbers = sorted({*(sites or [3, 5, 10, *([found.sites] if found is not None else [])])})
        plans = study_size.sizes(variance, kind, difference, margin, numbers, seeds, between, power)
        notes = _size_notes(found, seeds, between)
        emit(
            {"kind": kind, "difference": difference, "margin": margin, "power": power, "seeds": seeds}
            | {"seed_sd": between, "pilot": found, "plans": plans, "notes": notes}
        )
        line(f"  {'sites':>5}  {'test patients at each site':>26}  {'in all':>7}  {'power':>5}")
        for one in plans:
            if one.patients_per_site is None:
                line(f"  {one.sites:>5}  {one.why}")
            else:
                line(f"  {one.sites:>5}  {one.patients_per_site:>26}  {one.patients:>7}  {one.power:>5.2f}")
        for note in notes:
            line(f"  {note}")


def _size_problems(
    kind: str, difference: float, margin: float | None, power: float, sites: list[int], seeds: int
) -> list[str]:
    problems = []
    if kind == "difference" and margin is not None:
        problems.append("--margin is for --kind non-inferiority or equivalence")
    if kind == "difference" and difference == 0:
        problems.append("--difference: give the difference to be shown, such as 0.02 for two points")
    if kind != "difference" and (margin is None or not 0 < margin < math.inf):
        problems.append(f"--margin: {kind} needs a positive margin, such as 0.02 for two points")
    if margin is not None and kind == "equivalence" and abs(difference) >= margin:
        problems.append(f"--difference {difference:g} lies beyond the margin {margin:g}: equivalence cannot be shown")
    if margin is not None and kind == "non-inferiority" and difference <= -margin:
        problems.append(f"--difference {difference:g} lies beyond the margin {margin:g}: it cannot be shown")
    if not math.isfinite(difference):
        problems.append("--difference: give a finite number")
    if not 0.05 < power < 1:
        problems.append(f"--power {power:g}: give a probability between 0.05 and 1, such as 0.8")
    problems += [f"--sites {k}: give numbers of at least 1" for k in sites if k < 1]
    return problems + ([f"--seeds {seeds}: give a number of at least 1"] if seeds < 1 else [])


def _assumption_problems(given: list[str]) -> list[str]:
    if not given:
        return ["give a pilot run, or one of --sd, --auc and --disagreement"]
    return [f"{' and '.join(given)}: give only one source of the variation"] if len(given) > 1 else []


def _range_problems(values: dict[str, float | None], low: float, high: float) -> list[str]:
    limits = "a positive number" if high == math.inf else f"a number between {low} and {high}"
    return [f"{k} {v:g}: give {limits}" for k, v in values.items() if v is not None and not low < v < high]


def _size_notes(found: "Pilot | None", seeds: int, seed_sd: float) -> list[str]:
    notes = ["Patients are those of test sets. More training patients change the models, which is not planned here."]
    if found is not None:
        notes.append(
            f"Pilot: {found.patients} test patients at {found.sites} sites; SD of a patient's difference "
            f"{found.sd:.3g}, planned with its upper 80 % limit {found.planned_sd:.3g}."
        )
    if seeds == 1:
        notes.append("One seed: the result holds for one trained model of each method, not for training in general.")
    elif seed_sd == 0:
        notes.append("The variation between seeds is assumed to be 0: give --seed-sd, or a pilot with several seeds.")
    else:
        notes.append(f"SD between seeds: {seed_sd:.3g}.")
    return notes


panel_app = App(name="panel", help="Rank methods over several data sets.")


@panel_app.default
def panel(run_folders: list[Path], *, json_: Json = False) -> None:
    """Rank methods over several data sets, one run for each, with the critical difference.

    Args:
        run_folders: Runs with methods in common; their data, tasks and metrics may differ.
    """
    from polyclinic.evaluation.run_comparison import panel as made

    with document(json_) as emit:
        table = made(run_folders)
        emit(panel_json(table))
        show_panel(table)


@panel_app.command(name="run")
def panel_run(
    study: Path,
    *,
    set_: Set = None,
    resume: bool = False,
    fresh: bool = False,
    out: Path = Path("runs"),
    workers: int | None = None,
    json_: Json = False,
) -> None:
    """Run every data set of a file with its methods, and rank the methods.

    The file holds a scenario for each data set (examples/panel.toml). A scenario that names no methods is run with
    every method that fits its task, network and training; the others are listed with the reason.

    Args:
        study: The file.
        set_: Change one value in every scenario, such as `--set rounds=5`.
        resume: Continue an earlier run of the same file.
        fresh: Delete earlier runs of the same file and start again.
        out: Folder of the run folders.
        workers: Number of processes; the number of cores by default.
    """
    from polyclinic.studies.config.compatible_methods import with_every_method
    from polyclinic.studies.config.scenarios import read_all

    require_file(study)
    with document(json_) as emit:
        scenarios = read_all(study, changes(set_ or []), with_every_method)
        emit(run_all(study, scenarios, resume, fresh, out, workers))


def export(
    run_folder: Path,
    out: Path,
    *,
    form: Literal["safetensors", "onnx", "pt2", "bundle", "peft"] = "bundle",
    method: str = "",
    seed: int | None = None,
    json_: Json = False,
) -> None:
    """Write a run's model in a format of other tools.

    Args:
        run_folder: A finished run.
        out: The file to write, or the folder for a bundle.
        form: A MONAI bundle, ONNX, torch.export or plain tensors.
        method: The method whose model is exported; by default the main method of the report.
        seed: The seed whose model is exported; the first by default.
    """
    from polyclinic.studies.export.model_export import export as write

    with document(json_) as emit:
        path = write(run_folder, form, out, method, seed)
        done(str(path))
        emit({"run": run_folder, "form": form, "path": path})


def track(run_folder: Path, *, to: Literal["mlflow", "tensorboard"], where: str = "", json_: Json = False) -> None:
    """Copy the records of a run to MLflow or TensorBoard.

    Args:
        run_folder: A run, finished or not.
        to: The tool.
        where: For MLflow a tracking address, by default the file mlflow.db next to the run folder. For TensorBoard a
            folder.
    """
    from polyclinic.studies.export.tracking import track as copy

    with document(json_) as emit:
        place = copy(run_folder, to, where)
        done(str(place))
        emit({"run": run_folder, "tool": to, "where": place})


def explain(run_folder: Path, *, method: str = "", seed: int | None = None, json_: Json = False) -> None:
    """Compute attribution maps of a run's model at every site, and their agreement; the report shows them.

    Each map is a mean over at least ten validation patients of a site, computed at the site; no map of a single patient
    leaves it. Needs captum: pip install 'polyclinic[explain]'.

    Args:
        run_folder: A finished run, with its data still in place.
        method: The method whose model is explained; by default the main method of the report.
        seed: The seed whose model is explained; the first by default.
    """
    from polyclinic.evaluation.records.run_reader import read_run
    from polyclinic.studies.records.saliency_maps import read_explanation
    from polyclinic.studies.run.model_explanation import explain as ask

    with document(json_) as emit:
        file, refused = ask(run_folder, method, seed)
        maps = read_explanation(read_run(run_folder), file.parent.name.rsplit("-seed", 1)[0])
        assert maps is not None
        agreement = {site: (maps.agreement(site), maps.unlearned(site)) for site in maps.maps}
        line(f"  {maps.method}, seed {maps.seed}: rank correlation of attribution maps")
        for site, (others, untrained) in agreement.items():
            values = f"with the other sites {number(others)}, with the untrained model {number(untrained)}"
            line(f"    {site:<24} {values}")
        for site, reason in refused.items():
            line(f"    {site:<24} no map: {reason}")
        done(f"{file}; polyclinic report {run_folder} shows it")
        emit(
            {
                "method": maps.method,
                "seed": maps.seed,
                "agreement": {s: {"other_sites": a, "untrained": b} for s, (a, b) in agreement.items()},
                "refused": refused,
                "path": file,
            }
        )


def pictures(run_folder: Path, *, method: str = "", seed: int | None = None, json_: Json = False) -> None:
    """Draw the best, median and worst test case of every site, with outlines of truth and prediction, for the report.

    For segmentation. The report then contains slices of patients: consider who receives it.

    Args:
        run_folder: A finished run, with its data still in place.
        method: The method whose model is used; by default the main method of the report.
        seed: The seed whose model is used; the first by default.
    """
    from polyclinic.studies.run.case_pictures import draw

    with document(json_) as emit:
        file, refused = draw(run_folder, method, seed)
        for site, reason in refused.items():
            line(f"    {site:<24} no pictures: {reason}")
        done(f"{file}; polyclinic report {run_folder} shows them")
        emit({"refused": refused, "path": file})
