"""Progress of a run: a live line for each method on a terminal, and one line per round in a file or a pipe."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from polyclinic.evaluation.records.record_schema import rounded_up
from polyclinic.evaluation.site_scores import decimals, mean_over_sites, worst_site
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.run.events import Event


class Display:
    """Shows the events of a run on ``console``."""

    def __init__(self, console: Console, study: Study) -> None:
        self.console, self.study = console, study
        self._bar = Progress(
            TextColumn("  {task.fields[name]:<24}", markup=False),
            TextColumn("round {task.completed:>3}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[result]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Display":
        """Print what will run, and start the live lines."""
        study = self.study
        self._line(f"\n[bold]{escape(study.title or study.name)}[/bold]  [dim]study {study.hash[:12]}[/dim]")
        names = ", ".join(method.called for method in study.methods)
        self._line(escape(f"  {study.task.kind} with {study.task.network}; {names}"))
        times = f" x {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
        folds = "leaving one site out" if study.folds == "sites" else f"{study.folds} folds"
        times += f" x {folds}" if study.folds else ""
        times += f", each after {study.search.trials} trials" if study.search else ""
        methods = f"{len(study.methods)} method{'s' if len(study.methods) > 1 else ''}"
        rounds = f"{study.rounds} round{'s' if study.rounds > 1 else ''}"
        self._line(f"  {methods} x {rounds}{times}; primary metric {study.metric}\n")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the live lines."""
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        name = event.label + (f" · seed {event.seed}" if len(self.study.seeds) > 1 else "")
        name += "" if event.fold is None else f" · fold {event.fold}"
        match event.what:
            case "data":
                for note in event.notes:
                    self._line(f"  [yellow]·[/yellow] {escape(note)}")
                self._line("")
            case "trial":
                value = event.scores.get("validation")
                result = "no score" if value is None else f"{self.study.metric} {decimals(value)} on validation"
                self._line(f"  [dim]  {escape(f'{name:<22}')} trial {event.round}/{event.rounds}  {result}[/dim]")
            case "arm":
                self._tasks[name] = self._bar.add_task(
                    "", total=event.rounds, completed=event.round, name=name, result=""
                )
            case "round" if name in self._tasks:
                result = self._result(event)
                self._bar.update(self._tasks[name], completed=event.round, result=result)
                for site, reason in event.lost.items():
                    text = f"{name} round {event.round}: {site} did not contribute: {reason}"
                    self._line(f"  [yellow]![/yellow] {escape(text)}")
                if not self.console.is_terminal:
                    self._line(escape(f"  {name:<24} round {event.round}/{event.rounds}  {result}"))
            case "tested":
                if (task := self._tasks.pop(name, None)) is not None:
                    self._bar.remove_task(task)
                self._line(f"  [green]✓[/green] {escape(f'{name:<22} test {self._result(event)}')}")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _result(self, event: Event) -> str:
        """Return the mean over training sites, the worst site, the bytes sent and the privacy budget spent."""
        scores = {site: score for site, score in event.scores.items() if site not in event.external}
        about = "=" if event.round == event.rounds else "≤"  # until the last round a bound, which is quick
        spent = "" if event.epsilon is None else f"  ε {about} {rounded_up(event.epsilon)} {event.protects}".rstrip()
        mean, worst = mean_over_sites(scores), worst_site(scores, self.study.higher_is_better)
        if mean is None or worst is None:
            return spent.strip()
        sent = f"  {event.bytes / 1e6:.1f} MB" if event.bytes else ""
        least = f"worst site {worst[0]} {decimals(worst[1])}"
        return f"{self.study.metric} {decimals(mean)}  {least}{sent}{spent}"
