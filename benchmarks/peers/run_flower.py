"""Flower's simulation, with the Ray that it installs; two clients at once."""

import os
import sys
from pathlib import Path

os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the processes that Ray starts
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}

from flower_site import client_app
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Work, main


def run(work: Work):
    if work.asked is not None:
        raise SystemExit("Flower draws the sites of a round itself")
    server_app, weights = ServerApp(), {}

    @server_app.main()
    def serve(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=work.sites, min_available_nodes=work.sites)
        found = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(work.model().state_dict()),
            num_rounds=work.rounds,
            train_config=ConfigRecord({"work": sys.argv[1]}),
        )
        weights.update({name: leaf.numpy() for name, leaf in found.arrays.to_torch_state_dict().items()})

    resources = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=work.sites, backend_config=resources)
    return weights, None


if __name__ == "__main__":
    main("flower", run)
