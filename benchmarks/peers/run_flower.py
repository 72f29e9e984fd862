"""Flower's simulation on Ray, one core per client. Its loop runs in other processes, so only whole processes compare."""

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import sys

import numpy as np
import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from work import WORKS, Work, main, orders, train_epoch

WORK = WORKS[sys.argv[1]] if len(sys.argv) > 1 else None
_final: list[list[np.ndarray]] = []


class Client(NumPyClient):
    """One site."""

    def __init__(self, work: Work, number: int) -> None:
        self.site, self.work = work.names()[number], work
        self.x, self.y = work.data()[self.site]

    def fit(self, parameters, config):
        model = self.work.model()
        model.load_state_dict({k: torch.from_numpy(v) for k, v in zip(model.state_dict(), parameters, strict=True)})
        train_epoch(model, self.x, self.y, orders(self.work)[self.site, config["round"]])
        return [leaf.numpy() for leaf in model.state_dict().values()], len(self.y), {}


class Recording(FedAvg):
    """FedAvg that keeps its last result."""

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        _final.append(parameters_to_ndarrays(parameters))
        return parameters, metrics


def run(work: Work):
    name, model = sys.argv[1], work.model()

    def client_fn(context: Context):
        return Client(WORKS[name], int(context.node_config["partition-id"])).to_client()

    def server_fn(context: Context) -> ServerAppComponents:
        strategy = Recording(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=work.sites,
            min_available_clients=work.sites,
            initial_parameters=ndarrays_to_parameters([leaf.numpy() for leaf in model.state_dict().values()]),
            on_fit_config_fn=lambda server_round: {"round": server_round - 1},
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=work.rounds))

    run_simulation(
        ServerApp(server_fn=server_fn),
        ClientApp(client_fn=client_fn),
        num_supernodes=work.sites,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"include_dashboard": False},
        },
    )
    return dict(zip(model.state_dict(), _final[-1], strict=True)), None


if __name__ == "__main__":
    main("flower", run)
