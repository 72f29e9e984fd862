"""Evaluation as an additional job of a method, so that it runs in the same engines as training."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.rounds import Federation
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.saliency import saliency
from polyclinic.learning.tasks.task import Task

State = TypeVar("State")
MOST_EXAMPLES = 2**53
MOST_PIXELS = 2**22
"""Number of pixels, over all examples, that are predicted at once; 64 pictures of 256 x 256."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated(MethodWrapper[State]):
    """A method with additional evaluation jobs for the model with which a site predicts.

    The job ``score/val`` sends a few scores, computed at the site. ``predict/test`` sends the predictions and targets
    of each example, from which intervals are computed; a site's policy may allow only the former. ``explain/val`` sends
    the mean attribution map over the site's patients, and ``show/test`` pictures of three cases.
    """

    inner: Method[State]
    task: Task

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Evaluate if the job is an evaluation; otherwise run the inner method's site update."""
        verb, _, role = request.job.partition("/")
        if verb not in ("score", "predict", "explain", "show"):
            return self.inner.site_update(request, memory, site)
        if not len(site.data.get(role, ())):
            return Reply(), memory
        params = self.inner.adapted_model(request, memory, site, role)
        if verb == "explain":
            maps = saliency(self.inner.prediction_task or self.task, params, site.data[role], site.device)
            return Reply({verb: PerSite({site.name: maps})}), memory
        results = outputs(
            self.inner.prediction_task or self.task, params, site.data[role], site.device, verb == "predict"
        )
        if verb == "show":
            from polyclinic.learning.tasks.case_pictures import case_pictures

            shown = case_pictures(
                self.inner.prediction_task or self.task, params, site.data[role], results, site.device
            )
            return Reply({verb: PerSite({site.name: shown})}), memory
        if verb == "score":
            scores = self.task.scores(results) | {"n": float(len(site.data[role]))}
            results = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
        return Reply({verb: PerSite({site.name: results})}), memory


def outputs(
    task: Task, params: Tree, data: Any, device: str = "cpu", full_metrics: bool = False, size: int = 64
) -> Tree:
    """Return the outputs of the model with ``params`` for every example of ``data``, with the patient of each.

    Returns:
        The task's outputs over all examples, and ``patient`` [n], the index of the patient. If the model has diverged,
        the task's guess replaces each non-finite ``score``, and ``silent`` [n] marks these examples.
    """
    model = cached_model(task, params, device).eval()
    parts: list[dict[str, torch.Tensor]] = []
    size = max(1, min(size, MOST_PIXELS // max(1, math.prod(tuple(getattr(data, "shape", ()))[1:]))))
    with torch.inference_mode():
        for chunk in torch.arange(len(data)).split(size):
            parts.append(task.outputs_of(model, data, chunk, device, full_metrics=full_metrics))
        merged = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    patients = list(getattr(data, "patients", range(len(data))))
    numbers = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    merged = {**{k: v.clone() for k, v in merged.items()}, "patient": torch.tensor([numbers[p] for p in patients])}
    return _answered(merged, task)


def _answered(found: Tree, task: Task) -> Tree:
    """Replace non-finite scores of a diverged model by the task's guess, and mark them in ``silent``."""
    if "score" not in found or bool(found["score"].isfinite().all()):
        return found
    silent = ~found["score"].isfinite().all(1)
    score = torch.where(silent[:, None], task.guess(found["score"]), found["score"])
    return {**found, "score": score, "silent": silent.to(torch.uint8)}


def evaluate(
    method: Method[State], federation: Federation, state: State, sites: Sequence[str], job: str = "score/val"
) -> Mapping[str, Tree]:
    """Request ``job`` from ``sites``, and return the valid answers by site.

    A site is omitted if it has no such data, does not answer, or sends an invalid answer: another part, values of
    another site, or scores without the number of examples. Non-finite scores are omitted individually.
    """
    federation.send(replace(method.evaluation_request(state), job=job, secure=False, recipients=None), sites)
    verb = job.partition("/")[0]
    answers: dict[str, Tree] = {}
    for arrival in sorted(federation.replies(), key=lambda arrival: arrival.site):
        if arrival.reply is not None and arrival.reply.parts:
            try:
                answers[arrival.site] = _checked(arrival.reply, verb, arrival.site)
            except ValueError as error:
                log.warning("%s: its answer to %s is not used: %s", arrival.site, job, error)
    return answers


def _checked(reply: Reply, verb: str, site: str) -> Tree:
    """Return the values in a valid answer of ``site`` to ``verb``.

    Raises:
        ValueError: If the answer is not valid.
    """
    stat = reply.parts.get(verb)
    if not isinstance(stat, PerSite) or set(reply.parts) != {verb} or list(stat.items) != [site]:
        raise ValueError(f"it must contain {verb!r} of this site and nothing else")
    leaves = stat.items[site]
    if verb == "score":
        if any(leaf.numel() != 1 for leaf in leaves.values()):
            raise ValueError("a score must be a single number")
        if "n" not in leaves or not 0 < float(leaves["n"]) <= MOST_EXAMPLES:
            raise ValueError("its number of examples is missing or not valid")
        return {name: leaf for name, leaf in leaves.items() if bool(leaf.isfinite().all())}
    if verb == "predict":
        size = leaves["patient"].numel() if "patient" in leaves else 0
        if not size or any(not leaf.ndim or len(leaf) != size for leaf in leaves.values()):
            raise ValueError("its numbers of answers and patients differ")
        if not all(bool(leaf.isfinite().all()) for leaf in leaves.values()):
            raise ValueError("it contains NaN or infinity")
    return leaves
