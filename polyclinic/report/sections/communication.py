"""The section on communication: what leaves each site, bytes, time and lost replies."""

from typing import Any

from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, count, duration, number, size, whole
from polyclinic.report.page_blocks import Cell, Folded, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.studies.records import time_profile

MODES = {
    "in-process": "All sites were simulated in one process on one machine",
    "workers": "All sites were simulated by worker processes on one machine",
}


def leaving_section(page: ReportContext) -> Section:
    """Return the section: what each method sends, its volume, its time, and lost or refused replies."""
    title = "Communication"
    sent: list[Row] = [
        {
            "method": page.title(m.label),
            "does": _capital(m.title) if m.title.lower() not in (m.label, m.name) else NONE,
            "options": ", ".join(f"{k} = {v}" for k, v in m.options.items()) or NONE,
            "leaves": _capital(m.leaves or "not stated"),
        }
        for m in page.run.info.methods
    ]
    columns = words(method="Method", does="Description", options="Options", leaves="What leaves a site")
    columns = [c for c in columns if any(row[c.key] != NONE for row in sent)]
    leaves = Table("leaves", "The methods, and what leaves a site with each.", columns, sent)
    if not page.costs:
        return Section("leaving", title, [leaves, Text("No round was recorded.")])
    costs = [_costs(page), *_times(page), *_sites(page)]
    return Section("leaving", title, [leaves, *_trade_off(page), *costs, *_losses(page)])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _costs(page: ReportContext) -> Table:
    rows: list[Row] = []
    for label, c in page.costs.items():
        n = max(len(c.up.keys() | c.down.keys()), 1)
        up, down, slow = sum(c.up.values()) / n, sum(c.down.values()) / n, max(c.seconds.values(), default=0.0)
        to = NONE if c.reached is None else f"round {c.reached}, {size(c.bytes_to_target or 0)}"
        if c.in_one_place:
            to = NONE if c.reached is None else f"round {c.reached}"
        rows.append(
            {
                "method": page.title(label),
                "rounds": whole(c.rounds),
                "up": Cell("the data", None) if c.in_one_place else Cell(size(up), up),
                "down": Cell(NONE, None) if c.in_one_place else Cell(size(down), down),
                "wall": Cell(duration(c.wall), c.wall),
                "slow": Cell(duration(slow), slow),
                "target": Cell(to, c.bytes_to_target),
            }
        )
    columns = words(method="Method") + numbers(rounds="Rounds", up="Sent per site", down="Received per site")
    columns += numbers(wall="Time", slow="Computing time, slowest site", target="To the target, sent and received")
    mode = str(page.run.info.engine.get("kind", ""))
    note = "For the complete run of one seed, mean over seeds. "
    note += (
        f"{MODES[mode]}; bytes are those of the tensors that would be sent." if mode in MODES else f"Engine: {mode}."
    )
    if page.target is not None:
        value = number(page.target.value, page.digits)
        note += f" Target: validation {page.label} of {value}, {page.target.meaning}."
    return Table("costs", "Cost of each method.", columns, rows, note)


def _times(page: ReportContext) -> list[Table]:
    """Return the table of where the time went, of a run with ``--profile``."""
    profile = time_profile.read(page.run.path)
    if profile is None or not profile["method_runs"]:
        return []
    rows: list[Row] = []
    for one in profile["method_runs"]:
        fold = f", fold {one['fold']}" if "fold" in one else ""
        cells = {name: Cell(duration(one["phases"][name]), one["phases"][name]) for name in time_profile.PHASES}
        computing = sum(one["sites"].values())
        cells["computing"] = Cell(duration(computing), computing)
        rows.append({"method": f"{page.title(one['method'])}, seed {one['seed']}{fold}", **cells})
    columns = words(method="Method run")
    columns += numbers(**{name: name.capitalize() for name in time_profile.PHASES}, computing="Computing, all sites")
    parts = {"cluster": "connecting to the cluster", "reading": "reading the data", "baselines": "linear baselines"}
    told = [f"{parts[name]} {duration(s)}" for name, s in time_profile.run_parts(profile).items() if name in parts]
    note = f"Outside of method runs: {', '.join(told)}. The report is not included. "
    return [Table("times", "Where the time went.", columns, rows, note + " ".join(time_profile.notes(profile)))]


def _trade_off(page: ReportContext) -> list[Picture]:
    rows = []
    for m in page.result.methods:
        cost, mean = page.costs.get(m.label), m.macro.value
        if cost is not None and mean is not None and not cost.in_one_place:
            rows.append((page.title(m.label), cost.per_site / 1e6, mean, "baseline" if m.baseline else "plain"))
    if len({x for _, x, _, _ in rows}) < 2:
        return []
    alt = f"Mean {page.label} on test patients against megabytes that a site sends and receives; numbers in the tables."
    text = "Quality against communication. Hollow markers are baselines. Methods that move the data are omitted."
    drawn = figures.scatter("tradeoff", alt, rows, "MB sent and received per site", f"{page.label}, mean over sites")
    return [Picture(drawn, text)]


def _sites(page: ReportContext) -> list[Table]:
    first = page.first
    cost = page.costs.get(first.label) if first is not None else None
    if first is None or cost is None:
        return []
    rows: list[Row] = []
    for name in (s.name for s in page.run.info.sites if s.role == "training"):
        up, down, work = (v.get(name, 0.0) for v in (cost.up, cost.down, cost.seconds))
        cells = {"up": Cell(size(up), up), "down": Cell(size(down), down), "work": Cell(duration(work), work)}
        rows.append({"site": name, **cells, "lost": whole(sum(x[2] == name for x in cost.lost))})
    columns = words(site="Site") + numbers(
        up="Sent", down="Received", work="Computing time", lost="Replies lost, all seeds"
    )
    return [Table("costs_by_site", f"{page.title(first.label)}, by site.", columns, rows)]


def _losses(page: ReportContext) -> list[Any]:
    rows: list[Row] = [
        {"what": "lost", "method": page.title(m), "seed": str(seed), "round": str(r), "site": site, "reason": why}
        for m, c in page.costs.items()
        for seed, r, site, why in c.lost
    ]
    for q in page.run.quarantined:
        row = {"what": "refused", "method": page.title(q.method), "seed": str(q.seed), "round": str(q.round)}
        rows.append(row | {"site": q.site, "reason": q.reason})
    if not rows:
        return [Text("Every site replied in every round in which it was asked, and no reply was refused.")]
    columns = words(what="Status", method="Method") + numbers(seed="Seed", round="Round")
    columns += words(site="Site", reason="Reason")
    table = Table("losses", "Lost and refused replies.", columns, rows)
    return [table if len(rows) <= 8 else Folded(f"{count(len(rows))} replies lost or refused", [table])]
