"""Simulation of heterogeneous machines in virtual time, and of sites that attack.

Both are available on one machine only, not in a study between hospitals.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from polyclinic.attacks.adversaries import ATTACKS
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.core.execution import Policy
from polyclinic.core.method import Method, unwrap
from polyclinic.core.rounds import Step, TooFewReplies, train, train_async
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.local.virtual_time import Machine, Unequal
from polyclinic.engines.plan import Plan
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.methods.aggregation.fedbuff import FedBuff
from polyclinic.studies.config.schema import AttackSpec, MachinesSpec
from polyclinic.studies.config.study_config import Study

IN_VAIN = 100
"""Number of consecutive rounds without enough replies after which a run fails."""


def attackers(spec: AttackSpec, sites: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the sites that attack, out of the training ``sites``.

    Raises:
        ValueError: If a named site does not train, or no honest site would remain.
    """
    named = spec.attackers if isinstance(spec.attackers, tuple) else ()
    if away := [name for name in (*named, *spec.trusted) if name not in sites]:
        raise ConfigError(f"[attack] names {away[0]}, which does not train here. There are {', '.join(sites)}")
    many = len(set(named)) or int(spec.attackers)
    drawn_from = sorted(set(sites) - set(spec.trusted))
    if many >= len(sites) or many > len(drawn_from):
        raise ConfigError(
            f"{many} of {len(sites)} sites attack, and {len(spec.trusted)} are trusted: no honest site would remain"
        )
    order = torch.randperm(len(drawn_from), generator=Site("~attack", seed=seed).rng("who"))
    return tuple(sorted(set(named) or {drawn_from[i] for i in order[:many].tolist()}))


def attacked(
    method: Evaluated[Any], spec: AttackSpec, study: Study, plan: Plan, trainers: Sequence[str]
) -> Evaluated[Any]:
    """Return ``method``, which ``plan`` built, with the simulated attack ``spec``. Scores are not attacked.

    Args:
        trainers: The sites that train in this study. A method that trains at fewer sites has fewer attackers.

    Raises:
        ValueError: If the attack is not possible with this method. The message gives the reason.
    """
    who = tuple(name for name in attackers(spec, trainers, plan.seed) if name in plan.sites)
    if not who:
        return method
    options = dict(spec.options)
    if spec.name in ("label-flip", "replacement"):
        options.setdefault("classes", plan.outputs)
    attack = ATTACKS[spec.name](**options)
    if attack.spies and (study.sites_per_round is not None or study.min_replies > 1):
        raise ConfigError(f"{spec.name} is asked after all others, alone: leave sites_per_round and min_replies out")
    return Evaluated(Poisoned(method.inner, who, attack, plan.sites, spec.start_round), method.task)


def hostile(method: Evaluated[Any]) -> tuple[str, ...]:
    """The sites that attack under ``method``."""
    return method.inner.attackers if isinstance(method.inner, Poisoned) else ()


def facts(study: Study, trainers: Sequence[str]) -> dict[str, Any]:
    """Return the entries of ``run.json`` on what is simulated."""
    found: dict[str, Any] = {}
    if study.machines is not None:
        found["machines"] = study.machines.model_dump(mode="json", exclude_none=True)
    if (spec := study.attack) is not None:
        by = {str(seed): attackers(spec, trainers, seed) for seed in study.seeds}
        found["attack"] = {"name": spec.name, "options": spec.options, "start_round": spec.start_round, "by": by}
    return found


def told(study: Study) -> Iterator[str]:
    """Yield the sentences on simulation that accompany every result."""
    if study.machines is not None:
        limit = study.machines.minutes
        ends = f"; every method may take {limit:g} minutes" if limit else ""
        yield f"Simulated machines: time is virtual, computed from the study's speeds, connections and failures{ends}."
    if study.attack is not None:
        spec = study.attack
        many = len(spec.attackers) if isinstance(spec.attackers, tuple) else spec.attackers
        yield f"Simulated attack: {many} of the sites attack ({spec.name}). No real site attacked."


def engine(
    spec: MachinesSpec,
    method: Method[Any],
    sites: Mapping[str, Site],
    memory: Mapping[str, Trees] | None,
    policies: Mapping[str, Policy],
    seed: int,
    held: Mapping[str, Any],
    clock: float = 0.0,
) -> Unequal:
    """Build the sites with their machines, ``clock`` seconds after the start.

    Raises:
        ValueError: If the study specifies a machine for an unknown site.
    """
    if unknown := spec.sites.keys() - sites.keys():
        raise ConfigError(f"there are machines for {sorted(unknown)[0]}, and no such site; there are {sorted(sites)}")
    machines = {name: Machine(**spec.of(name)) for name in sites}
    found = Unequal(method, sites, machines, memory, policies, seed, held)
    found.clock = clock
    return found


def steps(
    spec: MachinesSpec,
    method: Method[Any],
    federation: Unequal,
    state: Any,
    *,
    rounds: int,
    sampler: Callable[[Sequence[str], int], Sequence[str]],
    deadline: float | None,
    min_replies: int,
    trainers: Sequence[str],
) -> Iterator[Step[Any]]:
    """Train until ``rounds`` are complete or the time is over. Later replies are discarded.

    If too few sites reply, the request is repeated. A buffered method does not wait for all sites.
    """
    end = math.inf if spec.minutes is None else 60 * spec.minutes
    if (buffer := buffered(method)) is not None:
        answers = train_async(
            method,
            federation,
            state,
            updates=rounds,
            buffer=buffer.buffer or -(-len(trainers) // 2),
            among=trainers,
            discount=buffer.discount,
        )
        yield from _until(end, federation, answers)
        return
    failed = 0
    while True:
        try:
            for step in _until(
                end,
                federation,
                train(
                    method,
                    federation,
                    state,
                    rounds=rounds,
                    sampler=sampler,
                    deadline=deadline,
                    min_replies=min_replies,
                ),
            ):
                state, failed = step.state, 0
                yield step
            return
        except TooFewReplies as error:
            failed += 1
            if federation.clock > end:
                return
            if failed == IN_VAIN or set(error.lost.values()) - {"dropped out"} - _late(deadline):
                raise


def buffered(method: Method[Any]) -> FedBuff | None:
    """Return the layer of ``method`` that updates without waiting for all sites; None if there is none."""
    return unwrap(method, FedBuff)


def _until(end: float, federation: Unequal, answers: Iterator[Step[Any]]) -> Iterator[Step[Any]]:
    for step in answers:
        if federation.clock > end:
            return
        yield step


def _late(deadline: float | None) -> set[str]:
    return set() if deadline is None else {f"no answer within {deadline:g} s"}
