"""Is learning without a central server equivalent to FedAvg? ``python benchmarks/topologies.py`` writes its page.

The page is docs/results/topologies.md. Its main part is ``studies/topologies.toml``, which contains question, metric, margin
and test. Two things that a study file cannot say are measured on ten random splits: the order of a cycle, judged by how
many patients the model calls ill with the hospital last where 93 % are ill or the one where 36 % are; and swarm learning
whose elected merger is killed at random.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import mlp, sites_of
from resplits import level_of, text_of
from study_pages import Results, arguments, changes_of, declared_table, finished, megabytes, publish, row

from polyclinic.core.rounds import Arrival, train
from polyclinic.data.federation import DataSpec, federate
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.topology.cyclic import Cyclic
from polyclinic.methods.topology.swarm import Swarm
from polyclinic.report.formatting import number, with_interval
from polyclinic.statistics.paired_tests import corrected_t

DATA = {"use": "heart-disease", "split": (0.6, 0.15, 0.25)}
SHARES = (0.25, 0.6)
"""Fractions of patients in the test and training data of a split."""
ROUNDS, SPLITS, DEATHS = 20, 10, 0.4
SHORT, LONG = LocalTraining(epochs=2, batch_size=16, lr=0.05), LocalTraining(epochs=10, batch_size=16, lr=0.1)
MOST_ILL_LAST = ("budapest", "cleveland", "long-beach", "zurich-basel")
FEWEST_ILL_LAST = MOST_ILL_LAST[::-1]
KILLED = "swarm, mergers killed"


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
        "fedavg": FedAvg(task, SHORT),
        KILLED: Swarm(task, SHORT, deputies=0),
        "short, Zurich last": Cyclic(task, MOST_ILL_LAST, SHORT),
        "short, Budapest last": Cyclic(task, FEWEST_ILL_LAST, SHORT),
        "long, Zurich last": Cyclic(task, MOST_ILL_LAST, LONG),
        "long, Budapest last": Cyclic(task, FEWEST_ILL_LAST, LONG),
    }


def case(label: str, seed: int, rounds: int) -> dict[str, float]:
    """Return the percentage of all test patients that the model calls ill, mergers killed, and rounds without a merger."""
    data = federate(DataSpec.model_validate(DATA), seed)
    sites, task = sites_of(data, seed), mlp(*data.shape)
    method = methods(task)[label]
    engine: InProcess = InProcess(method, sites, seed=seed)
    if label == KILLED:
        engine = Killing(method, sites, seed=seed)
        engine.dice = torch.Generator().manual_seed(seed)  # type: ignore[attr-defined]
    state = method.init(task.first(seed))
    for step in train(method, engine, state, rounds=rounds, min_replies=0 if label == KILLED else 1):
        state = step.state
    trial, classes = method.evaluation_request(state), []
    for name, site in sites.items():
        found = outputs(task, method.site_model(trial.for_site(name), engine.memory[name]), site.data["test"])
        classes.append(found["score"].argmax(1))
    return {
        "called_ill": 100 * float((torch.cat(classes) == 1).float().mean()),
        "killed": float(getattr(engine, "killed", 0)),
        "unmerged": float(sum(name == "" for name in getattr(state, "merged", ()))),
    }


def cases(file: Path, splits: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the results of every case on every split; those in ``file`` are not computed again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    done = {tuple(one["case"]): one["found"] for one in map(json.loads, lines)}
    labels = list(methods(mlp(4)))
    with open(file, "a") as records:
        for seed in range(splits):
            for label in labels:
                if (label, seed, rounds) not in done:
                    done[label, seed, rounds] = case(label, seed, rounds)
                    line = {"case": (label, seed, rounds), "found": done[label, seed, rounds]}
                    records.write(json.dumps(line) + "\n")
                    records.flush()
    return {label: [done[label, seed, rounds] for seed in range(splits)] for label in labels}


HEAD = """# Topologies: learning without a central server

Written by `python benchmarks/topologies.py`, which resumes. Coronary artery disease at four hospitals (920 patients), a network with
16 hidden units, {rounds} rounds of two local epochs. These are simulations: one program carries all messages. They show what is learned
and how many bytes that needs, not that others cannot read them.

**Question.** Is learning without a central server equivalent to FedAvg within one point of AUC? The metric is the AUC within each
hospital, mean over the four, of the model with which the hospital predicts; over five folds every patient is tested once for each of
{seeds} seeds. Equivalence means that two one-sided t-tests at 2.5 % (variance over patients and between seeds, Holm over the seven
comparisons) exclude a difference of 0.010 in both directions. `benchmarks/studies/topologies.toml` declared all of this before its first run.

## Answer

"""

LEVELS = """
Zurich and Basel have eight patients without disease, so that the AUC there is the least certain of the four. Gossip weights hospitals
equally, and so does `fedavg-equal`, its reference. "Linear, local" and "Linear, pooled" are [linear baselines](../explanation/evaluation.md#baselines).
MB are what all hospitals sent and received in one run.

"""

ORDER = """
## The order of a cycle

The percentage of all hospitals' test patients that the model calls ill at the end of a cycle, if the hospital that trained last was
the one with the most ill patients (Zurich and Basel, 93 %) or the one with the fewest (Budapest, 36 %). A long turn is ten
epochs at twice the learning rate. {splits} random splits; differences are paired by split, with Nadeau and Bengio's interval for repeated
splits of the same patients. This part was not declared in a study file.

| turns | Zurich and Basel last | Budapest last | difference |
|---|---|---|---|
"""


def answer(found: Results) -> str:
    """Return the answer in sentences that follow from the verdicts."""
    by = {"same": list[str](), "equivalent": list[str](), "different": list[str](), "open": list[str]()}
    for c in found.result.declared:
        verdict = c.difference.verdict()
        key = "equivalent" if verdict == "equivalent" else "different" if verdict.startswith("different") else "open"
        key = "same" if c.difference.value == 0 and c.difference.low is None else key
        by[key].append(f"`{c.method}`")
    sentences = {
        "same": "Equal to its reference for every patient: {}.",
        "equivalent": "Equivalent within one point of AUC: {}.",
        "different": "Different by more than one point: {}.",
        "open": "Equivalence was not shown, which is no evidence of a difference: {}.",
    }
    return " ".join(sentences[key].format(", ".join(names)) for key, names in by.items() if names)


def levels(found: Results) -> list[str]:
    """Return the level of every method and baseline, as a Markdown table."""
    lines = [row("method", "AUC, mean over hospitals (95 % CI)", "SD over seeds", "MB"), row(*["---"] * 4)]
    for m in found.result.methods:
        mb = f"{megabytes(found, m.label):.1f}"
        lines.append(row(m.label, with_interval(m.macro, 3), number(m.seed_sd, 3), mb))
    for m in found.result.linear:
        name = m.label.replace("linear-", "Linear, ")
        lines.append(row(name, with_interval(m.macro, 3), number(m.seed_sd, 3), "–"))
    return lines


def order(found: Mapping[str, Sequence[Mapping[str, float]]], rounds: int) -> str:
    """Return the part on the order of a cycle and on killed mergers."""
    ill = {label: np.array([one["called_ill"] for one in rows]) for label, rows in found.items()}
    splits, lines = len(ill["fedavg"]), []
    for turns in ("short", "long"):
        last = [ill[f"{turns}, {who} last"] for who in ("Zurich", "Budapest")]
        gap = text_of(corrected_t(last[0] - last[1], *SHARES)) if splits > 2 else "not tested"
        lines.append(row(turns, *map(level_of, last), gap))
    killed = found[KILLED]
    died, idle = np.mean([one["killed"] for one in killed]), sum(one["unmerged"] for one in killed)
    text = ORDER.format(splits=splits) + "\n".join(lines)
    text += f"\n\nFedAvg, which has no order, calls {level_of(ill['fedavg'])} % ill.\n\n## Killed mergers\n\n"
    text += f"Swarm learning without deputies, whose elected site is killed with a probability of {DEATHS:g} after its work: "
    text += (
        f"{died:.1f} were killed per run; in {idle:.0f} of {rounds * splits} rounds no site was left to merge, and all "
    )
    return text + "runs completed.\n"


def main() -> None:
    """Run what has no record yet, and write the page."""
    given = arguments(__doc__ or "")
    found = finished("topologies", given.runs, changes_of(given))
    rounds, splits = (2, 2) if given.quick else (ROUNDS, SPLITS)
    cycles = cases(given.runs / "topologies.jsonl", splits, rounds)
    head = HEAD.format(rounds=found.run.info.rounds, seeds=len(found.run.info.seeds))
    page = head + answer(found) + "\n\n" + "\n".join(declared_table(found)) + "\n\n" + "\n".join(levels(found)) + "\n"
    publish(page + LEVELS.rstrip() + "\n" + order(cycles, rounds), "topologies", given)


if __name__ == "__main__":
    main()
