"""``polyclinic run``, ``demo``, ``new``, ``report``, ``status``, ``stop`` and ``console``."""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape

from polyclinic.cli.panel_table import number, show_panel
from polyclinic.cli.rendering import Json, console, document, done, hint, line, progress, resume_command
from polyclinic.core import atomic
from polyclinic.errors import ConfigError, RunError
from polyclinic.studies.run.cancellation import stopping

log = logging.getLogger(__name__)
Set = Annotated[list[str] | None, Parameter(name="--set")]


def run(
    study: Path,
    *,
    set_: Set = None,
    resume: bool = False,
    fresh: bool = False,
    out: Path = Path("runs"),
    workers: int | None = None,
    address: str | None = None,
    profile: bool = False,
    json_: Json = False,
) -> None:
    """Run a study and write its report.

    SIGINT (Ctrl-C), SIGTERM and `polyclinic stop` end it after the current round, and --resume continues from there,
    unless the data have changed since the run began. A second signal ends it at once. Exit codes: 0 finished, 130 or
    143 ended by a signal, 3 by `polyclinic stop`.

    Args:
        study: The study file; `polyclinic new` writes one.
        set_: Change one value, such as `--set training.lr=0.01`. May be given several times.
        resume: Continue an earlier run of the same study. The result is bit-identical to an uninterrupted run.
        fresh: Delete an earlier run of the same study and start again, once the study and its data are checked.
        out: Folder of the run folders.
        workers: Number of sites that are computed at once; the number of cores by default.
        address: Run on a Ray cluster: `auto` for the one on this machine, `local` to start one, or the address of its
            head, such as `10.0.0.1:6379`. The same as `--set engine.kind=ray --set engine.address=...`.
        profile: Show at the end where the time went, by phase, method and site, and write it to `profile.json` in the
            run folder.
    """
    from polyclinic.studies.config.loader import AUTOMATIC, named_plan, set_key, table_of, text_of

    require_file(study)
    given = changes(set_ or [])
    if address is not None:
        given |= {"engine.kind": "ray", "engine.address": address}
    text = text_of(study)
    table = table_of(text, study, given)  # a file that is missing or not TOML is reported before PyTorch is loaded
    if named_plan(table) == AUTOMATIC and "scenarios" not in table:
        from polyclinic.studies.run.case_planning import plan_beside

        file, written = plan_beside(study, given)
        given["data.plan"] = str(file)
        set_key(table, ["data", "plan"], str(file))
        progress.print(f"  [yellow]·[/yellow] {'made' if written else 'uses'} the plan {escape(str(file))}")
    from polyclinic.studies.config.scenarios import studies_in

    with document(json_) as emit:
        emit(run_all(study, studies_in(table, text, study, given), resume, fresh, out, workers, profile))


def run_all(
    file: Path,
    scenarios: Sequence[Any],
    resume: bool,
    fresh: bool,
    out: Path,
    workers: int | None,
    profile: bool = False,
) -> list[dict[str, Any]]:
    """Run every study of a file, compare them if there are several, and return a summary of each."""
    from polyclinic.studies.config.preflight import preflight
    from polyclinic.studies.run.run_directory import held

    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: give a positive number")
    preflight([scenario.study for scenario in scenarios], out)
    default = ["run", str(file), *(["--out", str(out)] if out != Path("runs") else [])]
    again = resume_command(default + (["--workers", str(workers)] if workers is not None else []))
    summaries = []
    with ExitStack() as stack:  # every folder is locked until the last report is written
        folders = [stack.enter_context(held(scenario.folder(out))) for scenario in scenarios]
        for scenario, folder in zip(scenarios, folders, strict=True):
            if scenario.name:
                progress.print(f"\n[bold]── {escape(scenario.name)} ──[/bold]")
            for note in scenario.notes:
                progress.print(f"  [yellow]·[/yellow] {escape(note)}", soft_wrap=True)
            summaries.append(_one(scenario, folder, resume, fresh, workers, again, profile))
        if scenarios[0].name:
            _compare(out / scenarios[0].study.name, {s.name: s.folder(out) for s in scenarios})
    return summaries


def _one(
    scenario: Any, held: Any, resume: bool, fresh: bool, workers: int | None, again: str, profile: bool
) -> dict[str, Any]:
    """Run one study in a folder that is locked, write its report and return a summary of both."""
    from polyclinic.cli.progress import Display
    from polyclinic.studies.run.run_directory import Stopped
    from polyclinic.studies.run.scheduler import run as run_study

    study, folder = scenario.study, held.path
    if workers is not None:
        study = study.model_copy(update={"engine": study.engine.model_copy(update={"workers": workers})})
    tested: list[dict[str, Any]] = []
    begun = ready = time.perf_counter()
    log.info("%s: run begins", folder)
    with stopping(held) as signals:
        try:
            with Display(progress, study) as display:
                for event in run_study(study, scenario.text, folder, resume, fresh, held, profile):
                    display.show(event)
                    ready = time.perf_counter() if event.what == "data" else ready
                    log.info("%s %s seed %s round %s", event.what, event.label, event.seed, event.round)
                    if event.what == "tested":
                        scores = {s: float(v) if math.isfinite(v) else None for s, v in event.scores.items()}
                        tested.append({"method": event.label, "seed": event.seed, "fold": event.fold, "scores": scores})
        except (KeyboardInterrupt, Stopped):
            print(f"\nStopped. Every completed round is saved. To continue: {again}", file=sys.stderr)
            sys.exit(signals.code)
    trained = time.perf_counter()
    times = _times(folder, trained - begun, ready - begun) if profile else {}  # before the report, which shows them
    page = write_report(folder)
    methods = summary(page)
    _show_summary(methods, study.metric)
    if profile:
        _show_profile(folder, times, time.perf_counter() - trained)
    done(str(page))
    training = {method.called: study.training_of(method) for method in study.methods}
    told = {"run": folder, "metric": study.metric, "training": training}
    return {**told, "methods": methods, "tested": tested, "report": page}


def _times(folder: Path, seconds: float, reading: float) -> dict[str, Any]:
    """Write where the time of a run went until now."""
    from polyclinic.studies.records import time_profile

    return time_profile.collect(folder, seconds, reading)


def _show_profile(folder: Path, times: Mapping[str, Any], report: float) -> None:
    """Add the seconds of the report to the times of a run, and show them."""
    from polyclinic.studies.records import time_profile

    line("")
    for text in time_profile.table(time_profile.add_report(folder, times, report)):
        line(f"  {text}")
    done(str(folder / time_profile.NAME))


def summary(page: Path) -> list[dict[str, Any]]:
    """Return the test results of each method from the file ``report.json`` of a report; nothing if there is none."""
    file = page.with_name("report.json")
    if not file.is_file():
        return []
    return [
        {
            "method": m["label"],
            "seeds": m["seeds"],
            "mean": m["macro"]["value"],
            "low": m["macro"]["low"],
            "high": m["macro"]["high"],
            "worst_site": m["worst"][0] if m["worst"] else None,
            "worst": m["worst"][1] if m["worst"] else None,
        }
        for m in json.loads(file.read_text(encoding="utf-8"))["evaluation"]["methods"]
    ]


def _show_summary(methods: Sequence[dict[str, Any]], metric: str) -> None:
    if methods:
        line(f"\n  {metric} on test patients, mean over training sites (95 % confidence interval)")
    width = max((len(m["method"]) for m in methods), default=0)
    for m in methods:
        interval = "" if m["low"] is None else f" ({number(m['low'])} to {number(m['high'])})"
        worst = "" if m["worst"] is None else f"  worst site {m['worst_site']} {number(m['worst'])}"
        line(f"    {m['method']:<{width}}  {number(m['mean'])}{interval}{worst}")


def stop(run_folder: Path, *, json_: Json = False) -> None:
    """Stop a run after the current round. `polyclinic run --resume` continues it.

    Exit code 1 if no process works on it.

    Args:
        run_folder: A folder that `polyclinic run` made.
    """
    from polyclinic.studies.run.run_lock import ask_to_stop

    with document(json_) as emit:
        pid = ask_to_stop(run_folder)
        text = f"process {pid} stops after the current round" if pid else "no process works on this run"
        line(f"{run_folder}: {text}")
        emit({"run": run_folder, "process": pid or None})
    if not pid:
        sys.exit(1)


def _compare(folder: Path, runs: dict[str, Path]) -> None:
    """Write and show the table of methods by scenarios, and draw their ranks."""
    from polyclinic.evaluation.run_comparison import panel, write_panel
    from polyclinic.report.figures import ranks_plot

    table = panel(list(runs.values()), names=list(runs))
    line("")
    show_panel(table)
    done(str(write_panel(table, folder)))
    if (ranking := table.ranking) is not None:
        ranks = ", ".join(f"{m} {rank:.2f}" for m, rank in zip(ranking.methods, ranking.ranks, strict=True))
        picture = ranks_plot("ranks", f"Mean ranks over data sets: {ranks}", ranking, {}, "data sets")
        atomic.write(folder / "panel.svg", picture)
        done(str(folder / "panel.svg"))


def demo(
    *,
    study: Literal["heart", "nodules"] = "heart",
    out: Path = Path("runs"),
    resume: bool = False,
    fresh: bool = False,
    workers: int | None = None,
    json_: Json = False,
) -> None:
    """Run a small study of real patients, and write its report.

    `heart`: does a hospital with few labeled patients gain from federating? Coronary artery disease at three hospitals
    that train and one that only tests, by logistic regression. `nodules`: lung nodules of LIDC-IDRI as radiologists
    outlined them, benign or malignant, at sites that are groups of scanning protocols; no difference between the
    methods is shown. Each takes a minute or two on two cores.

    Args:
        study: The study.
        out: Folder of the run folders.
        resume: Continue an earlier demo.
        fresh: Start again; the default without --resume.
        workers: Number of sites that are computed at once; the number of cores by default.
    """
    name = "demo" if study == "heart" else f"demo-{study}"
    file = out / f"{name}.toml"
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(file, template(name))
    run(file, resume=resume, fresh=fresh or not resume, out=out, workers=workers, json_=json_)
    if not json_:
        hint(f"  Next: read {file}, change it, and run it: polyclinic run {file}")


def new(
    file: Path = Path("study.toml"),
    *,
    data: Path | None = None,
    yes: bool = False,
    label: str | None = None,
    event: str | None = None,
    levels: str | None = None,
    patient: str | None = None,
    site: str | None = None,
    labels: Path | None = None,
    archive: str | None = None,
    suffix: str | None = None,
    sheet: str | None = None,
    images: str | None = None,
    segments: str | None = None,
    ordered: bool | None = None,
    blank: float | None = None,
    uncertain: float | None = None,
    name: str | None = None,
    rounds: int = 20,
    method: str | None = None,
    plugin: bool = False,
    force: bool = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write a commented study file as a starting point: a template, or with --data a study of your own data.

    With --data, it says what was recognized and why, asks what the data cannot say, and writes a study that runs. With
    --plugin, write the skeleton of a package with a network, a loss, a metric and an augmentation instead.

    Args:
        file: The file to write.
        data: A folder, an archive or a table: folders named by class, images with masks, nnU-Net, Decathlon, BIDS,
            DICOM, MedMNIST archives, a table that lists images, or a table of features.
        yes: Take the default for every question.
        label: The column to predict; for survival, the time to an event.
        event: For survival, the column that says whether the event happened (1) or the patient is censored
            (0); `none` if nothing of the kind is to be predicted.
        levels: The meaning of each level of folders, such as `site,class`.
        patient: The column that identifies the patient.
        site: The column that names the hospital.
        labels: For DICOM, the table with one row per patient.
        archive: The archive to use, if the folder has several.
        suffix: For BIDS, the kind of image, such as `T1w`; several with commas.
        sheet: The sheet of an Excel workbook, if several have content.
        images: The pattern of the images that a table names, if several fit.
        segments: For DICOM, the names of the segments that become labels 1, 2, ..., with commas.
        ordered: Whether the classes are grades in ascending order.
        blank: The value of an empty cell among several labels: 0 or 1.
        uncertain: The value of a label of -1 among several labels: 0 or 1.
        name: The name of the study; by default from the data's.
        rounds: The number of rounds.
        method: Compare this method, with its published settings if they are known, with local, pooled and fedavg.
        plugin: Write a package into the folder FILE.
        force: Replace an existing file.
        set_: With --data, set one key of `[data]`, such as `--set data.fill=0`. May be given several times.
    """
    if plugin:
        from polyclinic.studies.config.new_plugin import write_plugin

        with document(json_) as emit:
            files = write_plugin(file)
            for written in files:
                line(f"  {written}")
            done(f"pip install -e {file} && pytest {file}; docs/how-to/own-code.md describes it")
            emit({"files": files})
        return
    require_file(file)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already; --force replaces it")
    answers = {
        "label": label,
        "event": event,
        "levels": levels.split(",") if levels else None,
        "patient": patient,
        "site": site,
        "labels": str(labels.resolve()) if labels else None,
        "archive": archive,
        "suffix": suffix.split(",") if suffix else None,
        "sheet": sheet,
        "images": images,
        "segments": segments.split(",") if segments else None,
        "ordered": ordered,
        "blank": blank,
        "uncertain": uncertain,
    }
    answers = {key: value for key, value in answers.items() if value is not None}
    given = data_changes(set_ or [])
    with document(json_) as emit:
        if data is None:
            if answers or given:
                raise ConfigError(f"--{next(iter(answers), 'set')} needs --data PATH")
            atomic.write(file, _with_method(template("study"), method))
            line(f"wrote {file}")
            emit({"study": file})
        else:
            emit({"study": file, **_new_of_data(file, data, answers, yes, name, rounds, method, given)})
    if not json_:
        hint(f"Next: polyclinic run {file}")


def _new_of_data(
    file: Path,
    data: Path,
    answers: dict[str, Any],
    yes: bool,
    name: str | None,
    rounds: int,
    method: str | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a study of the data at ``data``; return what was recognized, as JSON."""
    from polyclinic.data.quality.recognition import recognize
    from polyclinic.studies.config import study_config
    from polyclinic.studies.config.new_study import new_study, questions_text, study_name

    path = data.expanduser().resolve()
    recognized = recognize(path, answers, given=given)
    if recognized.questions and not yes:
        if not sys.stdin.isatty():
            listed = "\n  ".join(questions_text(recognized.questions))
            raise ConfigError(f"the data does not say everything. Answer, or take the defaults with --yes:\n  {listed}")
        answers = answers | _asked(recognized.questions)
        recognized = recognize(path, answers, given=given)
    study = new_study(recognized, name or study_name(str(path)), rounds)
    text = _with_method(study.text, method)
    study_config.parse(text, file)
    atomic.write(file, text)
    for reason in study.why:
        line(f"  {reason}")
    for question in study.questions:
        line(f"  assumed: {question.key} = {question.default} ({question.text})")
    line(f"wrote {file}")
    return {
        "data": path,
        "recognized": study.why,
        "assumed": {question.key: question.default for question in study.questions},
    }


def _with_method(text: str, method: str | None) -> str:
    """Return the study ``text`` with the baselines and ``method``, if one is given."""
    if method is None:
        return text
    from polyclinic.studies.config.method_study import with_method

    return with_method(text, method)


def _asked(questions: Sequence[Any]) -> dict[str, Any]:
    """Ask each question at the terminal; an empty answer takes the default."""
    answers: dict[str, Any] = {}
    for question in questions:
        shown = ",".join(question.default) if isinstance(question.default, list) else question.default
        choices = f" ({', '.join(question.choices[:12])})" if question.choices else ""
        answer = console.input(escape(f"{question.key}: {question.text}{choices} [{shown}] ")).strip()
        value = answer or shown
        answers[question.key] = value.split(",") if isinstance(question.default, list) else value
        if isinstance(question.default, dict):
            answers[question.key] = changes([f"x={answer}"])["x"] if answer else question.default
        elif isinstance(question.default, int | float) and not isinstance(question.default, bool):
            answers[question.key] = float(value)
    return answers


def report(run_folder: Path, *, min_cell: int = 0, level: float = 0.95, json_: Json = False) -> None:
    """Write the report of a run: one HTML file, and its tables as CSV and JSON.

    Args:
        run_folder: A folder that `polyclinic run` made.
        min_cell: Hide results of single sites, and of groups of patients, with fewer test patients than this.
        level: Confidence level of the intervals.
    """
    if not 0 < level < 1:
        raise ConfigError(f"--level {level:g}: give a number between 0 and 1, such as 0.95")
    if min_cell < 0:
        raise ConfigError(f"--min-cell {min_cell}: give a number of patients, or 0 to hide nothing")
    with document(json_) as emit:
        page = write_report(run_folder, min_cell, level)
        done(str(page))
        emit({"run": run_folder, "methods": summary(page), "report": page})


def write_report(run_folder: Path, min_cell: int = 0, level: float = 0.95) -> Path:
    """Write a report and return its path."""
    from polyclinic.evaluation.run_evaluation import Options
    from polyclinic.report.report_builder import build_report

    return build_report(run_folder, options=Options(level=level, min_cell=min_cell))


def status(run_folder: Path, *, json_: Json = False) -> None:
    """Show the progress of a run.

    Args:
        run_folder: A folder that `polyclinic run` made, or the folder around a file's scenarios.
    """
    runs = [run_folder]
    if not (run_folder / "run.json").is_file():
        runs = sorted(path.parent for path in run_folder.glob("*/run.json"))
    if not runs:
        raise RunError(f"{run_folder}: this is not a run folder; it has no run.json. `polyclinic run` makes one")
    with document(json_) as emit:
        states = [_status(folder) for folder in runs]
        emit(states)
        for state in states:
            if len(states) > 1 or runs != [run_folder]:
                console.print(f"[bold]{escape(Path(state['run']).name)}[/bold]", soft_wrap=True)
            if state["process"]:
                line(f"  process {state['process']} works on it")
            for arm in state["methods"]:
                fold = "" if arm["fold"] is None else f" fold {arm['fold']:<2}"
                line(f"  {arm['method']:<20} seed {arm['seed']:<4}{fold} {arm['status']}")


def _status(run_folder: Path) -> dict[str, Any]:
    """Return the progress of one run, as JSON."""
    from pydantic import ValidationError

    from polyclinic.evaluation.records.record_schema import RunInfo, arm_names, record_files
    from polyclinic.studies.run.run_lock import holder

    try:
        info = RunInfo.model_validate_json((run_folder / "run.json").read_bytes())
    except ValidationError:
        raise RunError(f"{run_folder}/run.json: damaged, or not written by this version. Run the study again") from None
    arms = arm_names(info)
    states: dict[tuple[str, int, int], str] = {}
    for file in record_files(run_folder, [name for *_, name in arms]):
        for i, record in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                fact = json.loads(record)
                arm = fact["method"], fact["seed"], fact.get("fold", 0)
                if fact["kind"] == "round":
                    states[arm] = f"round {fact['round']} of {info.rounds}"
                elif fact["kind"] == "sealed":
                    states[arm] = "tested"
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{file}:{i}: damaged. Run the study again, or restore the file") from None
    methods = []
    for label, seed, fold, name in arms:
        state = states.get((label, seed, fold), f"round 0 of {info.rounds}")
        if trials := len(list((run_folder / "arms" / name / "trials").glob("*"))):
            state = f"trial {trials} of its search"
        methods.append({"method": label, "seed": seed, "fold": fold if info.folds else None, "status": state})
    return {"run": str(run_folder), "process": holder(run_folder) or None, "methods": methods}


def show_console(
    runs: Path = Path("runs"),
    *,
    studies: Path = Path("."),
    port: int = 8765,
    open_: Annotated[bool, Parameter(name="--open")] = False,
    viewer: bool = False,
    link: bool = False,
    metrics_key: Path | None = None,
) -> None:
    """Show a folder of runs in the browser of this machine: progress, curves, comparison, reports, disk use.

    Runs can be started, stopped, resumed and deleted there. The console is reached by this machine only; see
    docs/how-to/console.md for another machine's browser. Runs continue when it ends.

    Args:
        runs: The folder of the run folders.
        studies: The folder with the study files that can be started.
        port: The port on the loopback interface; 0 for any free one.
        open_: Open the page in this machine's browser.
        viewer: Print a link that may look and change nothing.
        link: Print another link of the console that runs.
        metrics_key: A file with the key for /metrics; it is created if it does not exist.
    """
    from polyclinic.console import serve

    if link:
        line(f"open     {serve.new_link('runs', runs, viewer)}")
        return
    serve.require()
    from polyclinic.console.runs import RunsPage

    page = RunsPage(runs, studies)
    serve.serve(page, runs, port, line, open_browser=open_, viewer=viewer, metrics_key=metrics_key)


def template(name: str) -> str:
    """Return a study file that comes with Polyclinic."""
    return files("polyclinic.studies").joinpath(f"templates/{name}.toml").read_text(encoding="utf-8")


def require_file(file: Path) -> None:
    """Refuse a folder in place of a file.

    Raises:
        ConfigError: If ``file`` is a folder.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: name a file")


def data_changes(items: list[str]) -> dict[str, Any]:
    """Parse ``data.key=value`` pairs into a ``[data]`` table.

    Raises:
        ConfigError: If an item is not ``key=value``, or sets a key of another table.
    """
    table: dict[str, Any] = {}
    for key, value in changes(items).items():
        table_name, *parts = key.split(".")
        if table_name != "data" or not all(parts) or not parts:
            raise ConfigError(f"--set {key}: give a key of [data], such as data.fill=0")
        inner = table
        for parent in parts[:-1]:
            inner = inner.setdefault(parent, {})
        inner[parts[-1]] = value
    return table


def changes(items: list[str]) -> dict[str, Any]:
    """Parse ``key=value`` pairs. A value that is not TOML is text.

    Raises:
        ConfigError: If an item has no ``=`` or no key.
    """
    import tomllib

    values: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: write it as key=value, such as training.lr=0.01")
        try:
            values[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            values[key] = value
    return values
