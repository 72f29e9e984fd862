"""Do topologies without a server reach FedAvg? ``python benchmarks/topologies.py`` writes docs/results/topologies.md.

Heart disease at four hospitals, the same network, the same local training and as many rounds for all. AUC on each
hospital's test patients, mean over hospitals, on ten random splits; differences are paired by split (``resplits``). The
order of cyclic transfer is judged by how many patients the model calls ill, with the hospital last where 93 % are ill or
the one where 36 % are; with short turns and with long ones. In one row the elected merger is killed at random.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import HEART, mlp, read, sites_of
from resplits import WHAT, compared, level_of, text_of

from polyclinic.core.rounds import Arrival, train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.topology.cyclic import Cyclic
from polyclinic.methods.topology.gossip import Gossip
from polyclinic.methods.topology.split_learning import Split
from polyclinic.methods.topology.swarm import Swarm
from polyclinic.statistics.auc import auc_of as areas
from polyclinic.statistics.paired_tests import corrected_t

ROUNDS, LOCAL, LONG = (
    20,
    LocalTraining(epochs=2, batch_size=16, lr=0.05),
    LocalTraining(epochs=10, batch_size=16, lr=0.1),
)
NAMES = ("cleveland", "hungarian", "switzerland", "va")
MOST_ILL_LAST = ("hungarian", "cleveland", "va", "switzerland")
FEWEST_ILL_LAST = MOST_ILL_LAST[::-1]
DEATHS = 0.4
SHARES = (0.25, 0.6)  # of patients, in the test and training data of a split


class Killing(InProcess):
    """Kills a site that merges with probability ``DEATHS``, after its work and before its answer."""

    killed = 0

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        for arrival in list(super().replies(deadline)):
            merging = arrival.reply is not None and "merged" in arrival.reply.parts
            if merging and bool(torch.rand((), generator=self.dice) < DEATHS):
                self.killed += 1
                yield arrival._replace(reply=None, lost="killed")
            else:
                yield arrival


def methods(task: Any) -> dict[str, Any]:
    """By name, all for the same task."""
    return {
        "fedavg": FedAvg(task, LOCAL),
        "fedavg, equal sites": FedAvg(task, LOCAL, uniform=True),
        "swarm": Swarm(task, LOCAL),
        "swarm, mergers killed": Swarm(task, LOCAL, deputies=0),
        "gossip, ring": Gossip(task, LOCAL, 2, "ring"),
        "gossip, random": Gossip(task, LOCAL, 2, "random"),
        "cyclic": Cyclic(task, NAMES, LOCAL),
        "cyclic, reversed": Cyclic(task, NAMES[::-1], LOCAL),
        "cyclic, shuffled": Cyclic(task, NAMES, LOCAL, shuffle=True),
        "cyclic, Zurich last": Cyclic(task, MOST_ILL_LAST, LOCAL),
        "cyclic, Budapest last": Cyclic(task, FEWEST_ILL_LAST, LOCAL),
        "cyclic, long turns, Zurich last": Cyclic(task, MOST_ILL_LAST, LONG),
        "cyclic, long turns, Budapest last": Cyclic(task, FEWEST_ILL_LAST, LONG),
        "split": Split(task, NAMES, LOCAL, u_shaped=False),
        "u-split": Split(task, NAMES, LOCAL),
    }


def run(label: str, seed: int) -> dict[str, Any]:
    """AUC of all test patients, accuracy by hospital, exchanges and megabytes."""
    data = read(HEART, seed)
    sites, task = sites_of(data, seed), mlp(*data.shape)
    method = methods(task)[label]
    engine: InProcess = InProcess(method, sites, seed=seed)
    if "killed" in label:
        engine = Killing(method, sites, seed=seed)
        engine.dice = torch.Generator().manual_seed(seed)  # type: ignore[attr-defined]
    state, exchanges, moved = method.init(task.first(seed)), 0, 0
    for step in train(method, engine, state, rounds=ROUNDS, min_replies=0 if "killed" in label else 1):
        state, exchanges = step.state, exchanges + 1
        moved += sum(step.bytes_up.values()) + sum(step.bytes_down.values())
    trial, by_site = method.evaluation_request(state), {}
    score, target = [], []
    for name in NAMES:
        said = outputs(task, method.site_model(trial.for_site(name), engine.memory[name]), sites[name].data["test"])
        by_site[name] = float((said["score"].argmax(1) == said["target"]).float().mean())
        score.append(said["score"])
        target.append(said["target"])
    own = [auc_of(s, t) for s, t in zip(score, target, strict=True)]
    unmerged = sum(name == "" for name in getattr(state, "merged", ()))
    called = float((torch.cat(score).argmax(1) == 1).float().mean())
    return {
        "auc": float(np.nanmean(own)),
        "undefined": int(np.isnan(own).sum()),
        "called_ill": called,
        "sites": by_site,
        "exchanges": exchanges,
        "mb": moved / 1e6,
        "killed": getattr(engine, "killed", 0),
        "unmerged": unmerged,
    }


def auc_of(score: torch.Tensor, target: torch.Tensor) -> float:
    """Return the AUC of one hospital's test patients; NaN if all are of one class."""
    x, y = score[:, 1].double().numpy(), target.numpy()
    return float(areas(x, y == 1, np.ones((1, len(y))))[0])


HEAD = """# Topologies: learning without a central server

Written by `python benchmarks/topologies.py`; every number was measured. Heart disease at four hospitals, {rounds}
rounds, {splits} random splits; AUC within each hospital, mean over hospitals, of the model with which its site predicts. (An
earlier version of this page gave the AUC of all hospitals' patients together, which the name of the hospital alone raises to
0.72, and intervals of a bootstrap over splits, which are too narrow.) These are simulations: one program carries
all messages. They show what is learned and how many messages that needs, not that others cannot read them.

The question is whether a topology is equivalent to FedAvg within one point of AUC. {what} *Equivalent* means that two one-sided
tests at 2.5 %, with the same variance and Holm's correction, exclude a difference of 0.01 in both directions.

| method | AUC | compared with FedAvg | within 0.01 | exchanges | MB |
|---|---|---|---|---|---|
"""

ORDER = """
## The order of a cycle

The percentage of all hospitals' test patients that the model classifies as ill at the end of a cycle, if the hospital that trained last
was that with the most ill patients (Zurich and Basel, 93 %) or that with the fewest (Budapest, 36 %). A long turn is ten passes at
twice the learning rate.

| turns | Zurich and Basel last | Budapest last | difference |
|---|---|---|---|
"""


def page(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The study as Markdown."""
    splits, base = len(rows["fedavg"]), np.array([r["auc"] for r in rows["fedavg"]])
    gaps = {k: np.array([r["auc"] for r in found]) - base for k, found in rows.items() if k != "fedavg"}
    shown, within = compared(gaps, *SHARES), compared(gaps, *SHARES, "equivalence", 0.01)
    lines = []
    for label, found in rows.items():
        auc = np.array([r["auc"] for r in found])
        beside, equal = ("", "") if label == "fedavg" else (text_of(shown[label], 3), within[label].verdict())
        exchanges, mb = (np.mean([r[key] for r in found]) for key in ("exchanges", "mb"))
        lines.append(f"| {label} | {level_of(auc, 3)} | {beside} | {equal} | {exchanges:.0f} | {mb:.1f} |")
    equal_sites = np.array([r["auc"] for r in rows["fedavg, equal sites"]])
    gossip = np.array([r["auc"] for r in rows["gossip, ring"]]) - equal_sites
    against = text_of(corrected_t(gossip, *SHARES), 3)
    lines += [
        "",
        f"Gossip weights all sites equally. Compared with FedAvg with equal sites, the ring differs by {against}.",
    ]
    killed = rows["swarm, mergers killed"]
    died, idle = np.mean([r["killed"] for r in killed]), sum(r["unmerged"] for r in killed)
    lines += [
        "",
        f"With a probability of {DEATHS:g} that an elected site is killed, {died:.1f} were killed per run; in {idle} of "
        f"{ROUNDS * splits} rounds no site was left to merge, and all runs completed.",
    ]
    order = []
    for turns, label in (("short", "cyclic"), ("long", "cyclic, long turns")):
        last = [
            np.array([100 * r["called_ill"] for r in rows[f"{label}, {who} last"]]) for who in ("Zurich", "Budapest")
        ]
        gap = text_of(corrected_t(last[0] - last[1], *SHARES))
        order.append(f"| {turns} | {level_of(last[0])} | {level_of(last[1])} | {gap} |")
    called = np.array([100 * r["called_ill"] for r in rows["fedavg"]])
    order.append(f"\nFedAvg, which has no order, classifies {level_of(called)} % as ill.")
    head = HEAD.format(rounds=ROUNDS, splits=splits, what=WHAT) + "\n".join(lines) + "\n"
    return head + ORDER + "\n".join(order) + "\n"


def main() -> None:
    """Run the cases that have no record yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument(
        "--records", type=Path, default=Path("runs/topologies.jsonl"), help="results so far, to go on from"
    )
    parser.add_argument("--quick", action="store_true", help="two splits; prints the page, writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.records.parent.mkdir(parents=True, exist_ok=True)
    lines = given.records.read_text().splitlines() if given.records.exists() else []
    done = {tuple(row["case"]): row for row in map(json.loads, lines)}
    labels, splits = list(methods(mlp(4))), 2 if given.quick else given.splits
    with open(given.records, "a") as file:
        for seed in range(splits):
            for label in labels:
                if (label, seed) not in done:
                    done[label, seed] = {"case": (label, seed), **run(label, seed)}
                    file.write(json.dumps(done[label, seed]) + "\n")
                    file.flush()
    text = page({label: [done[label, seed] for seed in range(splits)] for label in labels})
    if given.quick:
        print(text)
        return
    out = Path(__file__).parent.parent / "docs" / "results" / "topologies.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)


if __name__ == "__main__":
    main()
