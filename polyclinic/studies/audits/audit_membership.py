"""Membership inference: the attacks of ``attacks.membership`` on the model of a run, at each of its sites.

Members are a site's training patients; non-members are its test patients, who come from the same split and were not
trained on. Shadow models are trained as the run was: with the same method at the same sites for the same number of
rounds, each on a random half of every site's patients. Their losses are kept in the folder of the model, so that an
interrupted audit resumes, and an audit with more shadow models trains only the additional ones.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.attacks.membership import Shadows, by_patient, found, lira, losses, memorized, rmia, shadows
from polyclinic.attacks.separation import Found
from polyclinic.core.execution import UniformSampler
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.data.examples import Examples, concat, in_memory
from polyclinic.data.federation import Federated
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.registry import entry
from polyclinic.studies.audits.audit_file import Members
from polyclinic.studies.audits.audit_privacy import NotAudited, Progress
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.run.run_directory import read_tensors, write_tensors

ATTACKS = ("loss", "lira", "rmia")
ROLES = ("train", "val", "test")


@dataclass(frozen=True)
class Target:
    """A run's model, and all that it was made from.

    Attributes:
        folder: Folder of the method run.
        study: The study.
        plan: The plan of the method run.
        data: The split of its data.
        seed: Its seed.
        task: What the model predicts with. ``params``: its parameters.
        round: After how many rounds it was taken.
    """

    folder: Path
    study: Study
    plan: Plan
    data: Federated
    seed: int
    task: Task
    params: Tree
    round: int


@dataclass(frozen=True)
class Pool:
    """The patients at stake at all sites, one after another.

    Attributes:
        data: Their examples. ``site``, ``role``: of each example.
    """

    data: Examples
    site: tuple[str, ...]
    role: tuple[str, ...]

    @classmethod
    def of(cls, data: Federated, sites: Sequence[str]) -> "Pool":
        """Everybody who is labeled at ``sites``."""
        parts = [(s, r, data.sites[s][r]) for s in sites for r in ROLES if len(data.sites[s].get(r, ()))]
        return cls(
            concat([in_memory(part, "an audit of membership") for *_, part in parts]),
            tuple(site for site, _, part in parts for _ in range(len(part))),
            tuple(role for _, role, part in parts for _ in range(len(part))),
        )

    def where(self, site: str, role: str) -> Tensor:
        """The positions of a site's examples of a role."""
        chosen = [s == site and r == role for s, r in zip(self.site, self.role, strict=True)]
        return torch.tensor(chosen).nonzero().flatten()

    def some(self, site: str, role: str, limit: int, seed: int) -> Tensor:
        """The positions of the examples of at most ``limit`` patients, drawn by ``seed``."""
        here = self.where(site, role)
        names = sorted({self.data.patients[i] for i in here.tolist()})
        order = torch.randperm(len(names), generator=Site("audit", seed=seed).rng(site, role)).tolist()
        tried = {names[i] for i in order[:limit]}
        return here[[self.data.patients[i] in tried for i in here.tolist()]]


def audit_membership(
    target: Target, sites: Sequence[str], attack: str, count: int, limit: int, progress: Progress
) -> Members:
    """Attack the model at ``sites``.

    Args:
        target: The model and the data of its run.
        sites: The sites whose patients are tried.
        attack: One of ``ATTACKS``, or ``all``.
        count: Number of shadow models to train for LiRA and RMIA.
        limit: Largest number of patients of each kind and site to try.
        progress: Called with the numbers of trained and of all shadow models.

    Raises:
        NotAudited: If the task has no probabilities for LiRA and RMIA, or the shadow models cannot be trained.
    """
    chosen = ATTACKS if attack == "all" else (attack,)
    if unknown := set(chosen) - set(ATTACKS):
        raise NotAudited(f"no attack is called {sorted(unknown)[0]!r}; there are {', '.join(ATTACKS)} and all")
    if set(chosen) - {"loss"} and target.plan.kind not in ("classification", "multilabel"):
        raise NotAudited(
            f"LiRA and RMIA need probabilities of classes, which {target.plan.kind} does not give: use --attack loss"
        )
    pool = Pool.of(target.data, target.data.training)
    task = _plain(target.task)
    said = losses(task, target.params, pool.data)
    scores: dict[str, Callable[[str], Tensor]] = {"loss": lambda site: -said} if "loss" in chosen else {}
    if set(chosen) - {"loss"}:
        known = shadows(
            _Trainer(target, task, pool, count, progress), pool.data.patients, count, target.seed, pool.site
        )
        scores |= _with_shadows(chosen, said, known, pool)
    tried = {
        site: {name: _compared(score(site), pool, site, limit, target.seed) for name, score in scores.items()}
        for site in sites
    }
    largest = max(sites, key=lambda site: len(target.data.sites[site]["test"]))
    control = memorized(target.task, target.params, target.data.sites[largest]["test"], target.seed)
    return Members(control, tried, count if set(chosen) - {"loss"} else 0, limit)


def _with_shadows(
    chosen: Sequence[str], said: Tensor, known: Shadows, pool: Pool
) -> dict[str, Callable[[str], Tensor]]:
    """The scores of the attacks that use shadow models, by the name of the attack."""
    scores: dict[str, Callable[[str], Tensor]] = {}
    if "lira" in chosen:
        online, offline = lira(said, known), lira(said, known, online=False)
        scores |= {"LiRA": lambda site: online, "LiRA offline": lambda site: offline}
    if "rmia" in chosen:

        def against(site: str) -> Tensor:
            own = pool.where(site, "val")
            return rmia(said, known, own if len(own) else pool.where(site, "test"))

        scores["RMIA"] = against
    return scores


def _compared(score: Tensor, pool: Pool, site: str, limit: int, seed: int) -> Found:
    """Training against test patients of a site."""

    def tried(role: str) -> Tensor:
        here = pool.some(site, role, limit, seed)
        return by_patient(score[here], [pool.data.patients[i] for i in here.tolist()])[0]

    return found(tried("train"), tried("test"))


def _plain(task: Task) -> Task:
    """``task`` with a loss that is −log p of the true class, or ``task`` itself."""
    return replace(task, label_smoothing=0.0) if isinstance(task, Classification) else task


@dataclass(frozen=True)
class _Trainer:
    """Trains shadow models as the run was trained, and keeps their losses in the folder of the model."""

    target: Target
    task: Task
    pool: Pool
    count: int
    progress: Progress

    def __call__(self, k: int, chosen: Tensor) -> Tensor:
        """The losses [n] of everybody in the pool under shadow model ``k``."""
        file = self.target.folder / "shadows" / f"{k}.safetensors"
        key = self._key(k, chosen)
        if file.is_file() and _meta(file).get("key") == key:
            said = read_tensors(file)["loss"]
        else:
            said = losses(self.task, self._train(k, chosen), self.pool.data)
            file.parent.mkdir(exist_ok=True)
            write_tensors(file, {"loss": said}, {"key": key})
        self.progress("shadow models", k + 1, self.count)
        return said

    def _train(self, k: int, chosen: Tensor) -> Tree:
        target, seed = self.target, self.target.seed + 7919 * (k + 1)
        method, trainers = target.plan.build_method(), target.plan.sites
        if entry(target.plan.method).pooled:
            halves: dict[str, Any] = {trainers[0]: {"train": self.pool.data.subset(chosen)}}
        else:
            own = {site: [i for i in chosen.tolist() if self.pool.site[i] == site] for site in trainers}
            halves = {
                site: {**target.data.sites[site], "train": self.pool.data.subset(torch.tensor(own[site]))}
                for site in trainers
            }
        sites = {site: Site(site, roles, seed=seed) for site, roles in halves.items()}
        held = {} if target.data.public is None else {"public": target.data.public}
        size = min(target.study.sites_per_round or len(trainers), len(trainers))
        state = method.init(target.plan.build_task().first(target.seed))
        engine = InProcess(method, sites, seed=seed, server_data=held)
        try:
            for step in train(
                method, engine, state, rounds=target.round, sampler=UniformSampler(trainers, size, target.seed)
            ):
                state = step.state
        except TooFewReplies as error:
            why = "; ".join(error.lost.values())
            raise NotAudited(f"{target.plan.method} could not train a shadow model: {why}") from error
        return method.site_model(method.evaluation_request(state), {})

    def _key(self, k: int, chosen: Tensor) -> str:
        target = self.target
        facts = (target.study.hash, target.plan.hash, target.data.fingerprint, target.round, k, chosen.tolist())
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _meta(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}
