"""``polyclinic explain``: attribution maps of a run's model at every site."""

from pathlib import Path

from polyclinic.cli.panel_table import number
from polyclinic.cli.rendering import Json, document, done, line


def explain(run_folder: Path, *, method: str = "", seed: int | None = None, json_: Json = False) -> None:
    """Compute attribution maps of a run's model at every site, and their agreement; the report shows them.

    Each map is a mean over at least ten validation patients of a site, computed at the site; no map of a single patient
    leaves it. Needs captum: pip install 'polyclinic[explain]'.

    Args:
        run_folder: A finished run, with its data still in place.
        method: The method whose model is explained; by default the main method of the report.
        seed: The seed whose model is explained; the first by default.
    """
    from polyclinic.evaluation.records.run_reader import read_run
    from polyclinic.studies.records.saliency_maps import read_explanation
    from polyclinic.studies.run.model_explanation import explain as ask

    with document(json_) as emit:
        file, refused = ask(run_folder, method, seed)
        maps = read_explanation(read_run(run_folder), file.parent.name.rsplit("-seed", 1)[0])
        assert maps is not None
        agreement = {site: (maps.agreement(site), maps.unlearned(site)) for site in maps.maps}
        line(f"  {maps.method}, seed {maps.seed}: rank correlation of attribution maps")
        for site, (others, untrained) in agreement.items():
            values = f"with the other sites {number(others)}, with the untrained model {number(untrained)}"
            line(f"    {site:<24} {values}")
        for site, reason in refused.items():
            line(f"    {site:<24} no map: {reason}")
        done(f"{file}; polyclinic report {run_folder} shows it")
        emit(
            {
                "method": maps.method,
                "seed": maps.seed,
                "agreement": {s: {"other_sites": a, "untrained": b} for s, (a, b) in agreement.items()},
                "refused": refused,
                "path": file,
            }
        )
