"""Is our pooled model as good as one that anyone would train on the same pooled data?

Trains plain models on the pooled training patients of the embedded nodules, with no framework: a PyTorch loop with the
same network, and a scikit-learn random forest on pixels. Compares their pooled test AUC with Polyclinic's ``mix``.

    python benchmarks/pooled.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from polyclinic.cli.run import template
from polyclinic.data.examples import concat
from polyclinic.data.federation import federate
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run

torch.set_num_threads(1)
text = template("demo-nodules").split("[[methods]]")[0] + '[[methods]]\nname = "mix"\n'
study = parse(text)
scores: dict[str, list[float]] = {"plain PyTorch": [], "random forest": [], "polyclinic mix": []}
with tempfile.TemporaryDirectory() as folder:
    for _ in run(study, text, Path(folder) / "run"):
        pass
    for seed in study.seeds:
        data = federate(study.data, seed)
        pool = {role: concat([data.sites[s][role] for s in data.training]) for role in ("train", "val", "test")}
        everything = {role: part[torch.arange(len(part))] for role, part in pool.items()}
        (x, y), (x_test, y_test) = everything["train"], everything["test"]

        torch.manual_seed(seed)
        model = Network("cnn", data.shape, 2, tuple(study.task.options.items()))()
        optimizer = torch.optim.SGD(model.parameters(), lr=study.training.lr)
        best, chosen = -1.0, np.zeros(len(y_test))
        for _ in range(study.rounds):
            model.train()
            for chunk in torch.randperm(len(y)).split(study.training.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chunk]), y[chunk]).backward()
                optimizer.step()
            model.eval()
            with torch.inference_mode():
                val = roc_auc_score(everything["val"][1], model(everything["val"][0]).softmax(1)[:, 1])
                if val > best:
                    best, chosen = val, model(x_test).softmax(1)[:, 1].numpy()
        scores["plain PyTorch"].append(roc_auc_score(y_test, chosen))
        forest = RandomForestClassifier(300, min_samples_leaf=3, random_state=seed).fit(x.flatten(1), y)
        scores["random forest"].append(roc_auc_score(y_test, forest.predict_proba(x_test.flatten(1))[:, 1]))
        said = read_tensors(Path(folder) / f"run/arms/mix-seed{seed}/predictions.safetensors")
        ours = [(said[f"{s}/score"][:, 1], said[f"{s}/target"]) for s in data.training]
        scores["polyclinic mix"].append(roc_auc_score(torch.cat([t for _, t in ours]), torch.cat([s for s, _ in ours])))

means = {name: float(np.mean(values)) for name, values in scores.items()}
print(json.dumps({"scores": {k: [round(v, 4) for v in vs] for k, vs in scores.items()}}))
for name in ("plain PyTorch", "random forest"):
    gap = means["polyclinic mix"] - means[name]
    told = {"name": f"pooled test AUC, mix minus {name}", "value": round(gap, 4), "goal": -0.02, "met": gap >= -0.02}
    print(json.dumps(told))
