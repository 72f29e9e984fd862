"""Survival: the time to an event, which is censored for patients who were last seen without it.

- ``hazards = "discrete"``: a probability of the event in each interval between ``cuts``, given survival up to it, from
  which survival probabilities follow. Michael Gensheimer and Balasubramanian Narasimhan, "A scalable discrete-time
  survival model for neural networks", PeerJ 2019, https://doi.org/10.7717/peerj.6257. The loss is a sum over patients,
  so it federates exactly, and DP-SGD bounds each patient. Departure: an event at a cut belongs to the interval that
  ends there, as in Kaplan and Meier's curve, not to the next one.
- ``hazards = "proportional"``: Cox's partial likelihood of the patients of a batch (David Faraggi and Richard Simon, "A
  neural network model for survival data", Statistics in Medicine 1995, https://doi.org/10.1002/sim.4780140108; Jared
  Katzman and others, "DeepSurv", BMC Medical Research Methodology 2018, https://doi.org/10.1186/s12874-018-0482-1).
  Departures: patients are compared within a batch, not within the whole data, and ties are Breslow's. Risk sets never
  cross sites: federated, this is Cox's model stratified by site, in which each site has a baseline hazard of its own.
  The model ranks patients and predicts no probabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.statistics import survival

Hazards = Literal["discrete", "proportional"]
SMALLEST, MOST_CUTS = 1e-7, 1000


def outputs_for(options: Mapping[str, Any]) -> int:
    """Return the number of outputs of the network for a task's ``options``: one for each interval, or one."""
    return len(options.get("cuts", ())) if options.get("hazards", "discrete") == "discrete" else 1


@dataclass(frozen=True)
class Survival(Task):
    """Survival analysis. Targets are float [b, 2]: the time, above 0, and the event, 1 or 0 for censored.

    Attributes:
        cuts: The ends of the intervals in the unit of the times, ascending; the first interval begins at 0. Survival is
            predicted and judged up to the last, the horizon. They must be equal at all sites.
        hazards: ``"discrete"`` or ``"proportional"``, as in the module's docstring.
    """

    cuts: tuple[float, ...] = ()
    hazards: Hazards = "discrete"

    kind: ClassVar[str] = "survival"

    def __post_init__(self) -> None:
        if not 2 <= len(self.cuts) <= MOST_CUTS or any(
            not a < b < float("inf") for a, b in pairwise((0.0, *self.cuts))
        ):
            raise ConfigError(
                f"cuts = {list(self.cuts[:10])}: give 2 to {MOST_CUTS} times above 0 in ascending order, in the unit "
                "of the data, such as cuts = [365, 730, 1095]"
            )

    @property
    def by_example(self) -> bool:
        """Whether the loss of a batch is a mean over its examples; Cox's partial likelihood compares them."""
        return self.hazards == "discrete"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the negative log likelihood of the batch, per patient (discrete) or per event (proportional)."""
        output = model(batch[0])
        time, event = batch[1][:, 0], batch[1][:, 1]
        if self.hazards == "proportional":
            return partial_likelihood_loss(output[:, 0], time, event)
        return hazard_loss(output, time, event, self._cuts(output))

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``score``, ``target`` [b, 2] and ``times`` [b, m], the cuts.

        The score is the probability of surviving beyond each cut [b, m], or for proportional hazards the negative
        log hazard relative to other patients [b, 1]; both are higher for a longer expected survival.
        """
        output = model(batch[0]).float()
        if self.hazards == "proportional":
            score = -output
        else:
            score = F.logsigmoid(-output).cumsum(1).exp()  # S(t_k) = Π (1 − h_j)
        return {"score": score, "target": batch[1], "times": self._cuts(score).expand(len(score), -1)}

    def guess(self, score: Tensor) -> float:
        """Return equal survival of all patients."""
        return 0.5 if self.hazards == "discrete" else 0.0

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute the loss, Harrell's C if patients can be compared, and for discrete hazards the Brier score."""
        from_model, target = outputs["score"], outputs["target"]
        time, event = (target[:, i].double().numpy() for i in (0, 1))
        score, at, one = from_model.double().numpy(), np.asarray(self.cuts), np.ones((1, len(target)))
        if self.hazards == "proportional":
            metrics = {"loss": float(partial_likelihood_loss(-from_model[:, 0], target[:, 0], target[:, 1]))}
            order = score[:, 0]
        else:
            before = np.concatenate([np.ones((len(score), 1)), score[:, :-1]], axis=1)
            hazard = torch.from_numpy(1 - score / np.maximum(before, SMALLEST)).clamp(SMALLEST, 1 - SMALLEST)
            cuts = torch.tensor(self.cuts, dtype=torch.float64)
            metrics = {"loss": float(hazard_loss(hazard.logit(), target[:, 0].double(), target[:, 1].double(), cuts))}
            curve = survival.brier_scores(score, time, event, one, at)
            metrics["ibs"] = float(survival.integrated(curve, at)[0])
            order = survival.mean_time(score, at)
        metrics["c_index"] = float(survival.concordance(order, time, event, one)[0])
        metrics["uno_c"] = float(survival.weighted_concordance(order, time, event, one, float(at[-1]))[0])
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    def _cuts(self, like: Tensor) -> Tensor:
        return torch.tensor(self.cuts, dtype=like.dtype, device=like.device)


def hazard_loss(logits: Tensor, time: Tensor, event: Tensor, cuts: Tensor) -> Tensor:
    """Return the mean over patients of the negative log likelihood of discrete-time hazards.

    A patient with an event survives the intervals before it and dies in its own; a censored patient survives the
    intervals of which at least half was observed. A patient with an event after the last cut survives all intervals.

    Args:
        logits: [b, m], log odds of the hazards h.
        time: [b].
        event: [b], 0 or 1.
        cuts: [m], the ends of the intervals.
    """
    starts = torch.cat([torch.zeros_like(cuts[:1]), cuts[:-1]])
    when, died = time[:, None], event[:, None]
    survived = torch.where(died > 0, when > cuts, when >= (starts + cuts) / 2)
    dies = (died > 0) & (when > starts) & (when <= cuts)
    # −Σ_k [survived_k log(1 − h_k) + dies_k log h_k]
    each = F.softplus(logits) * survived + F.softplus(-logits) * dies
    return each.sum(1).mean()


def partial_likelihood_loss(log_hazard: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Return Cox's negative log partial likelihood, per event, with Breslow's ties. [b] each -> []

    A batch without an event has a loss of 0.
    """
    at_risk = time[None] >= time[:, None]  # row i: the patients still observed at t_i
    total = log_hazard.masked_fill(~at_risk, -torch.inf).logsumexp(1)  # log Σ_{j: t_j ≥ t_i} exp θ_j
    return ((total - log_hazard) * event).sum() / event.sum().clamp_min(1)
