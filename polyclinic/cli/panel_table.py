"""The table of methods over data sets, which ``polyclinic panel`` and runs of several scenarios print."""

from typing import TYPE_CHECKING, Any

from polyclinic.cli.rendering import line

if TYPE_CHECKING:
    from polyclinic.evaluation.run_comparison import Panel


def show_panel(panel: "Panel") -> None:
    """Print methods over data sets."""
    width = max(14, *(len(method) + 2 for method in panel.methods))
    line("  " + " " * 30 + "".join(f"{method:>{width}}" for method in panel.methods))
    for run, values in zip(panel.runs, panel.values, strict=True):
        line(f"  {run:<30}" + "".join(f"{number(value):>{width}}" for value in values))
    for method, (better, worse) in panel.gains.items():
        line(f"  {method}: better than local training at {better} sites, worse at {worse}")
    if panel.ranking is None:
        line("  A ranking needs at least three runs and three methods.")
        return
    r = panel.ranking
    ranks = ", ".join(f"{m} {rank:.2f}" for m, rank in zip(r.methods, r.ranks, strict=True))
    line(f"  mean ranks over {r.blocks} data sets: {ranks}")
    line(f"  critical difference {r.critical:.2f}; Friedman p = {r.p:.3g}")


def panel_json(panel: "Panel") -> dict[str, Any]:
    """Return the table as JSON: estimates by run and method, ranks and gains."""
    metrics = dict(zip(panel.runs, panel.metrics, strict=True))
    return {
        "methods": [
            {"run": run, "metric": metrics[run], "method": method, "patients": e.n}
            | {"value": e.value, "low": e.low, "high": e.high}
            for (run, method), e in panel.estimates.items()
        ],
        "ranking": panel.ranking,
        "gains": {method: {"better": up, "worse": down} for method, (up, down) in panel.gains.items()},
    }


def number(value: float | None) -> str:
    """Return three decimals, or a dash without a value."""
    from polyclinic.evaluation.site_scores import decimals

    return "—" if value is None else decimals(value)
