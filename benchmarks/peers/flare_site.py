"""The training script of a site in NVIDIA FLARE's simulator, and the network as its configuration names it."""

import sys

import nvflare.client as flare
from torch import nn
from work import WORKS, orders, train_epoch


class Network(nn.Module):
    """The network of a work."""

    def __init__(self, work: str) -> None:
        super().__init__()
        self.inner = WORKS[work].model()


if __name__ == "__main__":
    work = WORKS[sys.argv[1]]
    flare.init()
    data, order, model, asked = work.data(), orders(work), Network(sys.argv[1]), 0
    while flare.is_running():
        message = flare.receive()
        if message is None:
            break
        site = flare.get_site_name()
        model.load_state_dict(message.params)
        x, y = data[site]
        train_epoch(model.inner, x, y, order[site, asked])
        asked += 1
        steps = {"NUM_STEPS_CURRENT_ROUND": len(y)}  # the weight of the mean
        flare.send(flare.FLModel(params=model.cpu().state_dict(), meta=steps))
