"""Trains one site's part of a private run again, with canaries in its data, and compares what leaves with the claim.

The site is alone with the server: what other sites add could only hide its canaries, and a server knows what each sent.
Transforms are left out for the same reason; DP-SGD's ε is claimed without them. Network, noise, bound, sampling rate,
steps and rounds are the run's. ``attacks.private_training_canaries`` says what a canary is.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from polyclinic.attacks import canary
from polyclinic.attacks.private_training_canaries import Canaries, Motion, Observer, WithCanaries, audited
from polyclinic.core.aggregates import Reply
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan
from polyclinic.errors import RunError
from polyclinic.evaluation.records.record_schema import Privacy
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.methods.registry import Setting, build
from polyclinic.privacy.accounting import epsilon

USUAL_DELTA = 1e-5
"""δ of the claim if the study sets no budget."""
FEWEST, MOST = 400, 2000
"""Least and largest default number of canaries."""
QUIET = 1e-4
"""Noise of the control relative to the clipping bound, which is negligible."""

Progress = Callable[[str, int, int], None]


class NotAudited(RunError, ValueError):
    """A run, or a part of it, that cannot be audited. The message says why."""


def audit_training(
    plan: Plan,
    roles: Mapping[str, Any],
    site: str,
    claim: Privacy | None,
    *,
    rounds: int,
    canaries: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> canary.Verdict:
    """Estimate a lower bound on ε of a site's training, and compare it with ``claim``.

    Args:
        plan: The plan of the method run.
        roles: The site's data by role.
        site: Its name.
        claim: The ε that the run reports for the site; None to compute it from the settings with the accountant.
        rounds: Number of rounds to train.
        canaries: Number of canaries, at most half the number of the network's parameters. The default is what the
            claim needs, between ``FEWEST`` and ``MOST``.
        seed: Seed of the directions and coin flips, but not of the noise.
        progress: Called with what is trained, and the numbers of finished and of all rounds.
        entropy: Source of the secret randomness of training. Only tests replace it.

    Raises:
        NotAudited: If the run's noise is not DP-SGD's, or its method cannot be trained with canaries.
    """
    local = plan.build_local()
    if not isinstance(local, DPSGD):
        raise NotAudited("the canary audit is of training with DP-SGD, and this method does not train so")
    if site not in plan.sites:
        raise NotAudited(f"{site} does not train under {plan.method}")
    if hasattr(roles["train"], "patch"):
        raise NotAudited(
            "the canary audit adds examples to those in memory, and patch in [data] leaves the images of this study on "
            "disk"
        )
    claimed, delta, unit = _claimed(local, roles["train"], claim, rounds)
    wanted = min(max(FEWEST, canary.needed(claimed, delta) or 0), MOST) if canaries is None else canaries
    parameters = sum(p.numel() for p in trainable(plan.build_task().model()).values())
    count = min(wanted, parameters // 2)
    here, quiet = Site(site, roles, seed=seed, entropy=entropy), replace(local, noise=QUIET)
    motion = Motion(plan.build_task())
    _train(plan, plan.build_task(), quiet, here, rounds, motion.watch, partial(progress, "without canaries"))

    def seen(what: str, how: DPSGD) -> Observer:
        planted = Canaries.draw(motion.far, count, local.bound, Site("auditor", seed=seed), what)
        return _observed(plan, how, here, rounds, planted, partial(progress, what))

    before, after = seen("without noise", quiet), seen("as claimed", local)
    weights = before.learned()
    control, found = (canary.lower_bound(one.scores(weights), one.canaries.inside, delta) for one in (before, after))
    return canary.Verdict(found, control, claimed, delta, count, unit, rounds)


def _claimed(local: DPSGD, data: Any, claim: Privacy | None, rounds: int) -> tuple[float, float, str]:
    """ε, δ and unit, as the run says them; or where it set no budget, as the accountant does."""
    if claim is not None and claim.epsilon is not None and claim.delta is not None:
        return claim.epsilon, claim.delta, claim.unit or local.unit
    spend = local.spend(data)
    return epsilon([spend._replace(steps=spend.steps * rounds)], USUAL_DELTA), USUAL_DELTA, local.unit


def _observed(
    plan: Plan, local: DPSGD, site: Site, rounds: int, planted: Canaries, progress: Callable[[int, int], None]
) -> Observer:
    """Trains with canaries and looks at everything that leaves."""
    data, observer = site.data["train"], Observer(planted)
    here = replace(site, data={**site.data, "train": WithCanaries(data, planted)})
    task = audited(plan.build_task(), planted, data.targets)
    _train(plan, task, _at_same_rate(local, data, len(planted)), here, rounds, observer.watch, progress)
    return observer


def _train(
    plan: Plan,
    task: Task,
    local: DPSGD,
    site: Site,
    rounds: int,
    watch: Callable[[Reply], None],
    progress: Callable[[int, int], None],
) -> None:
    """Trains by the plan's method at one site; ``watch`` sees every reply.

    Raises:
        NotAudited: If the site refuses or fails.
    """
    method = build(plan.method, Setting(task, local, (site.name,), plan.rounds), plan.options)
    engine, done = InProcess(method, {site.name: site}, seed=site.seed), -1
    try:
        for step in train(method, engine, method.init(task.first(site.seed)), rounds=rounds):
            watch(step.reply)
            if step.request.round != done:
                done = step.request.round
                progress(done + 1, rounds)
    except TooFewReplies as error:
        why = "; ".join(error.lost.values())
        raise NotAudited(f"{plan.method} cannot be trained with canaries at {site.name} alone: {why}") from error


def _at_same_rate(local: DPSGD, data: Any, count: int) -> DPSGD:
    """``local`` with the run's steps and sampling rate, or a little less, for ``count`` units more."""
    spend = local.spend(data)
    units = len(data) if local.unit == "record" else len(set(data.patients))
    batch = max(1, int(spend.rate * (units + count) + 1e-9))
    return replace(local, batch_size=batch, steps=spend.steps)
