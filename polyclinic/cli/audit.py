"""``polyclinic audit``: what a run's model gives away of the patients it was trained on."""

import json as json_text
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polyclinic.cli.rendering import console

if TYPE_CHECKING:
    from polyclinic.studies.audits.audit_file import Audit
    from polyclinic.studies.audits.audit_privacy import Progress as Report

app = App(name="audit", help="Attack a run's model, with a leaky control beside.")
app.command("polyclinic.cli.audit_release:release", name="release")


@app.default
def audit(
    run_folder: Path,
    *,
    method: str = "",
    seed: int | None = None,
    attack: Literal["loss", "lira", "rmia", "all"] = "loss",
    shadow_models: int = 16,
    site: str = "",
    limit: int = 1000,
    canaries: int | None = None,
    steps: int = 30,
    restarts: int = 2,
    json: bool = False,
) -> None:
    """Attack a run's model as an outsider might, with a leaky control beside each attack.

    Which patients were trained on, at each site; one training example from its gradient; and for a run with DP-SGD, a
    lower bound on ε from training once more with canaries. Writes audit.json beside the model, and the report shows
    it. What these attacks do not find, others may.

    Args:
        run_folder: A finished run, whose data are still there.
        method: Which method's model; by default the last that shares one.
        seed: Which seed's; by default the first.
        attack: Which attacks find out who was trained on. LiRA and RMIA train shadow models; the loss attack trains
            nothing.
        shadow_models: How many shadow models, an even number. Each costs as much as training the method once. They are
            kept.
        site: Whose patients to try; by default every site's, and for the canaries the site with the largest ε.
        limit: How many patients of each kind and site to try at most.
        canaries: How many canaries to put into private training; by default as many as the claimed ε needs, up to
            2,000. 0 leaves that audit out.
        steps: How many steps the search for the image takes from each start.
        restarts: How many random starts the search for the image has.
        json: Print audit.json and nothing else.
    """
    from polyclinic.studies.audits.run_audit import audit_run

    with _progress(hidden=json) as progress:
        found = audit_run(
            run_folder,
            method,
            seed,
            attack=attack,
            shadow_models=shadow_models,
            site=site,
            limit=limit,
            steps=steps,
            restarts=restarts,
            canaries=canaries,
            progress=progress,
        )
    if json:
        print(_text(found))
    else:
        _show(found, run_folder)


def _text(found: "Audit") -> str:
    return json_text.dumps(found.to_json(), indent=1)


@contextmanager
def _progress(hidden: bool) -> Iterator["Report"]:
    """A bar for each training, where somebody watches."""
    shown = Console(stderr=True)
    bar = Progress(
        TextColumn("  {task.description:<16}"),
        TextColumn("{task.completed:>3}/{task.total}"),
        BarColumn(bar_width=30),
        TimeRemainingColumn(compact=True),
        console=shown,
        disable=hidden or not shown.is_terminal,
        transient=True,
    )
    tasks = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    with bar:
        yield progress


def _show(found: "Audit", run_folder: Path) -> None:
    """Prints what was found, with the verdict after each audit."""

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    from polyclinic.attacks.separation import RATES

    members = found.membership
    console.print(f"  {found.method}, seed {found.seed}")
    console.print("  [bold]Who was trained on?[/bold] Training against test patients; 95 % intervals:")
    rows = [("a control made to memorize", "loss", members.control)]
    rows += [(site, name, one) for site, attacks in members.sites.items() for name, one in attacks.items()]
    wide = max(len(site) for site, *_ in rows)
    rates = "  ".join(f"{f'TPR at {100 * fpr:g} % FPR':<19}" for fpr in RATES)
    line(f"    {'':<{wide}}  {'attack':<12}  {'AUC':<22}  {rates}  above all others")
    for site, name, one in rows:
        area, rates = f"{one.auc:.3f} ({one.low:.3f} to {one.high:.3f})", "  ".join(f"{r.says:<19}" for r in one.rates)
        few = f" (but {one.allowed})" if one.allowed else ""
        line(f"    {site:<{wide}}  {name:<12}  {area:<22}  {rates}  {one.exposed} of {one.members}{few}")
    line(f"  {members.verdict.says}")
    whose = f"One of {found.inversion.site}'s, label known, its gradient seen as it is:"
    console.print(f"  [bold]An example from its gradient?[/bold] {whose}", soft_wrap=True)
    for name, leak in (("control", found.inversion.control), (found.method, found.inversion.found)):
        line(f"    {name:<24} {leak.psnr_db:.1f} dB, a guess {leak.guess_db:.1f} dB, RDLV {leak.rdlv:.2f}")
    line(f"  {found.inversion.says}")
    if found.privacy is not None:
        what = f"{found.privacy_site}'s training once more, with canaries, seen by the server:"
        console.print(f"  [bold]Is the claimed ε right?[/bold] {what}", soft_wrap=True)
        line(f"  {found.privacy.says}")
    if found.not_done:
        console.print("  [bold]Not done:[/bold]")
        for text in found.not_done:
            line(f"    {text}")
    console.print(f"  [green]✓[/green] {found.file(run_folder)}")
