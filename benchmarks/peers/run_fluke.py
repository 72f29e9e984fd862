"""fluke in one process: its own clients, channel, server and algorithm, over loaders that keep the work's order."""

import time

import torch
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver
from work import BATCH, LR, Work, main, orders, weights_of


class GivenOrder(FastDataLoader):
    """A loader of fluke whose epochs have the work's orders instead of a shuffled one."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, epochs: list[torch.Tensor]) -> None:
        super().__init__(x, y, num_labels=2, batch_size=BATCH, shuffle=False)
        self.given, self.epochs = (x, y), iter(epochs)

    def __iter__(self):
        order = next(self.epochs)
        self.tensors = [tensor[order] for tensor in self.given]
        return super().__iter__()


class LastRound(FederationObserver):
    """Notes the CPU time at the end of each round: after the last one, fluke sends the model to all clients again."""

    ended = 0.0

    def end_round(self, round: int) -> None:
        self.ended = time.process_time()


def run(work: Work):
    order = orders(work)
    step = OptimizerConfigurator({"name": "SGD", "lr": LR})
    clients = [
        Client(
            index=i,
            train_set=GivenOrder(x, y, [order[site, r] for r in range(work.rounds)]),
            test_set=None,
            optimizer_cfg=step,
            loss_fn=torch.nn.CrossEntropyLoss(),
            local_epochs=1,
        )
        for i, (site, (x, y)) in enumerate(work.data().items())
    ]
    server = Server(model=work.model(), test_set=None, clients=clients, weighted=True)
    federation = FedAVG(n_clients=work.sites, data_splitter=None, hyper_params={}, clients=clients, server=server)
    watch = LastRound()
    federation.set_callbacks(watch)
    begun = time.process_time()
    federation.run(n_rounds=work.rounds, eligible_perc=1)
    return weights_of(server.model), watch.ended - begun


if __name__ == "__main__":
    main("fluke", run)
