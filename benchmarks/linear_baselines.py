"""Regularized logistic regression and FedAvg on the tables of domain_shift: ``python benchmarks/linear_baselines.py``.

A baseline that overfits makes federation look better than it is. Here a logistic regression (C fixed before, one value for
each table) is fitted at each site alone, and on all sites' patients together, on the same splits as FedAvg with the network
of docs/results/domain-shift.md. It prints the table of that page.
"""

import argparse

import numpy as np
import torch
from domain_shift import STUDIES, scored
from resplits import compared, level_of, text_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

TABLES = {
    "Heart disease, 4 hospitals": (0.1, 10),
    "Sex from brain regions, 6 scanners": (0.01, 5),
    "Sex from brain regions, 10 scanners": (0.01, 5),
}


def model(c: float) -> Pipeline:
    """Return a regularized logistic regression of standardized features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000))


def one(title: str, c: float, seed: int) -> dict[str, float]:
    """Return the AUC of every model on one split, mean over the sites that trained, in hundredths."""
    study = STUDIES[title]
    sites = {n: s for n, s in study.sites(seed).items() if len(s.data.get("train", ()))}
    parts = {
        name: {
            role: tuple(v.numpy() for v in data[torch.arange(len(data))])
            for role, data in site.data.items()
            if role in ("train", "test")
        }
        for name, site in sites.items()
    }
    tested = [n for n, p in parts.items() if len(set(p["test"][1].tolist())) > 1]
    x, y = (np.concatenate([p["train"][i] for p in parts.values()]) for i in (0, 1))
    pooled = model(c).fit(x, y)

    def mean(of: dict[str, Pipeline | None]) -> float:
        scores = [
            0.5 if of[n] is None else roc_auc_score(parts[n]["test"][1], of[n].predict_proba(parts[n]["test"][0])[:, 1])
            for n in tested
        ]
        return 100 * float(np.mean(scores))

    alone = {n: model(c).fit(*p["train"]) if len(set(p["train"][1].tolist())) > 1 else None for n, p in parts.items()}
    fedavg = [100 * r["score"] for r in scored(study, "fedavg", seed) if r["seen"]]
    return {
        "FedAvg": float(np.nanmean(fedavg)),
        "logistic regression, each site alone": mean(alone),
        "logistic regression, all in one place": mean(dict.fromkeys(parts, pooled)),
    }


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    print("| table | model | AUC, % | compared with FedAvg, points |")
    print("|---|---|---|---|")
    for title, (c, splits) in TABLES.items():
        rows = [one(title, c, seed) for seed in range(splits)]
        values = {k: np.array([row[k] for row in rows]) for k in rows[0]}
        gaps = compared({k: v - values["FedAvg"] for k, v in values.items() if k != "FedAvg"}, 0.3, 0.7)
        for k, v in values.items():
            beside = "" if k == "FedAvg" else text_of(gaps[k])
            print(f"| {title}, {splits} splits | {k} | {level_of(v)} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
