"""``polyclinic compare``, ``panel`` and ``export``: what to make of finished runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from polyclinic.cli.rendering import console

if TYPE_CHECKING:
    from polyclinic.evaluation.run_comparison import Panel


def compare(run_folders: list[Path], *, reference: str = "", json_: bool = False) -> None:
    """Compare the methods of several runs with one of them, on the same test patients, paired.

    Args:
        run_folders: Runs of the same task on the same patients.
        reference: RUN/METHOD to compare with; by default the one that the first run's report speaks of.
        json_: Print JSON instead.
    """
    from polyclinic.evaluation.run_comparison import compare as compared

    rows = compared(run_folders, reference)
    if json_:
        print(json.dumps([asdict(row) for row in rows], indent=1, default=str))
        return
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference.value:+.3f}"
        told = f"  {row.run:<28} {row.method:<18} {_number(row.mean.value):>7}  {difference:>7}  {row.verdict}"
        console.print(told, soft_wrap=True)


panel_app = App(name="panel", help="Rank methods over several data sets.")


@panel_app.default
def panel(run_folders: list[Path]) -> None:
    """Methods over data sets: one run for each, ranked, with the critical difference.

    Args:
        run_folders: Runs with methods in common; their data, tasks and metrics may differ.
    """
    from polyclinic.evaluation.run_comparison import panel as made

    show_panel(made(run_folders))


@panel_app.command(name="run")
def panel_run(
    study: Path,
    *,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    resume: bool = False,
    fresh: bool = False,
    out: Path = Path("runs"),
    workers: int | None = None,
) -> None:
    """Run every data set of a file with its methods, and rank them.

    The file holds a scenario for each data set (examples/panel.toml). One that names no methods is run with every
    method that fits its task, its network and its training; those that do not are told, with the reason.

    Args:
        study: The file.
        set_: Change one value in every scenario, such as `--set rounds=5`.
        resume: Go on where an earlier run stopped.
        fresh: Begin again.
        out: Where run folders are kept.
        workers: How many processes; as many as there are cores by default.
    """
    from polyclinic.cli.run import changes, run_all
    from polyclinic.studies.config.compatible_methods import with_every_method
    from polyclinic.studies.config.scenarios import read_all

    run_all(study, read_all(study, changes(set_ or []), with_every_method), resume, fresh, out, workers)


def show_panel(found: "Panel") -> None:
    """Prints methods over data sets."""
    wide = max(14, *(len(method) + 2 for method in found.methods))
    console.print("  " + " " * 30 + "".join(f"{method:>{wide}}" for method in found.methods), soft_wrap=True)
    for run, values in zip(found.runs, found.values, strict=True):
        console.print(f"  {run:<30}" + "".join(f"{_number(value):>{wide}}" for value in values), soft_wrap=True)
    for method, (better, worse) in found.gains.items():
        console.print(f"  {method}: better than training alone at {better} sites, worse at {worse}", soft_wrap=True)
    if found.ranking is None:
        console.print("  [dim]Three runs and three methods are needed for a ranking.[/dim]")
        return
    r = found.ranking
    ranks = ", ".join(f"{m} {rank:.2f}" for m, rank in zip(r.methods, r.ranks, strict=True))
    console.print(f"  mean ranks over {r.blocks} data sets: {ranks}", soft_wrap=True)
    console.print(f"  critical difference {r.critical:.2f}; Friedman p = {r.p:.3g}", soft_wrap=True)


def export(
    run_folder: Path,
    out: Path,
    *,
    form: Literal["safetensors", "onnx", "pt2", "bundle"] = "bundle",
    method: str = "",
    seed: int | None = None,
) -> None:
    """Write a run's model in a form that other tools open.

    Args:
        run_folder: A finished run.
        out: The file, or for a bundle the folder, to write.
        form: A MONAI bundle, ONNX, torch.export or plain tensors.
        method: Which method's model; by default the one that the report speaks of.
        seed: Which seed's; by default the first.
    """
    from polyclinic.studies.export.model_export import export as write

    console.print(f"  [green]✓[/green] {write(run_folder, form, out, method, seed)}")


def track(run_folder: Path, *, to: Literal["mlflow", "tensorboard"], where: str = "") -> None:
    """Hand the records of a run on to MLflow or TensorBoard.

    Args:
        run_folder: A run, finished or not.
        to: The tool.
        where: MLflow: a tracking address, by default the file mlflow.db beside the run. TensorBoard: a folder.
    """
    from polyclinic.studies.export.tracking import track as hand_on

    console.print(f"  [green]✓[/green] {hand_on(run_folder, to, where)}")


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
