"""``polyclinic methods``, ``networks`` and ``transforms``: what a study may name."""

import json
from dataclasses import asdict
from typing import Any

from cyclopts import App

from polyclinic.cli.rendering import console

methods_app = App(name="methods", help="The federated methods, by the survey's taxonomy.")


@methods_app.default
def methods(*, json_: bool = False) -> None:
    """List every method with one line each.

    Args:
        json_: Print JSON instead.
    """
    from polyclinic.methods.catalog import FAMILIES

    if json_:
        print(json.dumps({family: [asdict(e) for e in entries] for family, entries in FAMILIES.items()}, indent=1))
        return
    for family, entries in FAMILIES.items():
        if entries:
            console.print(f"\n[bold]{family}[/bold]")
            _columns([(e.name, e.summary, e.paper) for e in entries])
    console.print("\n[dim]polyclinic methods show NAME explains one.[/dim]")


@methods_app.command
def show(name: str, *, json_: bool = False) -> None:
    """Explain one method: what it does, what leaves a site, its options, whom to cite.

    Args:
        name: As in a study file.
        json_: Print JSON instead.
    """
    from polyclinic.methods.method_page import page

    told = page(name)
    if json_:
        print(json.dumps(told.as_dict(), indent=1))
    elif not console.is_terminal:
        print(told.as_markdown())
    else:
        from rich.markdown import Markdown

        console.print(Markdown(told.as_markdown()))


def networks(*, json_: bool = False) -> None:
    """List the networks that a study may name.

    Args:
        json_: Print JSON instead.
    """
    from polyclinic.learning.networks.network_catalog import ARCHITECTURES

    rows = {name: (a.summary, dict(a.options)) for name, a in ARCHITECTURES.items()}
    _table(rows, json_)


def transforms(*, json_: bool = False) -> None:
    """List what may stand between a site and the server.

    Args:
        json_: Print JSON instead.
    """
    from polyclinic.compression import transform_table

    rows = {}
    for name, entry in transform_table.TRANSFORMS.items():
        options = {key: transform_table.default(field) for key, field in transform_table.options(entry).items()}
        rows[name] = (entry.summary, {k: "required" if v is ... else v for k, v in options.items()})
    _table(rows, json_)


def _table(rows: dict[str, tuple[str, dict[str, Any]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {"summary": s, "options": o} for name, (s, o) in rows.items()}, indent=1, default=str))
        return
    given = {name: ", ".join(f"{k} = {v}" for k, v in options.items()) for name, (_, options) in rows.items()}
    _columns([(name, summary, given[name]) for name, (summary, _) in rows.items()])


def _columns(rows: list[tuple[str, str, str]]) -> None:
    """Prints (name, what it is, what else) in columns: wrapped to a terminal's width, else one line each."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        wide = max((len(summary) for _, summary, _ in rows), default=0)
        for name, summary, more in rows:
            print(f"  {name:<18}  {summary:<{wide}}  {more}".rstrip())
        return
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=18, no_wrap=True, style="cyan")
    table.add_column(ratio=3, min_width=30)
    table.add_column(ratio=2, style="dim")
    for name, summary, more in rows:
        table.add_row(Text(name), Text(summary), Text(more))
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
