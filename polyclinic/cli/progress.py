"""What a person sees of a run: a line that lives while an arm trains, and plain lines where nobody watches."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from polyclinic.evaluation.records.record_schema import rounded_up
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.run.events import Event


class Display:
    """Shows a run's events on ``console``."""

    def __init__(self, console: Console, study: Study) -> None:
        self.console, self.study = console, study
        self._bar = Progress(
            TextColumn("  {task.fields[name]:<24}"),
            TextColumn("round {task.completed:>3}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Display":
        """Begins."""
        study = self.study
        self.console.print(f"\n[bold]{study.title or study.name}[/bold]  [dim]study {study.hash[:12]}[/dim]")
        names = ", ".join(method.called for method in study.methods)
        self.console.print(f"  {study.task.kind} with {study.task.network}; {names}")
        times = f" x {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
        folds = "leaving one site out" if study.folds == "sites" else f"{study.folds} folds"
        times += f" x {folds}" if study.folds else ""
        times += f", each after {study.search.trials} trials" if study.search else ""
        self.console.print(f"  {len(study.methods)} methods x {study.rounds} rounds{times}; judged by {study.metric}\n")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the live line, whatever happened."""
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Shows one event."""
        name = event.label + (f" · seed {event.seed}" if len(self.study.seeds) > 1 else "")
        name += "" if event.fold is None else f" · fold {event.fold}"
        match event.what:
            case "data":
                for note in event.notes:
                    self.console.print(f"  [yellow]·[/yellow] {note}")
                self.console.print()
            case "trial":
                value = event.scores.get("validation")
                found = "no score" if value is None else f"{self.study.metric} {value:.3f} on validation"
                self.console.print(f"  [dim]  {name:<22} trial {event.round}/{event.rounds}  {found}[/dim]")
            case "arm":
                self._tasks[name] = self._bar.add_task(
                    "", total=event.rounds, completed=event.round, name=name, told=""
                )
            case "round" if name in self._tasks:
                self._bar.update(self._tasks[name], completed=event.round, told=self._told(event))
                for site, reason in event.lost.items():
                    self.console.print(f"  [yellow]![/yellow] {name} round {event.round}: {site} is left out: {reason}")
                if not self.console.is_terminal and (event.round == event.rounds or event.epsilon is not None):
                    self.console.print(f"  {name:<24} round {event.round}/{event.rounds}  {self._told(event)}")
            case "tested":
                if (task := self._tasks.pop(name, None)) is not None:
                    self._bar.remove_task(task)
                self.console.print(f"  [green]✓[/green] {name:<22} test {self._told(event)}")

    def _told(self, event: Event) -> str:
        """The mean over sites and the worst site, what was sent, and what privacy was spent."""
        scores: dict[str, Any] = {site: score for site, score in event.scores.items() if score == score}
        about = "=" if event.round == event.rounds else "≤"  # until the last round a bound, which is quick
        spent = "" if event.epsilon is None else f"  ε {about} {rounded_up(event.epsilon)} {event.protects}".rstrip()
        if not scores:
            return spent.strip()
        choose = min if self.study.higher_is_better else max
        worst = choose(scores, key=lambda site: scores[site])
        mean = sum(scores.values()) / len(scores)
        sent = f"  {event.bytes / 1e6:.1f} MB" if event.bytes else ""
        return f"{self.study.metric} {mean:.3f}  worst {worst} {scores[worst]:.3f}{sent}{spent}"
