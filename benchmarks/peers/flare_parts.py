"""The server and the sites of FLARE's simulation, in a module that the simulator's processes can import."""

import numpy as np
import torch
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from work import WORKS, orders, train_epoch, weights_of


class Server(FedAvg):
    """FLARE's federated averaging, which begins with the work's weights and writes the last ones to ``file``."""

    def __init__(self, work: str, file: str) -> None:
        size = WORKS[work]
        super().__init__(num_clients=size.sites, num_rounds=size.rounds, persistor_id="", task_check_period=0.05)
        self.work, self.file = work, file

    def load_model(self) -> FLModel:
        return FLModel(params=weights_of(WORKS[self.work].model()))

    def save_model(self, model: FLModel) -> None:
        if self.current_round + 1 == WORKS[self.work].rounds:
            np.savez(self.file, **model.params)


class TrainedSite(Executor):
    """A site of ``work``, which its name selects."""

    def __init__(self, work: str) -> None:
        super().__init__()
        self.work, self.ready = work, None

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        if self.ready is None:
            size, site = WORKS[self.work], fl_ctx.get_identity_name()
            given = orders(size)
            self.ready = size.model(), *size.data()[site], [given[site, r] for r in range(size.rounds)]
        (model, x, y, order), sent = self.ready, FLModelUtils.from_shareable(shareable)
        model.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in sent.params.items()})
        train_epoch(model, x, y, order[sent.current_round])
        reply = FLModel(
            params=weights_of(model),
            params_type=ParamsType.FULL,
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: len(y)},  # the weight in the average
        )
        return FLModelUtils.to_shareable(reply)
