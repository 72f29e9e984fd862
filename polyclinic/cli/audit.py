"""``polyclinic audit``: what a run's model gives away of the patients it was trained on."""

from pathlib import Path

from cyclopts import App
from rich.console import Console

app = App(name="audit", help="Attack a run's model, with a leaky control beside.")
app.command("polyclinic.cli.audit_release:release", name="release")
console = Console(highlight=False)


@app.default
def audit(
    run_folder: Path, *, method: str = "", seed: int | None = None, limit: int = 200, steps: int = 30,
    restarts: int = 2,
) -> None:  # fmt: skip
    """Attack a run's model as an outsider might, with a leaky control beside each attack.

    Who was trained on, by the loss, at each site; and one training example from its gradient. Writes audit.json
    beside the model. What these two attacks do not find, others may.

    Parameters
    ----------
    run_folder
        A finished run, whose data are still there.
    method
        Which method's model; by default the last that shares one.
    seed
        Which seed's; by default the first.
    limit
        How many examples of each role and site to try.
    steps
        Of the search for the image, from each of `restarts` starts.
    """
    from polyclinic.studies.audit import audit_run

    found = audit_run(run_folder, method, seed, limit=limit, steps=steps, restarts=restarts)
    console.print(f"  {found.method}, seed {found.seed}")
    console.print("  [bold]Who was trained on?[/bold] By the loss, training against test examples:")
    console.print(f"    {'control':<24} {found.membership.control.says}", soft_wrap=True)
    for site, one in found.membership.sites.items():
        console.print(f"    {site:<24} {one.says}", soft_wrap=True, markup=False)
    console.print(f"  {found.membership.says}", soft_wrap=True)
    whose = f"One of {found.site}'s, label known, its gradient seen as it is:"
    console.print(f"  [bold]An example from its gradient?[/bold] {whose}", soft_wrap=True)
    for name, leak in (("control", found.inversion.control), (found.method, found.inversion.found)):
        told = f"{leak.psnr_db:.1f} dB, a guess {leak.guess_db:.1f} dB, RDLV {leak.rdlv:.2f}"
        console.print(f"    {name:<24} {told}", soft_wrap=True)
    console.print(f"  {found.inversion.says}", soft_wrap=True)
    console.print(f"  [green]✓[/green] {found.file(run_folder)}")
