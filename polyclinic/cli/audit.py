"""``polyclinic audit``: what a run's model reveals about the patients it was trained on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from polyclinic.cli.rendering import Json, console, document, done, line, progress

if TYPE_CHECKING:
    from polyclinic.studies.audits.audit_file import Audit
    from polyclinic.studies.audits.audit_privacy import Progress as Callback

app = App(name="audit", help="Attack a run's model to measure what it reveals about patients.")


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
    json_: Json = False,
) -> None:
    """Attack a run's model as an outsider could, next to a control model that leaks by design.

    The attacks are membership inference at each site, the reconstruction of a training example from its gradient, and,
    for a run with DP-SGD, a lower bound on ε from training once more with canaries. The results are written to
    audit.json next to the model, and the report shows them. Other attacks may find more.

    Args:
        run_folder: A finished run, with its data still in place.
        method: The method whose model is attacked; by default the last that shares one.
        seed: The seed whose model is attacked; the first by default.
        attack: The membership attacks. LiRA and RMIA train shadow models; the loss attack trains nothing.
        shadow_models: The number of shadow models, an even number. Each costs as much as training the method once.
            They are kept.
        site: The site whose patients are attacked; by default every site, and for the canaries the site with the
            largest ε.
        limit: The largest number of patients of each kind and site.
        canaries: The number of canaries in private training; by default as many as the claimed ε needs, up to 2,000. 0
            skips that audit.
        steps: The number of steps of the image search from each start.
        restarts: The number of random starts of the image search.
    """
    from polyclinic.studies.audits.run_audit import audit_run

    with document(json_) as emit:
        with _progress() as callback:
            audit = audit_run(
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
                progress=callback,
            )
        emit(audit.to_json())
        _show(audit, run_folder)


@app.command
def release(target: str, *, full: bool = False, json_: Json = False) -> None:
    """Check that privacy noise covers everything that leaves a site.

    Runs the method's rounds on small synthetic data twice: unchanged, and with one patient changed. A difference in
    what leaves the site, other than through the noise, is not covered by any ε. Takes seconds, or minutes with
    --full. Exit code 1 if a method of the study is not covered, or if no setting covers the named method.

    Args:
        target: A study file, whose methods are audited with their settings; or the name of a method, including one of
            an installed package.
        full: Try more changes, in all of a site's data and at all sites.
    """
    from polyclinic.studies.audits.release_command import audit_release

    with document(json_) as emit:
        audits = audit_release(target, full)
        covered = [one.verdict.covered for one in audits]
        # A study is covered if each of its methods is; a method by its name, if some setting covers it
        good = all(covered) if target.endswith(".toml") else any(covered)
        listed = [{"label": one.label, "noise": one.noise, **one.verdict.to_json()} for one in audits]
        emit({"covered": good, "audits": listed})
        for one in audits:
            mark = "[green]✓[/green]" if one.verdict.covered else "[red]✗[/red]"
            console.print(f"  {mark} [bold]{escape(one.label)}[/bold], {escape(one.noise)}", soft_wrap=True)
            line(f"    {one.verdict.says}")
            for finding in one.verdict.findings:
                by = "" if finding.amount is None else f" (by {finding.amount:.3g})"
                line(f"    - {finding}{by}, at {finding.site}, round {finding.round}")
    if not good:
        sys.exit(1)


@contextmanager
def _progress() -> Iterator["Callback"]:
    """Show a bar for each training on a terminal, unless ``--quiet`` was given."""
    bar = Progress(
        TextColumn("  {task.description:<16}"),
        TextColumn("{task.completed:>3}/{task.total}"),
        BarColumn(bar_width=30),
        TimeRemainingColumn(compact=True),
        console=progress,
        disable=progress.quiet or not progress.is_terminal,
        transient=True,
    )
    tasks = {}

    def callback(what: str, completed: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=completed)

    with bar:
        yield callback


def _show(audit: "Audit", run_folder: Path) -> None:
    """Print the results, with the verdict after each attack."""
    from polyclinic.attacks.separation import RATES

    def heading(title: str, text: str) -> None:
        console.print(Text.assemble("  ", (title, "bold"), f" {text}"), soft_wrap=True)

    members, inversion = audit.membership, audit.inversion
    line(f"  {audit.method}, seed {audit.seed}")
    heading("Membership inference.", "Training patients against test patients; 95 % intervals:")
    rows = [("control that memorizes", "loss", members.control)]
    rows += [(site, name, one) for site, attacks in members.sites.items() for name, one in attacks.items()]
    width = max(len(site) for site, *_ in rows)
    rates = "  ".join(f"{f'TPR at {100 * fpr:g} % FPR':<19}" for fpr in RATES)
    line(f"    {'':<{width}}  {'attack':<12}  {'AUC':<22}  {rates}  above all others")
    for site, name, one in rows:
        area, rates = f"{one.auc:.3f} ({one.low:.3f} to {one.high:.3f})", "  ".join(f"{r.says:<19}" for r in one.rates)
        few = f" (but {one.allowed})" if one.allowed else ""
        line(f"    {site:<{width}}  {name:<12}  {area:<22}  {rates}  {one.exposed} of {one.members}{few}")
    line(f"  {members.verdict.says}")
    heading("Gradient inversion.", f"One example of {inversion.site}, with known label and without noise:")
    for name, leak in (("control", inversion.control), (audit.method, inversion.found)):
        line(f"    {name:<24} {leak.psnr_db:.1f} dB, a guess {leak.guess_db:.1f} dB, RDLV {leak.rdlv:.2f}")
    line(f"  {inversion.says}")
    if audit.privacy is not None:
        heading("Claimed ε.", f"{audit.privacy_site} trained once more with canaries, as the server sees it:")
        line(f"  {audit.privacy.says}")
    if audit.not_done:
        heading("Not done:", "")
        for text in audit.not_done:
            line(f"    {text}")
    done(str(audit.file(run_folder)))
