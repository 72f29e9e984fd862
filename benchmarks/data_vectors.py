"""One message from each hospital: ``python benchmarks/data_vectors.py`` writes docs/results/data-vectors.md.

Images of one source are divided among six simulated sites whose shares of classes differ (Dirichlet 1.0). The first serves
as a public collection: the common model is trained on its training images, and its validation images are the restoration
set, which selects λ and re-estimates batch normalization. The other five fine-tune that model, each alone, and send
the change. Every model is evaluated on the test images of these five sites together.

The merge is compared with the common model, each site alone, all five sites' images in one place, FedAvg over as many rounds as
each site has epochs, and random vectors with the norms of the real ones, tensor by tensor.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import pooled, read, sites_of
from resplits import compared, text_of

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.data_vectors import DataVectors
from polyclinic.methods.one_shot.merging import Merging, merged, random_like, restored
from polyclinic.methods.optimization.fedavg import FedAvg

DEALT = {"sites": {"partition": "dirichlet", "count": 6, "alpha": 1.0}, "split": (0.5, 0.2, 0.3)}
DATA: dict[str, dict[str, Any]] = {
    "nodules": {"use": "lidc-nodules", **DEALT, "max_patients": 120},
    "busi": {
        "kind": "npz",
        "path": "$POLYCLINIC_DATA/busi/busi_128.npz",
        "duplicates": "drop",
        "steps": ({"step": "resize", "size": (32, 32)},),
        **DEALT,
    },
}
EPOCHS, ALONE = 10, "each site alone, mean"
LOCAL = LocalTraining(epochs=EPOCHS, batch_size=16, optimizer="adam", lr=1e-3)
MERGES = {
    "merged, λ searched": Merging(),
    "merged, λ = 1 (the paper's sum)": Merging(scale=1.0),
    "merged, λ = 1/K (the mean)": Merging(scale=0.2),
    "merged, TIES 20 %": Merging(ties=0.2),
    "merged, by layer": Merging(by_layer=True),
    "merged, λ searched, tuned": Merging(tune=2),
}


def measure(which: str, seed: int) -> dict[str, Any]:
    """Scores of every model on one split, and whether removal and a late site were exact."""
    data = read(DATA[which], seed)
    sites = sites_of(data, seed)
    names = sorted(sites)
    public, rest = sites[names[0]], {name: sites[name] for name in names[1:]}
    task = Classification(Network("cnn", data.shape, len(data.info.classes), (("width", 16), ("depth", 3))))
    base = replace(LOCAL, epochs=3 * EPOCHS).fit(task, task.first(seed), public, 0)
    server, test = Site("server", {"val": public.data["val"]}, seed=seed), pooled(rest)

    def judged(params: Tree) -> dict[str, float]:
        said = task.summary(outputs(task, params, test))
        return {name: said[name] for name in ("accuracy", "balanced_accuracy", "auc")}

    found: dict[str, Any] = {"common model": judged(base)}
    method = DataVectors(task, LOCAL, sites=tuple(rest))
    state, request = method.init(base), method.request(method.init(base))
    assert request is not None
    replies = {name: method.site_update(request, {}, site)[0] for name, site in rest.items()}
    for name in rest:  # one after the other, as they are ready
        state = method.server_update(state, replies[name], server)
    vectors = {name: tree.under("vector", leaves) for name, leaves in state.sent.items()}
    alone = [judged(restored(task, tree.shift(base, v), server.data["val"])) for v in vectors.values()]
    own = [judged({**base, **tree.shift(base, v), **tree.under("running", state.sent[n])}) for n, v in vectors.items()]
    found[ALONE] = {key: float(np.mean([one[key] for one in own])) for key in own[0]}
    found["each site alone, restored, mean"] = {key: float(np.mean([one[key] for one in alone])) for key in alone[0]}
    found["best site alone"] = {key: max(one[key] for one in own) for key in own[0]}
    for label, how in MERGES.items():
        params, scale = merged(how, task, base, vectors, LOCAL, server.data["val"])
        found[label] = {**judged(params), "scale": scale}
    rng = server.rng("random vectors")
    random = {name: random_like(vector, rng) for name, vector in vectors.items()}
    found["random vectors, λ searched"] = judged(merged(Merging(), task, base, random, LOCAL, server.data["val"])[0])
    found["random vectors, λ = 1/K"] = judged(
        merged(Merging(scale=0.2), task, base, random, LOCAL, server.data["val"])[0]
    )
    everyone = Site("everyone", {"train": pooled(rest, "train")}, seed=seed)
    found["all images in one place"] = judged(LOCAL.fit(task, base, everyone, 0))
    rounds = FedAvg(task, replace(LOCAL, epochs=1))
    for step in train(rounds, InProcess(rounds, rest, seed=seed), rounds.init(base), rounds=EPOCHS):
        end = step.state.params
    found[f"FedAvg, {EPOCHS} rounds"] = judged(end)
    exact = 0
    for name in rest:
        without, never = method.without(state, name, server), method.init(base)
        for other in reversed([one for one in rest if one != name]):  # in another order, too
            never = method.server_update(never, replies[other], server)
        exact += all(torch.equal(leaf, never.params[key]) for key, leaf in without.params.items())
    found["removed to the bit"] = [exact, len(rest)]
    return found


def span(x: np.ndarray) -> str:
    """Mean, and the least and the most of all splits."""
    return f"{x.mean():.1f} ({x.min():.1f} to {x.max():.1f})"


def page(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The study as Markdown."""
    lines = [HEAD]
    for which, rows in found.items():
        lines += [
            f"## {which}",
            "",
            f"{len(rows)} splits.",
            "",
            "| model | AUC, % (least to most) | compared with each site alone, points | balanced accuracy, % |",
            "|---|---|---|---|",
        ]
        base = np.array([100 * row[ALONE]["auc"] for row in rows])
        labels = [label for label, first in rows[0].items() if isinstance(first, dict)]
        areas = {label: np.array([100 * row[label]["auc"] for row in rows]) for label in labels}
        gaps = compared({k: v - base for k, v in areas.items() if k != ALONE}, 0.3, 0.5)
        for label, first in rows[0].items():
            if isinstance(first, dict):
                area = areas[label]
                right = np.array([100 * row[label]["balanced_accuracy"] for row in rows])
                beside = "" if label == ALONE else text_of(gaps[label])
                lines.append(f"| {label} | {span(area)} | {beside} | {span(right)} |")
        chosen = ", ".join(f"{row['merged, λ searched']['scale']:g}" for row in rows)
        exact = [sum(row["removed to the bit"][i] for row in rows) for i in (0, 1)]
        lines += [
            "",
            f"λ was chosen as {chosen}, of 0.05, 0.1, 0.15, 0.2, 0.4 … 1. Removing a site gave the model of a merge without it, bit for bit, in "
            f"{exact[0]} of {exact[1]} removals.",
            "",
        ]
    return "\n".join(lines)


HEAD = """# Data vectors: one message, merged

Written by `python benchmarks/data_vectors.py`; every number of the tables was measured.

Outlines of lung nodules and breast ultrasound images of one source are divided among six simulated sites whose shares of classes
differ (Dirichlet 1.0). The first serves as a public collection: the common model is trained on its training images, and its
validation images are the restoration set, which selects λ and re-estimates batch normalization. The other five fine-tune
that model for ten passes, each alone, and send the change. Every model is evaluated on the test images of these five
sites together.

- *Each site alone* keeps its own statistics of batch normalization; *restored*, it has those of the restoration set. It is
  judged on all five sites' images, whose prevalence is not its own.
- *Best site alone* is selected by the test images themselves: it is no estimate of what a site reaches.
- *Random vectors* have the norms of the real ones, tensor by tensor, and are merged and restored in the same way.
- *All images in one place* and *FedAvg* begin from the common model, too, and train for as many passes; FedAvg in as many rounds.

**Summary.** The mean of the vectors has a higher AUC than the sites alone: on ultrasound by 5.3 points with an interval of
0.3 to 10.3, which does not survive Holm's correction for thirteen comparisons, on nodules by 2.4 points with an interval that
includes 0. **No difference between the merge and FedAvg, and none between the merge and random vectors, was tested**: the statements of
earlier versions ("within a point of FedAvg", "above random vectors") are withdrawn. The question is equivalence with FedAvg, which
needs a declared margin and more than five re-splits. The search for λ chose the lower end of its grid in ten of ten searches, so that
the best λ may lie below it. On ultrasound the balanced accuracy of three classes is 42 to 59 % (chance is 33 %).

A late site needs no other site: a site's message does not depend on earlier messages, and the merge is computed again from
all vectors in name order. The order of arrival and removed sites therefore change no bit, which is counted below.

Intervals of differences are Nadeau and Bengio's for repeated splits of the same patients, computed from the printed
intervals of the runs, which were Student's over splits and excluded 0 in 9 to 13 % of studies without any difference. A
difference is bold if Holm's correction over its table leaves p < 0.05; of all others these data show nothing, in neither
direction.
"""


def main() -> None:
    """Run the study and write the page; finished parts are kept, so that a stopped study can be resumed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--keep", type=Path, default=Path("data-vectors.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    for seed in range(given.splits):
        for which in DATA:
            if len(found.setdefault(which, [])) <= seed:
                found[which].append(measure(which, seed))
                given.keep.write_text(json.dumps(found))
                print(which, seed, json.dumps(found[which][-1]), flush=True)
    out = Path(__file__).parents[1] / "docs" / "results" / "data-vectors.md"
    out.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
