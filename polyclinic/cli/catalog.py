"""``polyclinic methods``, ``networks`` and ``transforms``: the names that a study can use."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cyclopts import App

from polyclinic.cli.rendering import Json, console, document, hint

methods_app = App(name="methods", help="List the federated methods, by the survey's taxonomy.")


@methods_app.default
def methods(*, json_: Json = False) -> None:
    """List every method with one line each."""
    from polyclinic.methods.catalog import FAMILIES

    with document(json_) as emit:
        emit({family: [asdict(e) for e in entries] for family, entries in FAMILIES.items()})
        for family, entries in FAMILIES.items():
            if entries:
                console.print(f"\n[bold]{family}[/bold]")
                _columns([(e.name, e.summary, f"{e.paper} ({e.fidelity.partition(':')[0]})") for e in entries])
    if not json_:
        hint("\npolyclinic methods show NAME explains one.")


@methods_app.command
def show(name: str, *, json_: Json = False) -> None:
    """Explain one method: what it does, what leaves a site, its options, and the paper to cite.

    Args:
        name: The name of the method in a study file.
    """
    from polyclinic.methods.method_page import page

    about = page(name)
    with document(json_) as emit:
        emit(about.as_dict())
        if not console.is_terminal:
            print(about.as_markdown())
        else:
            from rich.markdown import Markdown

            console.print(Markdown(about.as_markdown()))


def networks(*, json_: Json = False) -> None:
    """List the networks that a study can name, with their parameters and the memory that training needs.

    Memory is an estimate for one example in float32: weights, gradients and the moments of Adam, and what PyTorch keeps
    for the backward pass. It grows with the batch, and with the size of an image: --json states the size measured.
    """
    from polyclinic.learning.networks.architectures import ARCHITECTURES, sizes

    known = sizes()
    with document(json_) as emit:
        emit(
            {
                name: {
                    "summary": a.summary,
                    "purpose": a.purpose,
                    "paper": a.paper,
                    "options": dict(a.options),
                    "sizes": {dims: asdict(size) for dims, size in known[name].items()},
                }
                for name, a in ARCHITECTURES.items()
            }
        )
        for purpose in dict.fromkeys(a.purpose for a in ARCHITECTURES.values()):
            console.print(f"\n[bold]for {purpose}[/bold]")
            rows = [(name, a) for name, a in ARCHITECTURES.items() if a.purpose == purpose]
            _columns([(name, _summary(a), _facts(known[name], a.options)) for name, a in rows])
    if not json_:
        hint("\nParameters, and memory of training with one example, in 2-D / 3-D; see docs/reference/networks.md.")


def _summary(architecture: Any) -> str:
    return f"{architecture.summary} ({architecture.paper})" if architecture.paper else str(architecture.summary)


def _facts(known: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return sizes in words, and the options with their defaults."""
    parameters = " / ".join(f"{size.parameters / 1e6:.3g}" for size in known.values())
    memory = " / ".join(f"{size.training_bytes / 2**30:.2g}" for size in known.values())
    given = ", ".join(f"{key} = {value}" for key, value in options.items() if value is not None)
    return f"{parameters} M, {memory} GiB" + (f"; {given}" if given else "")


def transforms(*, json_: Json = False) -> None:
    """List the transforms that a study can apply to what travels between sites and server."""
    from polyclinic.compression import transform_table

    rows = {}
    for name, entry in transform_table.TRANSFORMS.items():
        options = {key: transform_table.default(field) for key, field in transform_table.options(entry).items()}
        rows[name] = (entry.summary, {k: "required" if v is ... else v for k, v in options.items()})
    _table(rows, json_)


def _table(rows: dict[str, tuple[str, dict[str, Any]]], as_json: bool) -> None:
    with document(as_json) as emit:
        emit({name: {"summary": summary, "options": options} for name, (summary, options) in rows.items()})
        given = {name: ", ".join(f"{k} = {v}" for k, v in options.items()) for name, (_, options) in rows.items()}
        _columns([(name, summary, given[name]) for name, (summary, _) in rows.items()])


def _columns(rows: list[tuple[str, str, str]]) -> None:
    """Print (name, summary, more) in columns, wrapped to a terminal's width; one line each without a terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        width = max((len(summary) for _, summary, _ in rows), default=0)
        for name, summary, more in rows:
            print(f"  {name:<18}  {summary:<{width}}  {more}".rstrip())
        return
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=18, no_wrap=True, style="cyan")
    table.add_column(ratio=3, min_width=30)
    table.add_column(ratio=2, style="dim")
    for name, summary, more in rows:
        table.add_row(Text(name), Text(summary), Text(more))
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
