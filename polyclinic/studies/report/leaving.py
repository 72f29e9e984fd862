"""Sections on what left each site: bytes, time, losses, and what bounds what it tells of a patient."""

from typing import Any

from markupsafe import Markup

from polyclinic.studies import figures
from polyclinic.studies.records import Privacy
from polyclinic.studies.report.blocks import Cell, Column, Folded, Picture, Section, Table, Text
from polyclinic.studies.report.page import Source
from polyclinic.studies.report.words import NONE, count, duration, many, number, size

MODES = {
    "in_process": "All sites were simulated in one process on one machine; the bytes are those of the tensors that would travel.",
    "workers": "All sites were simulated by worker processes on one machine; the bytes are those of the tensors that would travel.",
}


def leaving_section(page: Source) -> Section:
    """What each method sends, how much of it, how long it took, and who was lost."""
    title, run = "What left each hospital", page.run
    if not page.costs:
        return Section("leaving", title, [Text("No rounds were recorded.")])
    said: list[dict[str, Cell | str]] = [
        {"method": page.title(m.label), "leaves": m.leaves or "not stated"} for m in run.info.methods
    ]
    blocks: list[Any] = [
        Table(
            "leaves",
            "What a site sends under each method.",
            [Column("method", "Method", False), Column("leaves", "Leaves the site", False)],
            said,
        )
    ]
    rows: list[dict[str, Cell | str]] = []
    for label, c in page.costs.items():
        sites = sorted(c.up.keys() | c.down.keys() | c.seconds.keys())
        up, down = (sum(v.values()) / max(len(sites), 1) for v in (c.up, c.down))
        slow = max(c.seconds.values(), default=0.0)
        rows.append(
            {
                "method": page.title(label), "rounds": Cell(count(c.rounds), c.rounds), "up": Cell(size(up), up),
                "down": Cell(size(down), down), "wall": Cell(duration(c.wall), c.wall), "slow": Cell(duration(slow), slow),
                "target": Cell(NONE if c.reached is None else f"round {c.reached}, {size(c.bytes_to_target or 0)}", c.bytes_to_target),
            }
        )  # fmt: skip
    columns = [
        Column("method", "Method", False), Column("rounds", "Rounds"), Column("up", "Sent per site"),
        Column("down", "Received per site"), Column("wall", "Time"), Column("slow", "Work at the slowest site"),
        Column("target", "To the target, both ways"),
    ]  # fmt: skip
    note = "Means over seeds, for one seed’s whole run. "
    note += MODES.get(str(run.info.engine.get("kind", "")), f"Engine: {run.info.engine.get('kind', 'not stated')}.")
    if page.target is not None:
        note += f" Target: validation {page.label} of {number(page.target.value, page.digits)}, {page.target.meaning}."
    blocks.append(Table("costs", "Cost of each method.", columns, rows, note))
    if (picture := _trade_off(page)) is not None:
        blocks.insert(1, picture)
    blocks += _sites(page)
    blocks += _losses(page)
    return Section("leaving", title, blocks)


def _trade_off(page: Source) -> Picture | None:
    rows = []
    for m in page.result.methods:
        cost = page.costs.get(m.label)
        if cost is not None and m.macro.value is not None:
            rows.append(
                (page.title(m.label), cost.per_site / 1e6, m.macro.value, "baseline" if m.baseline else "plain")
            )
    if len({x for _, x, _, _ in rows}) < 2:
        return None
    alt = f"Mean {page.label} on test against megabytes a site sends and receives, one point a method; numbers in the tables."
    text = "Quality against traffic. Baselines (hollow) send nothing here; Mix would have to send the data themselves."
    ylabel = f"{page.label}, mean over sites"
    return Picture(figures.scatter("tradeoff", alt, rows, "MB sent and received per site", ylabel), text)


def _sites(page: Source) -> list[Any]:
    first = page.first
    cost = page.costs.get(first.label) if first is not None else None
    if first is None or cost is None:
        return []
    rows: list[dict[str, Cell | str]] = [
        {
            "site": s.name,
            "up": Cell(size(cost.up.get(s.name, 0)), cost.up.get(s.name, 0)),
            "down": Cell(size(cost.down.get(s.name, 0)), cost.down.get(s.name, 0)),
            "work": Cell(duration(cost.seconds.get(s.name, 0)), cost.seconds.get(s.name, 0)),
            "lost": Cell(count(sum(1 for x in cost.lost if x[2] == s.name)), sum(1 for x in cost.lost if x[2] == s.name)),
        }
        for s in page.run.info.sites
    ]  # fmt: skip
    columns = [
        Column("site", "Site", False), Column("up", "Sent"), Column("down", "Received"), Column("work", "Work"),
        Column("lost", "Replies lost (all seeds)"),
    ]  # fmt: skip
    return [Table("costs_by_site", f"{page.title(first.label)}, site by site, one seed.", columns, rows)]


def _losses(page: Source) -> list[Any]:
    rows: list[dict[str, Cell | str]] = [
        {"what": "lost", "method": page.title(label), "seed": str(seed), "round": str(r), "site": site, "reason": why}
        for label, c in page.costs.items()
        for seed, r, site, why in c.lost
    ]
    rows += [
        {
            "what": "refused",
            "method": page.title(q.method),
            "seed": str(q.seed),
            "round": str(q.round),
            "site": q.site,
            "reason": q.reason,
        }
        for q in page.run.quarantined
    ]
    if not rows:
        return [Text("Every site that was asked answered in every round, and no reply was refused.")]
    columns = [
        Column(k, k.capitalize(), k in ("seed", "round")) for k in ("what", "method", "seed", "round", "site", "reason")
    ]
    table = Table("losses", "Replies that did not come, and replies that were refused.", columns, rows)
    return [table if len(rows) <= 8 else Folded(f"{count(len(rows))} replies lost or refused", [table])]


def privacy_section(page: Source) -> Section:
    """What was spent where, and, where nothing was done, that nothing was done."""
    run, title = page.run, "Privacy"
    federated = [m.label for m in run.info.methods if not m.baseline]
    spent = {label: _last(label, page) for label in federated}
    bare = [page.title(k) for k, v in spent.items() if not v]
    blocks: list[Any] = []
    rows: list[dict[str, Cell | str]] = []
    for label, records in spent.items():
        for p in records:
            extra = {k: v for k, v in (p.model_extra or {}).items() if v is not None}
            rows.append(
                {
                    "method": page.title(label), "site": p.site or "all", "epsilon": Cell(NONE if p.epsilon is None else f"{p.epsilon:.3g}", p.epsilon),
                    "delta": Cell(NONE if p.delta is None else f"{p.delta:g}", p.delta), "unit": p.unit or NONE,
                    "rounds": NONE if p.round is None else str(p.round),
                    "how": "; ".join(f"{k} {v}" for k, v in sorted(extra.items())) or NONE,
                }
            )  # fmt: skip
    if rows:
        columns = [
            Column("method", "Method", False), Column("site", "Site", False), Column("epsilon", "ε"), Column("delta", "δ"),
            Column("unit", "Protects one", False), Column("rounds", "After round"), Column("how", "How", False),
        ]  # fmt: skip
        note = (
            "ε bounds how much the presence of one unit can change what an observer of the messages believes: its odds at "
            "most by a factor of exp(ε), but for probability δ. Smaller is more private. The largest value over seeds."
        )
        blocks.append(Table("privacy", "Differential privacy spent.", columns, rows, note))
        if (picture := _against_epsilon(page, spent)) is not None:
            blocks.append(picture)
    if bare:
        blocks.append(
            Text(
                Markup("<strong>No noise was added under {}.</strong> Keeping images at home is not yet privacy: weights and gradients "
                       "can tell who took part in training, and under some conditions show what they were trained on.").format(", ".join(bare))
            )
        )  # fmt: skip
    if not federated:
        blocks.append(Text("No federated method is in this study; nothing left a site."))
    return Section("privacy", title, blocks)


def _last(label: str, page: Source) -> list[Privacy]:
    """For each site the record with the largest ε: budgets only grow."""
    found: dict[str | None, Privacy] = {}
    for p in page.run.privacy:
        if p.method == label and (p.site not in found or (p.epsilon or 0) >= (found[p.site].epsilon or 0)):
            found[p.site] = p
    return [found[k] for k in sorted(found, key=lambda k: k or "")]


def _against_epsilon(page: Source, spent: dict[str, list[Privacy]]) -> Picture | None:
    rows = []
    for label, records in spent.items():
        known = [p.epsilon for p in records if p.epsilon is not None]
        result = next((m for m in page.result.methods if m.label == label), None)
        if known and result is not None and result.macro.value is not None:
            rows.append((page.title(label), max(known), result.macro.value, "plain"))
    if len(rows) < 2:
        return None
    alt = f"Mean {page.label} against the privacy budget ε for {many(len(rows), 'method')}; the numbers are in the tables."
    picture = figures.scatter("epsilon", alt, rows, "ε (smaller is more private)", f"{page.label}, mean over sites")
    return Picture(picture, "What privacy costs: quality against ε.")
