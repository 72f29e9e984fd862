"""The structure that PFLlib has, written anew: one client object with its own model each, and a server of models."""

import copy

from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from work import BATCH, LR, Work, main, orders, timed, weights_of


class Client:
    """A client, which keeps its own model."""

    def __init__(self, model: nn.Module, x, y) -> None:
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.loss, self.optimizer = nn.CrossEntropyLoss(), optim.SGD(self.model.parameters(), lr=LR)

    def set_parameters(self, model: nn.Module) -> None:
        for new, old in zip(model.parameters(), self.model.parameters(), strict=True):
            old.data = new.data.clone()

    def train(self, order) -> None:
        self.model.train()
        for x, y in DataLoader(TensorDataset(self.x, self.y), BATCH, sampler=order.tolist()):
            self.optimizer.zero_grad()
            self.loss(self.model(x), y).backward()
            self.optimizer.step()


def run(work: Work):
    order, model = orders(work), work.model()
    clients = {site: Client(model, x, y) for site, (x, y) in work.data().items()}

    def loop() -> None:
        nonlocal model
        for r in range(work.rounds):
            chosen = {site: clients[site] for site in work.cohort(r)}
            total = sum(len(client.y) for client in chosen.values())
            for site, client in chosen.items():
                client.set_parameters(model)
                client.train(order[site, r])
            model = copy.deepcopy(model)
            for p in model.parameters():
                p.data.zero_()
            for client in chosen.values():
                for p, own in zip(model.parameters(), client.model.parameters(), strict=True):
                    p.data += own.data.clone() * (len(client.y) / total)

    loop_cpu = timed(loop)
    return weights_of(model), loop_cpu


if __name__ == "__main__":
    main("pflib_style", run)
