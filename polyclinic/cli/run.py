"""``polyclinic run``, ``demo``, ``new``, ``report`` and ``status``."""

import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

console = Console(highlight=False)


def run(
    study: Path, *, set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    resume: bool = False, fresh: bool = False, out: Path = Path("runs"), workers: int | None = None,
) -> None:  # fmt: skip
    """Run a study and write its report.

    Parameters
    ----------
    study
        The study file; `polyclinic new` writes one.
    set_
        Change one value, such as `--set training.lr=0.01`. May be given several times.
    resume
        Go on where an earlier run of the same study stopped. The result is the same to the bit.
    fresh
        Remove an earlier run of the same study and begin again.
    out
        Where run folders are kept.
    workers
        How many sites to run at once; as many as there are cores by default.
    """
    from polyclinic.cli.progress import Display
    from polyclinic.studies import spec
    from polyclinic.studies.runner import run as run_study
    from polyclinic.studies.toml_text import dumps

    changes = _changes(set_ or [])
    checked = spec.read(study, changes)
    text = study.read_text(encoding="utf-8")
    if changes:
        text = f"# {study.name}, changed by {' '.join(f'--set {item}' for item in set_ or [])}\n" + dumps(
            checked.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        )
    if workers is not None:
        checked = checked.model_copy(update={"engine": checked.engine.model_copy(update={"workers": workers})})
    folder = out / f"{checked.name}-{checked.hash[:8]}"
    if fresh and (folder / "run.json").exists():
        shutil.rmtree(folder)
    try:
        with Display(console, checked) as display:
            for event in run_study(checked, text, folder, resume):
                display.show(event)
    except KeyboardInterrupt:
        console.print(f"\nStopped. Nothing is lost: [bold]polyclinic run {study} --resume[/bold] goes on from there.")
        sys.exit(130)
    report(folder)


def demo(*, out: Path = Path("runs"), resume: bool = False, fresh: bool = False, workers: int | None = None) -> None:
    """Run a small study of real patients, and write its report.

    Lung nodules of the LIDC-IDRI patients, as radiologists outlined them: is it malignant? The sites are groups of
    scanning protocols. Six methods, side by side, in a few minutes on two cores.

    Parameters
    ----------
    out
        Where run folders are kept.
    resume
        Go on where an earlier demo stopped.
    fresh
        Begin again.
    workers
        How many sites to run at once.
    """
    study = out / "demo.toml"
    out.mkdir(parents=True, exist_ok=True)
    study.write_text(template("demo"), encoding="utf-8")
    run(study, resume=resume, fresh=fresh or not resume, out=out, workers=workers)
    console.print(f"  next: look into [bold]{study}[/bold], change it, and [bold]polyclinic run {study}[/bold]")


def new(file: Path = Path("study.toml"), *, force: bool = False) -> None:
    """Write a commented study file to begin from.

    Parameters
    ----------
    file
        Where to write it.
    force
        Replace a file that is there.
    """
    if file.exists() and not force:
        console.print(f"{file} is there already; --force replaces it")
        sys.exit(2)
    file.write_text(template("study"), encoding="utf-8")
    console.print(f"{file} written. Next: [bold]polyclinic run {file}[/bold]")


def report(run_folder: Path) -> None:
    """Write the report of a run: one HTML file, and its tables as CSV and JSON beside it.

    Parameters
    ----------
    run_folder
        A folder that `polyclinic run` made.
    """
    from polyclinic.studies.report.build import build_report

    page = build_report(run_folder)
    console.print(f"  [green]✓[/green] {page}")


def status(run_folder: Path) -> None:
    """Show how far a run has come.

    Parameters
    ----------
    run_folder
        A folder that `polyclinic run` made.
    """
    import json

    if not (run_folder / "run.json").is_file():
        raise FileNotFoundError(f"{run_folder}: this is not a run folder; it has no run.json")
    info = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    done: dict[tuple[str, int], int] = {}
    tested = set[tuple[str, int]]()
    records = run_folder / "records.jsonl"
    for line in records.read_bytes().split(b"\n")[:-1] if records.exists() else []:
        fact = json.loads(line)
        if fact["kind"] == "round":
            done[fact["method"], fact["seed"]] = fact["round"]
        elif fact["kind"] == "sealed":
            tested.add((fact["method"], fact["seed"]))
    for method in info["methods"]:
        for seed in info["seeds"]:
            arm = method["label"], seed
            told = "tested" if arm in tested else f"round {done.get(arm, 0)} of {info['rounds']}"
            console.print(f"  {arm[0]:<20} seed {seed:<4} {told}")


def template(name: str) -> str:
    """A study file that comes with Polyclinic."""
    return files("polyclinic.studies").joinpath(f"templates/{name}.toml").read_text(encoding="utf-8")


def _changes(items: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; a value is read as TOML, and as text where it is none."""
    import tomllib

    changes: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            console.print(f"--set {item}: write it as key=value, such as training.lr=0.01")
            sys.exit(2)
        try:
            changes[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            changes[key] = value
    return changes
