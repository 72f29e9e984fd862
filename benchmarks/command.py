"""CPU time of ``polyclinic run`` over that of a process that runs the same federated averaging without a framework.

The work is ``many-small`` of benchmarks/peers: 23 sites, 20 rounds, a multilayer perceptron. The command also reads a
table, validates in every round, writes checkpoints, fits linear baselines, tests, and builds the report. Both processes
run in alternation; modules are compiled before. One JSON line for each pair, and one for the median.

    python benchmarks/command.py [--times 7] [--workers 2]
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))

STUDY = """
name = "many-small"
rounds = {rounds}
seeds = [0]

[data]
path = "table.csv"
kind = "table"
label = "label"

[task]
network = "mlp"
options = {{ width = 64, depth = 1 }}

[training]
lr = 0.05
batch_size = 16

[engine]
{engine}

[[methods]]
name = "fedavg"
"""


def prepare(folder: Path, workers: int) -> None:
    """Write the table and the study."""
    from work import WORKS

    work = WORKS["many-small"]
    with open(folder / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["site", "patient", "label", *(f"x{i}" for i in range(work.shape[0]))])
        for site, (x, y) in work.data().items():
            for i, (features, label) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
                rows.writerow([site, f"{site}-{i}", label, *features])
    engine = f'kind = "workers"\nworkers = {workers}' if workers else 'kind = "in-process"'
    (folder / "study.toml").write_text(STUDY.format(rounds=work.rounds, engine=engine))


def cpu(words: list[str], folder: Path) -> float:
    """Run a process, and return the CPU seconds that it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(words, check=True, cwd=folder, env=env, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(times: int, workers: int) -> None:
    """Compare the processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, workers)
        bare = [sys.executable, str(PEERS / "run_bare.py"), "many-small", temporary]
        ratios = []
        for i in range(times + 1):
            command = [sys.executable, "-m", "polyclinic.cli.app", "run", "study.toml", "--out", f"run-{i}"]
            pair = dict.fromkeys(("bare", "command"), 0.0)
            for name in sorted(pair, reverse=bool(i % 2)):
                pair[name] = cpu(bare if name == "bare" else command, folder)
            if i:  # the first pair compiles modules
                ratios.append(pair["command"] / pair["bare"])
                print(json.dumps(pair | {"ratio": round(ratios[-1], 3), "load": os.getloadavg()[0]}), flush=True)
        print(json.dumps({"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0, help="number of worker processes; in process by default")
    given = parser.parse_args()
    main(given.times, given.workers)
