"""pfl-research, simulated backend in one process."""

import itertools

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F
from work import BATCH, LR, Work, main, orders, timed, weights_of


def run(work: Work):
    data, order = work.data(), orders(work)
    rounds_of = {site: (r for r in range(work.rounds) if (site, r) in order) for site in data}
    network = work.model()
    network.loss = lambda x, y, **_: F.cross_entropy(network(x), y)
    network.metrics = lambda x, y, **_: {}

    def dataset_of(site: str) -> Dataset:
        x, y = data[site]
        now = order[site, next(rounds_of[site])]
        return Dataset([x[now], y[now]], user_id=site)

    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    asked = itertools.chain.from_iterable(work.cohort(r) for r in range(work.rounds))
    sites = FederatedDataset(dataset_of, asked.__next__)
    backend = SimulatedBackend(sites, sites, [WeightByDatapoints()])
    settings = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH)
    rounds = NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=work.asked or work.sites,
        val_cohort_size=0,
    )
    loop_cpu = timed(lambda: FederatedAveraging().run(rounds, backend, model, settings, None, []))
    return weights_of(network), loop_cpu


if __name__ == "__main__":
    main("pfl", run)
