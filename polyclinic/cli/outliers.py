"""``polyclinic outliers``: how far each site's updates differ from the others', and how to exclude a site."""

from json import JSONDecodeError
from pathlib import Path

from rich.table import Table
from rich.text import Text

from polyclinic.cli.rendering import Json, console, document, hint, line
from polyclinic.errors import RunError

DECIDE = """A site may be an outlier because its patients or scanners differ, because of a fault, or because of an
attack: ask the site before you decide. To exclude its updates, write quarantined = ["SITE"] under the method and run
the study again; remove the name to include it again. An excluded site still receives the model, and its updates are
still measured. Between hospitals, `polyclinic server revoke SITE` ends its participation, and `polyclinic server
reinstate SITE` undoes that."""


def outliers(run_folder: Path, *, json_: Json = False) -> None:
    """Show how far each site's updates differ from those of the other sites, in a run with a robust method.

    Args:
        run_folder: The folder of a run, finished or not.
    """
    from polyclinic.studies.records.site_outliers import read

    with document(json_) as emit:
        try:
            arms = read(run_folder)
        except (UnicodeDecodeError, JSONDecodeError):
            raise RunError(f"{run_folder}/run.json: damaged. Run the study again, or restore the file") from None
        emit(
            [
                {
                    "arm": arm.arm,
                    "round": arm.round,
                    "alarms": arm.alarms,
                    "sites": {name: note._asdict() for name, note in arm.notes.items()},
                }
                for arm in arms
            ]
        )
        for arm in arms:
            line(f"\n{arm.arm}, after round {arm.round}")
            table = Table(box=None, padding=(0, 2, 0, 0))
            table.add_column("site", style="cyan")
            for name in ("outlier in", "score", "norm", "cosine", "weight"):
                table.add_column(name, justify="right")
            table.add_column("its last update")
            for site, note in arm.notes.items():
                table.add_row(
                    Text(site),
                    f"{note.outlying} of {note.seen}",
                    f"{note.score:.1f}",
                    f"{note.norm:.1f}",
                    f"{note.cosine:+.2f}",
                    "" if note.share is None else f"{note.share:.2f}",
                    Text(f"excluded: {note.excluded}" if note.excluded else "included"),
                )
            console.print(table)
            for alarm in arm.alarms:
                line(f"  {alarm}")
    if not json_:
        hint(
            "\nscore: robust z-score; above 3.5 is an outlier. norm: relative to the median. cosine: similarity to "
            f"the other updates, -1 to 1. weight: share of the last aggregate.\n{' '.join(DECIDE.split())}"
        )
