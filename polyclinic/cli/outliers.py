"""``polyclinic standing``: every site's updates beside the others', and how a person leaves one out."""

import json
from pathlib import Path

from rich.table import Table

from polyclinic.cli.rendering import console

DECIDE = """A site may stand out because its patients or scanners differ, by a fault, or by an attack: ask before you
decide. To leave its updates out write quarantined = ["SITE"] under the method and run the study anew; take the name
away to hear it again. It still receives the model, and still is looked at. Between hospitals `polyclinic server
revoke SITE` ends its part altogether, and `polyclinic server reinstate SITE` undoes that."""


def standing(run_folder: Path, *, json_: bool = False) -> None:
    """Show how each site's updates stood among the others', in a run with a robust rule.

    Args:
        run_folder: The folder of a run, finished or not.
        json_: Print JSON instead.
    """
    from polyclinic.studies.records.site_outliers import read

    found = read(run_folder)
    if json_:
        told = [
            {"arm": s.arm, "round": s.round, "alarms": s.alarms, "sites": {n: x._asdict() for n, x in s.notes.items()}}
            for s in found
        ]
        print(json.dumps(told, indent=1))
        return
    for arm in found:
        console.print(f"\n[bold]{arm.arm}[/bold], after round {arm.round}")
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("site", style="cyan")
        for name in ("stood out", "score", "length", "direction", "share"):
            table.add_column(name, justify="right")
        table.add_column("its last update")
        for site, note in arm.notes.items():
            share = "" if note.share is None else f"{note.share:.2f}"
            table.add_row(
                site,
                f"{note.outlying} of {note.seen}",
                f"{note.score:.1f}",
                f"{note.norm:.1f}",
                f"{note.cosine:+.2f}",
                share,
                f"had no say: {note.excluded}" if note.excluded else "was heard",
            )
        console.print(table, highlight=False)
        for alarm in arm.alarms:
            console.print(f"  {alarm}", highlight=False, soft_wrap=True)
    console.print(
        "\n[dim]score: above 3.5 stands out. length: in multiples of the usual. direction: agreement with the others, "
        f"-1 to 1. share: its part of the last aggregate.\n{DECIDE}[/dim]",
        highlight=False,
        soft_wrap=True,
    )
