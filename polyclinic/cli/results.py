"""``polyclinic compare``, ``panel``, ``export``, ``explain`` and ``track``: uses of finished runs."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from polyclinic.cli.panel_table import number, panel_json, show_panel
from polyclinic.cli.rendering import Json, document, done, line
from polyclinic.cli.run import Set, changes, require_file, run_all


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
