"""``polyclinic methods``, ``networks`` and ``transforms``: what a study may name."""

import json
from dataclasses import asdict
from typing import Any

from cyclopts import App
from rich.console import Console

methods_app = App(name="methods", help="The federated methods, by the survey's taxonomy.")
console = Console()


@methods_app.default
def methods(*, json_: bool = False) -> None:
    """List every method with one line each.

    Parameters
    ----------
    json_
        Print JSON instead.
    """
    from polyclinic.methods.table import FAMILIES

    if json_:
        print(json.dumps({family: [asdict(e) for e in entries] for family, entries in FAMILIES.items()}, indent=1))
        return
    for family, entries in FAMILIES.items():
        if entries:
            console.print(f"\n[bold]{family}[/bold]")
            for e in entries:
                console.print(
                    f"  [cyan]{e.name:<18}[/cyan] {e.summary} [dim]{e.paper}[/dim]", highlight=False, soft_wrap=True
                )
    console.print("\n[dim]polyclinic methods show NAME explains one.[/dim]")


@methods_app.command
def show(name: str, *, json_: bool = False) -> None:
    """Explain one method: what it does, what leaves a site, its options, whom to cite.

    Parameters
    ----------
    name
        As in a study file.
    json_
        Print JSON instead.
    """
    from polyclinic.methods.page import page

    told = page(name)
    if json_:
        print(json.dumps(told.as_dict(), indent=1))
    else:
        from rich.markdown import Markdown

        console.print(Markdown(told.as_markdown()))


def networks(*, json_: bool = False) -> None:
    """List the networks that a study may name.

    Parameters
    ----------
    json_
        Print JSON instead.
    """
    from polyclinic.tasks.networks import ARCHITECTURES

    rows = {name: (a.summary, dict(a.options)) for name, a in ARCHITECTURES.items()}
    _table(rows, json_)


def transforms(*, json_: bool = False) -> None:
    """List what may stand between a site and the server.

    Parameters
    ----------
    json_
        Print JSON instead.
    """
    from polyclinic.transforms import table

    rows = {}
    for name, entry in table.TRANSFORMS.items():
        options = {key: table.default(field) for key, field in table.options(entry).items()}
        rows[name] = (entry.summary, {k: "required" if v is ... else v for k, v in options.items()})
    _table(rows, json_)


def _table(rows: dict[str, tuple[str, dict[str, Any]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {"summary": s, "options": o} for name, (s, o) in rows.items()}, indent=1, default=str))
        return
    for name, (summary, options) in rows.items():
        given = ", ".join(f"{key} = {value}" for key, value in options.items())
        console.print(f"  [cyan]{name:<18}[/cyan] {summary} [dim]{given}[/dim]", highlight=False, soft_wrap=True)
