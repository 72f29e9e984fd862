"""HistoFL: weakly supervised learning from whole slides, with noise on the weights that leave a site.

Lu, Chen, Kong, Lipkova, Singh, Williamson, Chen and Mahmood, "Federated learning for computational pathology on
gigapixel whole slide images", Medical Image Analysis 76:102298, 2022, https://arxiv.org/abs/2009.10190, with the
official settings (https://github.com/mahmoodlab/HistoFL). A slide is a bag of patch features with one label; use the
network ``attention-mil``. The site adds to every weight ``α · std · N(0, 1)``, with the standard deviation of its
tensor; biases and running statistics have no noise. Departure: the official code adds the noise of all sites at the
server without their weights; here it is averaged with the sites' weights, and of K equal sites a K-th of that.

**This noise is not calibrated**: nothing is clipped and no privacy budget can be computed from it. For a guarantee,
send FedAvg through ``clip`` and ``gaussian`` instead.
"""

from dataclasses import dataclass

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.task import InRunningStatistics
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class HistoFL(FedAvg):
    """FedAvg whose sites add noise to their weights before they send them.

    Attributes:
        noise: α, the noise in standard deviations of each tensor; 0, 0.001, 0.01, 0.1 and 1 in the paper.
    """

    noise: float = 0.001

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng, running = request.trees["params"], site.secret_rng(), InRunningStatistics(self.task)
        end = dict(self.local.fit(self.task, start, site, request.round))
        for name, leaf in end.items():
            if self.noise and not running(name) and not name.endswith("bias") and leaf.numel() > 1:
                # W ← W + α · std(W) · N(0, 1)
                end[name] = leaf + self.noise * leaf.std() * rng.normal(*leaf.shape).to(leaf)
        return Reply({"update": self.update(end, start, site)}), memory
