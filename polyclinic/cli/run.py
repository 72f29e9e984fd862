"""``polyclinic run``, ``demo``, ``new``, ``report`` and ``status``."""

import json
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polyclinic.cli.rendering import console, only_json
from polyclinic.core import atomic
from polyclinic.errors import RunError
from polyclinic.studies.run.cancellation import stopping

log = logging.getLogger(__name__)


def run(
    study: Path,
    *,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    resume: bool = False,
    fresh: bool = False,
    out: Path = Path("runs"),
    workers: int | None = None,
    json_: bool = False,
) -> None:
    """Run a study and write its report.

    SIGINT (Ctrl-C), SIGTERM and `polyclinic stop` end it after the round under way, and --resume goes on from there; a
    second signal ends it at once. Exit codes: 0 finished, 130 or 143 ended by a signal, 3 by `polyclinic stop`.

    Args:
        study: The study file; `polyclinic new` writes one.
        set_: Change one value, such as `--set training.lr=0.01`. May be given several times.
        resume: Go on where an earlier run of the same study stopped. The result is the same to the bit.
        fresh: Remove an earlier run of the same study and begin again.
        out: Where run folders are kept.
        workers: How many sites to run at once; as many as there are cores by default.
        json_: Print the folder, report and scores of each run as JSON. Progress goes to standard error.
    """
    if json_:
        only_json()
    from polyclinic.studies.config.loader import table_of, text_of

    given = changes(set_ or [])
    text = text_of(study)
    table_of(text, study, given)  # a file that is missing or not TOML is reported before PyTorch is loaded
    from polyclinic.studies.config.scenarios import parse_all

    again = repeated(study, set_ or [], out, workers)
    run_all(study, parse_all(text, study, given), resume, fresh, out, workers, again, json_)


def repeated(study: Path, changes_: Sequence[str], out: Path, workers: int | None, command: str = "run") -> str:
    """The command that continues a run, with the options that were given."""
    words = ["polyclinic", *command.split(), str(study)]
    words += [word for change in changes_ for word in ("--set", change)]
    words += ["--out", str(out)] if out != Path("runs") else []
    words += ["--workers", str(workers)] if workers is not None else []
    return shlex.join([*words, "--resume"])


def run_all(
    file: Path,
    found: Sequence[Any],
    resume: bool,
    fresh: bool,
    out: Path,
    workers: int | None,
    again: str = "",
    json_: bool = False,
) -> None:
    """Run every study of a file, and compare them if there are several. ``again`` is the command that resumes."""
    from polyclinic.studies.config.preflight import preflight

    preflight([scenario.study for scenario in found], out)
    again = again or repeated(file, (), out, workers)
    done = []
    for scenario in found:
        if scenario.name:
            console.print(f"\n[bold]── {scenario.name} ──[/bold]")
        for note in scenario.notes:
            console.print(f"  [yellow]·[/yellow] {note}", soft_wrap=True)
        done.append(_one(scenario, scenario.folder(out), resume, fresh, workers, again))
    if found[0].name:
        _beside_each_other(out / found[0].study.name, {s.name: s.folder(out) for s in found})
    if json_:
        print(json.dumps(done, indent=1))


def _one(scenario: Any, folder: Path, resume: bool, fresh: bool, workers: int | None, again: str) -> dict[str, Any]:
    """Run one study, write its report and return a summary of both."""
    from polyclinic.cli.progress import Display
    from polyclinic.studies.run.run_directory import RunHeld, Stopped, holder
    from polyclinic.studies.run.scheduler import run as run_study

    study = scenario.study
    if workers is not None:
        study = study.model_copy(update={"engine": study.engine.model_copy(update={"workers": workers})})
    there = (folder / "run.json").exists()
    if pid := holder(folder):
        raise RunHeld(f"{folder}: process {pid} works on this run. Wait for it, or stop it: polyclinic stop {folder}")
    if fresh and there:
        shutil.rmtree(folder)
    tested: list[dict[str, Any]] = []
    log.info("%s: run begins", folder)
    with stopping(folder, console) as signals:
        try:
            with Display(console, study) as display:
                for event in run_study(study, scenario.text, folder, resume):
                    display.show(event)
                    log.info("%s %s seed %s round %s", event.what, event.label, event.seed, event.round)
                    if event.what == "tested":
                        scores = _finite(event.scores)
                        tested.append({"method": event.label, "seed": event.seed, "fold": event.fold, "scores": scores})
        except (KeyboardInterrupt, Stopped):
            console.print(f"\nStopped. Everything up to the last round is saved. To continue: {again}", markup=False)
            sys.exit(signals.code)
    return {"run": str(folder), "metric": study.metric, "tested": tested, "report": str(_report(folder))}


def _finite(scores: Any) -> dict[str, float | None]:
    return {site: float(score) if math.isfinite(score) else None for site, score in scores.items()}


def stop(run_folder: Path) -> None:
    """Stop a run after the round under way. `polyclinic run --resume` goes on from there.

    Args:
        run_folder: A folder that `polyclinic run` made.
    """
    from polyclinic.studies.run.run_directory import ask_to_stop

    if pid := ask_to_stop(run_folder):
        console.print(f"asked    process {pid} to stop after the round under way")
        return
    console.print(f"{run_folder}: no process works on a run there")
    sys.exit(1)


def _beside_each_other(folder: Path, runs: dict[str, Path]) -> None:
    """Writes and shows the table of methods by scenarios."""
    from polyclinic.cli.results import show_panel
    from polyclinic.evaluation.run_comparison import panel, write_panel

    found = panel(list(runs.values()), names=list(runs))
    console.print()
    show_panel(found)
    console.print(f"  [green]✓[/green] {write_panel(found, folder)}")


def demo(*, out: Path = Path("runs"), resume: bool = False, fresh: bool = False, workers: int | None = None) -> None:
    """Run a small study of real patients, and write its report.

    Lung nodules of the LIDC-IDRI patients, as radiologists outlined them: is it malignant? The sites are groups of
    scanning protocols. Six methods, side by side, in a few minutes on two cores.

    Args:
        out: Where run folders are kept.
        resume: Go on where an earlier demo stopped.
        fresh: Begin again.
        workers: How many sites to run at once.
    """
    study = out / "demo.toml"
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(study, template("demo"))
    run(study, resume=resume, fresh=fresh or not resume, out=out, workers=workers)
    console.print(f"  next: look into [bold]{study}[/bold], change it, and [bold]polyclinic run {study}[/bold]")


def new(file: Path = Path("study.toml"), *, force: bool = False) -> None:
    """Write a commented study file to begin from.

    Args:
        file: Where to write it.
        force: Replace a file that is there.
    """
    if file.exists() and not force:
        console.print(f"{file} is there already; --force replaces it")
        sys.exit(2)
    atomic.write(file, template("study"))
    console.print(f"{file} written. Next: [bold]polyclinic run {file}[/bold]")


def report(run_folder: Path, *, min_cell: int = 0, draws: int = 2000, level: float = 0.95, json_: bool = False) -> None:
    """Write the report of a run: one HTML file, and its tables as CSV and JSON beside it.

    Args:
        run_folder: A folder that `polyclinic run` made.
        min_cell: Show no site by itself that has fewer test patients than this, and no smaller group of patients.
        draws: Of the bootstrap.
        level: Of the intervals' confidence.
        json_: Print the report's path as JSON.
    """
    if json_:
        only_json()
    page = _report(run_folder, min_cell, draws, level)
    if json_:
        print(json.dumps({"run": str(run_folder), "report": str(page)}, indent=1))


def _report(run_folder: Path, min_cell: int = 0, draws: int = 2000, level: float = 0.95) -> Path:
    """Write a report and return its path."""
    from polyclinic.evaluation.run_evaluation import Options
    from polyclinic.report.report_builder import build_report

    page = build_report(run_folder, options=Options(level=level, draws=draws, min_cell=min_cell))
    console.print(f"  [green]✓[/green] {page}")
    return page


def status(run_folder: Path, *, json_: bool = False) -> None:
    """Show how far a run has come.

    Args:
        run_folder: A folder that `polyclinic run` made, or the folder around a file's scenarios.
        json_: Print JSON instead.
    """
    runs = [run_folder]
    if not (run_folder / "run.json").is_file():
        runs = sorted(path.parent for path in run_folder.glob("*/run.json"))
    if not runs:
        raise RunError(f"{run_folder}: this is not a run folder; it has no run.json. `polyclinic run` makes one")
    found = [_standing(folder) for folder in runs]
    if json_:
        print(json.dumps(found, indent=1))
        return
    for one in found:
        if len(found) > 1 or runs != [run_folder]:
            console.print(f"[bold]{Path(one['run']).name}[/bold]")
        if one["process"]:
            console.print(f"  process {one['process']} works on it")
        for arm in one["methods"]:
            where = "" if arm["fold"] is None else f" fold {arm['fold']:<2}"
            console.print(f"  {arm['method']:<20} seed {arm['seed']:<4}{where} {arm['status']}")


def _standing(run_folder: Path) -> dict[str, Any]:
    """How far one run has come, as JSON."""
    from pydantic import ValidationError

    from polyclinic.evaluation.records.record_schema import RunInfo, arm_names, record_files
    from polyclinic.studies.run.run_directory import holder

    try:
        info = RunInfo.model_validate_json((run_folder / "run.json").read_bytes())
    except ValidationError:
        raise RunError(f"{run_folder}/run.json: damaged, or not written by this version. Run the study anew") from None
    arms = arm_names(info)
    done: dict[tuple[str, int, int], str] = {}
    for file in record_files(run_folder, [name for *_, name in arms]):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                fact = json.loads(line)
                arm = fact["method"], fact["seed"], fact.get("fold", 0)
                if fact["kind"] == "round":
                    done[arm] = f"round {fact['round']} of {info.rounds}"
                elif fact["kind"] == "sealed":
                    done[arm] = "tested"
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{file}:{number}: damaged. Run the study anew, or restore the file") from None
    methods = []
    for label, seed, fold, name in arms:
        says = done.get((label, seed, fold), f"round 0 of {info.rounds}")
        if trials := len(list((run_folder / "arms" / name / "trials").glob("*"))):
            says = f"trial {trials} of its search"
        methods.append({"method": label, "seed": seed, "fold": fold if info.folds else None, "status": says})
    return {"run": str(run_folder), "process": holder(run_folder) or None, "methods": methods}


def template(name: str) -> str:
    """A study file that comes with Polyclinic."""
    return files("polyclinic.studies").joinpath(f"templates/{name}.toml").read_text(encoding="utf-8")


def changes(items: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; a value is read as TOML, and as text where it is none."""
    import tomllib

    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            console.print(f"--set {item}: write it as key=value, such as training.lr=0.01")
            sys.exit(2)
        try:
            found[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
