"""ComBat from federated sums: removes each scanner's offset and scale from every feature.

Johnson, Li and Rabinovic, "Adjusting batch effects in microarray expression data using empirical Bayes methods",
Biostatistics 2007, https://doi.org/10.1093/biostatistics/kxj037; for scanners: Fortin et al., NeuroImage 2018,
https://doi.org/10.1016/j.neuroimage.2017.11.024; without pooling: Chen, Luo, Chen, Shinohara and Shou,
"Privacy-preserving harmonization via distributed ComBat", NeuroImage 2022,
https://doi.org/10.1016/j.neuroimage.2021.118822.

The result is that of ComBat on pooled data. The server receives two sums: those of the regression, then the squared
residuals. The empirical Bayes step uses only a site's own data and stays there. The sums contain each site's own row,
so that secure summation does not hide it: a site discloses its mean of each feature and its number of examples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.affine import AffineInput
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.harmonization.empirical_bayes import offsets
from polyclinic.methods.harmonization.input_front import fronted, in_front
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal


@savable("combat.State", 1)
class State(NamedTuple):
    """Estimates of ``y = α + γ_site + β·c + σε``: α, σ [F], β [c, F], n; γ [F] by site; whether sites have them."""

    fit: Tree
    gamma: Trees
    sigma: Tree
    sent: bool


@dataclass(frozen=True)
class ComBat:
    """Estimates, for each site and feature, the scanner's offset γ and scale δ, shrunk towards their mean.

    Attributes:
        sites: The sites that take part.
        covariates: Columns of the table whose effect is preserved, such as age and sex; they are not changed
            themselves.
        shrink: Whether to shrink a site's offsets and scales towards their mean (empirical Bayes).
    """

    task: Task
    sites: tuple[str, ...]
    covariates: tuple[int, ...] = ()
    shrink: bool = True

    capabilities = Capabilities()

    def __post_init__(self) -> None:
        if self.covariates and len(self.task.network.inputs) > 1:
            raise ConfigError("combat's covariates are columns of a table; images have none: leave covariates empty")

    def init(self, params: Tree) -> State:
        return State({}, {}, {}, False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("regress"), once("residuals"), once("adjust", static=False)

    def request(self, state: State) -> Request | None:
        if state.sent:
            return None
        job = "adjust" if state.sigma else "residuals" if state.fit else "regress"
        each = {name: {"own": leaves} for name, leaves in state.gamma.items()}
        return Request(0, {"fit": state.fit, "sigma": state.sigma}, job, each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        y, c = self._table(site)
        if request.job == "regress":
            row = torch.zeros(len(y), len(self.sites), dtype=torch.float64)
            row[:, self.sites.index(site.name)] = 1.0
            X = torch.cat([row, c], 1)
            return Reply({"sums": WeightedMean({"XX": X.T @ X, "Xy": X.T @ y}, 1.0)}), memory
        fit = request.trees["fit"]
        mean = fit["alpha"] + c @ fit["beta"]
        if request.job == "residuals":
            residual = y - mean - request.trees["own"]["gamma"]
            return Reply({"sums": WeightedMean({"square": residual.square().sum(0)}, 1.0)}), memory
        sigma = request.trees["sigma"]["sigma"]
        gamma, delta = offsets((y - mean) / sigma, self.shrink)
        return Reply(), {**memory, "own": self._front(fit["alpha"], fit["beta"], sigma, gamma, delta)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.sigma:
            return state._replace(sent=True)
        sums = {name: leaf.double() for name, leaf in reply.mean("sums").total.items()}  # secure sums are float32
        if state.fit:  # σ² = RSS / n; a feature that never varies keeps its scale
            sigma = (sums["square"] / state.fit["n"]).sqrt()
            return state._replace(sigma={"sigma": torch.where(sigma > 1e-12, sigma, 1.0)})
        B = torch.linalg.pinv(sums["XX"], hermitian=True) @ sums["Xy"]
        K, counts = len(self.sites), sums["XX"].diagonal()[: len(self.sites)]
        alpha = counts @ B[:K] / counts.sum()  # the grand mean Σ n_i/n γ̂_i
        gamma = {name: {"gamma": B[k] - alpha} for k, name in enumerate(self.sites)}
        return state._replace(fit={"alpha": alpha, "beta": B[K:], "n": counts.sum()}, gamma=gamma)

    def front(self, state: State) -> Tree:
        F, c = len(self._kept), len(self.covariates)
        zero, one = torch.zeros(F, dtype=torch.float64), torch.ones(F, dtype=torch.float64)
        return self._front(zero, torch.zeros(c, F, dtype=torch.float64), one, zero, one)

    def _front(self, alpha: Tensor, beta: Tensor, sigma: Tensor, gamma: Tensor, delta: Tensor) -> Tree:
        """Return ``σ ((x − α − βc)/σ − γ)/√δ + α + βc`` as ``scale · x + shift + carry · c``; covariates stay."""
        shape, kept, k = self.task.network.inputs, self._kept, 1 / delta.sqrt()
        size = torch.Size(shape).numel()
        scale, shift, carry = torch.ones(size), torch.zeros(size), torch.zeros(size, len(self.covariates))
        scale[kept], shift[kept] = k.float(), (alpha * (1 - k) - sigma * gamma * k).float()
        carry[kept] = (beta * (1 - k)).T.float()
        leaves = {"front.scale": scale.reshape(shape), "front.shift": shift.reshape(shape)}
        return {**leaves, "front.carry": carry} if self.covariates else leaves

    @property
    def _kept(self) -> list[int]:
        """The features that are harmonized: all but the covariates."""
        return [v for v in range(torch.Size(self.task.network.inputs).numel()) if v not in self.covariates]

    def _table(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return a site's features [n, F] and covariates [n, c], in double precision."""
        data = site.data["train"]
        y = data[torch.arange(len(data))][0].double().flatten(1)
        if not bool(y.isfinite().all()):
            raise ConfigError(f"combat needs complete data, but {site.name!r} has missing values: impute them first")
        return y[:, self._kept], y[:, list(self.covariates)]


def combat(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    *,
    covariates: tuple[int, ...] = (),
    shrink: bool = True,
    uniform: bool = False,
) -> Prepared:
    """Compose the estimation of ComBat with FedAvg on the harmonized features.

    Args:
        covariates: Columns of the table whose effect is preserved, such as age and sex.
    """
    task = fronted(task, AffineInput(task.network.inputs, covariates))
    return Prepared(
        ComBat(task, sites, covariates, shrink), Personal(FedAvg(task, local, uniform=uniform), in_front), task
    )
