"""Evaluation as one more job of a method, so that it runs wherever training runs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.rounds import Federation
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.saliency import saliency
from polyclinic.learning.tasks.task import Task, cached_model

State = TypeVar("State")
MOST_EXAMPLES = 2**53
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated(Method[State]):
    """Any method, with one more job: to score the model with which a site would predict.

    The job ``score/val`` sends a few numbers, computed at the site. ``predict/test`` sends what the model says of
    each example, and the truth, from which intervals are computed; a site's policy may allow the first alone.
    ``explain/val`` sends where the model looks, on average over the site's patients.
    """

    inner: Method[State]
    task: Task

    def init(self, params: Tree) -> State:
        """The inner method's."""
        return self.inner.init(params)

    def request(self, state: State) -> Request | None:
        """The inner method's."""
        return self.inner.request(state)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Scores where the job says so; else what the inner method does."""
        verb, _, role = request.job.partition("/")
        if verb not in ("score", "predict", "explain"):
            return self.inner.site_update(request, memory, site)
        if not len(site.data.get(role, ())):
            return Reply(), memory
        params = self.inner.site_model(request, memory)
        if verb == "explain":
            looked = saliency(self.inner.prediction_task or self.task, params, site.data[role], site.device)
            return Reply({verb: PerSite({site.name: looked})}), memory
        found = outputs(
            self.inner.prediction_task or self.task, params, site.data[role], site.device, verb == "predict"
        )
        if verb == "score":
            scores = self.task.summary(found) | {"n": float(len(site.data[role]))}
            found = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
        return Reply({verb: PerSite({site.name: found})}), memory

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The inner method's."""
        return self.inner.jobs

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """The inner method's."""
        return self.inner.server_update(state, reply, server)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """The inner method's."""
        return self.inner.site_model(request, memory)

    @property
    def prediction_task(self) -> Any:
        """The inner method's."""
        return self.inner.prediction_task

    def evaluation_request(self, state: State) -> Request:
        """The inner method's."""
        return self.inner.evaluation_request(state)


def outputs(
    task: Task, params: Tree, data: Any, device: str = "cpu", full_metrics: bool = False, size: int = 64
) -> Tree:
    """What the model with ``params`` says of every example of ``data``, and whose example it is.

    Returns:
        The task's outputs over all examples, and ``patient`` [n], a number for each patient. Where the model has
        diverged, so that a ``score`` is no number, the task's guess stands for it, and ``silent`` [n] marks it.
    """
    model = cached_model(task, params, device).eval()
    parts: list[dict[str, torch.Tensor]] = []
    with torch.inference_mode():
        for chunk in torch.arange(len(data)).split(size):
            x, y = data[chunk]
            parts.append(task.outputs(model, (x.to(device), y.to(device)), full_metrics=full_metrics))
        found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    patients = list(getattr(data, "patients", range(len(data))))
    numbers = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    found = {**{k: v.clone() for k, v in found.items()}, "patient": torch.tensor([numbers[p] for p in patients])}
    return _answered(found, task)


def _answered(found: Tree, task: Task) -> Tree:
    """``found`` with the task's guess where a diverged model answers what is no number; ``silent`` says where."""
    if "score" not in found or bool(found["score"].isfinite().all()):
        return found
    silent = ~found["score"].isfinite().all(1)
    score = torch.where(silent[:, None], task.guess(found["score"]), found["score"])
    return {**found, "score": score, "silent": silent.to(torch.uint8)}


def evaluate(
    method: Method[State], federation: Federation, state: State, sites: Sequence[str], job: str = "score/val"
) -> Mapping[str, Tree]:
    """What each of ``sites`` answers to ``job``, by site.

    A site is left out if it has no such data, does not answer, or answers with something that is no answer to ``job``:
    another part, values for another site, or figures without a number of examples. Scores that are not finite are left
    out one by one.
    """
    federation.send(replace(method.evaluation_request(state), job=job, secure=False, recipients=None), sites)
    verb = job.partition("/")[0]
    found: dict[str, Tree] = {}
    for arrival in sorted(federation.replies(), key=lambda arrival: arrival.site):
        if arrival.reply is not None and arrival.reply.parts:
            try:
                found[arrival.site] = _checked(arrival.reply, verb, arrival.site)
            except ValueError as error:
                log.warning("%s: its answer to %s is not used: %s", arrival.site, job, error)
    return found


def _checked(reply: Reply, verb: str, site: str) -> Tree:
    """What ``site`` itself answers to ``verb``.

    Raises:
        ValueError: If it is no such answer.
    """
    stat = reply.parts.get(verb)
    if not isinstance(stat, PerSite) or set(reply.parts) != {verb} or list(stat.items) != [site]:
        raise ValueError(f"it does not hold {verb!r} of this site and nothing else")
    leaves = stat.items[site]
    if verb == "score":
        if any(leaf.numel() != 1 for leaf in leaves.values()):
            raise ValueError("a score is one number")
        if "n" not in leaves or not 0 < float(leaves["n"]) <= MOST_EXAMPLES:
            raise ValueError("its number of examples is none")
        return {name: leaf for name, leaf in leaves.items() if bool(leaf.isfinite().all())}
    if verb == "predict":
        size = leaves["patient"].numel() if "patient" in leaves else 0
        if not size or any(not leaf.ndim or len(leaf) != size for leaf in leaves.values()):
            raise ValueError("it does not hold as many answers as patients")
        if not all(bool(leaf.isfinite().all()) for leaf in leaves.values()):
            raise ValueError("it holds NaN or an infinity")
    return leaves
