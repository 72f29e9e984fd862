"""``polyclinic explain``: what a run's model looks at, at every site."""

from pathlib import Path

from polyclinic.cli.rendering import console


def explain(run_folder: Path, *, method: str = "", seed: int | None = None) -> None:
    """Ask every site what a run's model looks at, and whether sites agree; the report shows it.

    A mean over at least ten validation patients of a site, computed there; no patient's image or map leaves. Needs
    captum: pip install 'polyclinic[explain]'.

    Args:
        run_folder: A finished run, whose data are still there.
        method: Which method's model; by default the one that the report speaks of.
        seed: Which seed's; by default the first.
    """
    from polyclinic.evaluation.records.run_reader import read_run
    from polyclinic.studies.records.saliency_maps import read_explanation
    from polyclinic.studies.run.model_explanation import explain as ask

    file, refused = ask(run_folder, method, seed)
    found = read_explanation(read_run(run_folder), file.parent.name.rsplit("-seed", 1)[0])
    assert found is not None
    console.print(f"  {found.method}, seed {found.seed}: does the model look at the same everywhere?")
    for site in found.maps:
        agrees, before = (_number(v) for v in (found.agreement(site), found.unlearned(site)))
        told = f"{site:<24} with the other sites {agrees}, with the model before training {before}"
        console.print(f"    {told}", soft_wrap=True, markup=False)
    for site, reason in refused.items():
        console.print(f"    {site:<24} told nothing: {reason}", soft_wrap=True, markup=False)
    console.print(f"  [green]✓[/green] {file}; polyclinic report {run_folder} shows it", soft_wrap=True)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
