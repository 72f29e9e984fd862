"""Draws the figure of docs/results/survey-experiment.md: ``python benchmarks/survey_figure.py runs/survey``.

From the runs that ``polyclinic run examples/survey.toml`` leaves: each strategy's mean over sites, with its 95 % interval,
in the survey's order from the worst to the best. Prints the table as well.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from polyclinic.evaluation.run_comparison import panel

OUT = Path(__file__).parents[1] / "docs" / "pictures" / "survey.png"
ORDER = {
    "cross": "Cross",
    "single": "Single",
    "local": "Local",
    "fedsgd": "FedSGD",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "mix": "Mix",
    "pooled": "Pooled",
}
TITLES = {"real": "Sex, six real sites", "simulated": "Patients, two simulated scanners"}


def main(folder: str) -> None:
    runs = sorted(path for path in Path(folder).iterdir() if (path / "run.json").exists())
    names = [path.name.rpartition("-")[0] for path in runs]
    found = panel(runs, names=names)
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 2.8), sharey=True, layout="constrained")
    for ax, name in zip(axes, names, strict=True):
        for row, method in enumerate(ORDER):
            e = found.estimates[name, method]
            ax.plot([e.low, e.high], [row, row], color="#4477aa", lw=2)
            ax.plot(e.value, row, "o", color="#222222")
            print(f"| {name} | {method} | {e.value:.3f} ({e.low:.3f} to {e.high:.3f}) |")
        ax.set(title=TITLES[name], xlabel="Balanced accuracy, mean over sites", yticks=range(len(ORDER)))
        ax.set_yticklabels(ORDER.values())
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, dpi=150)
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1])
