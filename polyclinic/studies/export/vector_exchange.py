"""Exchange of data vectors as files. Sites fine-tune and sign them; they are merged, and can be removed again.

A merge is always computed from all given vectors in the order of site names. Removing a site therefore gives the same
file as a merge without it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.data.federation import federate
from polyclinic.engines.plan import Plan, local_training
from polyclinic.learning.networks.model_tree import inspect, load
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.merging import Merging, loss_on, merged, random_like, restored, search
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import read as read_study
from polyclinic.studies.export.vector_file import (
    Card,
    VectorRefused,
    canonical,
    digest,
    read_vector,
    write_exactly,
    write_vector,
)
from polyclinic.studies.run.run_directory import read_plan, read_tensors

_ARCHITECTURE = ("kind", "task", "network", "network_options", "inputs", "outputs")


@dataclass(frozen=True)
class Base:
    """The common model: its parameters, its plan, and what a vector must name of both."""

    params: Tree
    plan: Plan

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters."""
        return digest(self.params)

    @property
    def architecture(self) -> str:
        """SHA-256 of what the plan says of network and task."""
        whole = json.loads(self.plan.to_json())
        return hashlib.sha256(canonical({name: whole[name] for name in _ARCHITECTURE}).encode()).hexdigest()

    @property
    def form(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of a vector for it."""
        running = inspect(self.plan.build_task().model()).running
        return {name: tuple(leaf.shape) for name, leaf in self.params.items() if name not in running}


@dataclass(frozen=True)
class Examples:
    """One site's data of a study, with all that decides what a merge makes of them.

    Attributes:
        data: What trains or restores. ``classes``: their names, in order. ``local``: the study's way of training.
        named: Data fingerprint, site, role and training, as the merged file records them.
    """

    data: Any
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    local: LocalTraining
    named: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A merged model.

    Attributes:
        params: The model. ``scale``: λ. ``sites``: whose vectors are in it.
        losses: On the restoration set, by λ, where λ was searched for.
        controls: Scores on the restoration set by model: the merged one, the base, random vectors, each site alone.
    """

    params: Tree
    scale: float
    sites: tuple[str, ...]
    losses: Mapping[float, float]
    controls: Mapping[str, Mapping[str, float]]


def read_base(file: Path) -> Base:
    """Read the common model in ``file``: model.safetensors of a run, or a file of ``polyclinic export``.

    Raises:
        VectorRefused: If it is not a model with a plan that fits its parameters.
    """
    from safetensors import SafetensorError

    try:
        plan, params = read_plan(file), read_tensors(file)
        load(plan.build_task().model(), params)
    except (SafetensorError, ValueError) as error:
        raise VectorRefused(f"{file}: not a model to begin from: {error}") from None
    return Base(params, plan)


def examples_of(study_file: Path, site: str, role: str) -> Examples:
    """Return the data of one site, as a study describes them.

    Raises:
        VectorRefused: If the study does not have the site, or the site does not have such data.
    """
    study = read_study(study_file)
    found = federate(study.data, study.seeds[0])
    if site not in found.sites:
        raise VectorRefused(f"{study_file}: no site is called {site!r}; there are {', '.join(found.sites)}")
    if role not in found.sites[site]:
        raise VectorRefused(f"{study_file}: {site} has no {role} data, only {', '.join(found.sites[site])}")
    training = study.training_of(MethodSpec(name="data-vectors"))
    if "schedule" in training:
        training["schedule_rounds"] = 1  # a vector is made in one round
    named = {"data": found.fingerprint, "site": site, "role": role, "training": training}
    if "private" in training:
        raise VectorRefused(f"{study_file}: training.private is not supported for data vectors, which no ledger counts")
    return Examples(found.sites[site][role], tuple(found.info.classes), found.shape, local_training(training), named)


def make(base: Base, site: str, own: Examples, key: Any, out: Path, *, tuned: Tree | None = None) -> Card:
    """Fine-tune ``base`` on a site's own data, and write the signed vector.

    Args:
        key: The site's Ed25519 private key.
        tuned: Parameters that were fine-tuned by other means; they replace the training.

    Raises:
        VectorRefused: If the data do not fit the model.
    """
    _fits(base, own)
    task = base.plan.build_task()
    end = own.local.fit(task, base.params, Site(site), 0, data=own.data) if tuned is None else tuned
    if {n: t.shape for n, t in end.items()} != {n: t.shape for n, t in base.params.items()}:
        raise VectorRefused("the fine-tuned parameters have other names or shapes than the base's")
    vector = {name: end[name] - base.params[name] for name in base.form}
    if not tree.finite(vector):
        raise VectorRefused(f"{site}: training diverged: the vector holds NaN or an infinity; lower training.lr")
    return write_vector(out, base.digest, base.architecture, site, own.classes, len(own.data), vector, key)


def accept(base: Base, files: Sequence[Path], keys: Mapping[str, str]) -> dict[str, tuple[Card, Tree]]:
    """Verify the vectors in ``files``, and return them by site in name order.

    Args:
        keys: Each site's public key in hexadecimal, obtained from the site and never from a vector.

    Raises:
        VectorRefused: If one does not belong to ``base`` or is not signed by a known key. Lists every problem.
    """
    problems: list[str] = [] if files else ["there are no vectors to merge"]
    found: dict[str, tuple[Card, Tree]] = {}
    limit = 2 * tree.nbytes(base.params) + 2**20
    for file in files:
        if (size := file.stat().st_size) > limit:
            problems.append(f"{file}: {size} bytes, where a vector for this base takes at most {limit}")
            continue
        try:
            card, vector = read_vector(file)
        except VectorRefused as error:
            problems.append(str(error))
            continue
        problems += [f"{file}: {says}" for says in _against(base, keys, card, vector)]
        if card.site in found:
            problems.append(f"{file}: a second vector of {card.site}; keep one")
        found[card.site] = card, vector
    if len({card.classes for card, _ in found.values()}) > 1:
        told = "; ".join(f"{name}: {', '.join(found[name][0].classes)}" for name in sorted(found))
        problems.append(f"the order of classes differs between sites ({told}): outputs would be mixed up")
    if problems:
        raise VectorRefused("\n".join([*problems, "Nothing was merged."]))
    return dict(sorted(found.items()))


def merge(
    base: Base, vectors: Mapping[str, tuple[Card, Tree]], how: Merging, out: Path, restoration: Examples | None = None
) -> Made:
    """Merge the vectors, write the model to ``out``, and compare it with controls if ``restoration`` is given.

    Raises:
        VectorRefused: If the restoration set does not fit the model or the classes of the vectors.
    """
    if not vectors:
        raise VectorRefused("no vector is left: the merge of none is the base itself")
    taus = {site: vector for site, (_, vector) in vectors.items()}
    task, local = base.plan.build_task(), restoration.local if restoration else LocalTraining()
    data = restoration.data if restoration else None
    if restoration:
        _fits(base, restoration)
        if restoration.classes != next(iter(vectors.values()))[0].classes:
            raise VectorRefused(
                f"the restoration set has other classes than the vectors: {', '.join(restoration.classes)}"
            )
    losses = search(how, task, base.params, taus, data) if data is not None and how.scale is None else {}
    fixed = replace(how, scale=min(losses, key=lambda s: (losses[s], s))) if losses else how
    params, scale = merged(fixed, task, base.params, taus, local, labeled=data)
    about = {
        "sites": {site: card.tensors for site, (card, _) in vectors.items()},
        "base": base.digest,
        "scale": scale,
        "merging": asdict(how),
        "restoration": dict(restoration.named) if restoration else None,
    }
    controls = _controls(task, base, taus, fixed, scale, params, data) if data is not None else {}
    write_exactly(out, params, {"plan": base.plan.to_json(), "merged": canonical(about)})
    return Made(params, scale, tuple(vectors), losses, controls)


def remove(
    model: Path,
    site: str,
    base: Base,
    files: Sequence[Path],
    keys: Mapping[str, str],
    out: Path,
    restoration: Examples | None = None,
) -> Made:
    """Write the merge of ``files`` without ``site``, with the settings of ``model``.

    Raises:
        VectorRefused: If ``model`` was not made from ``base``, the files and the restoration set.
    """
    from safetensors import safe_open

    with safe_open(model, "pt") as opened:
        meta = opened.metadata() or {}
    if "merged" not in meta:
        raise VectorRefused(f"{model}: was not merged from data vectors")
    about, vectors = json.loads(meta["merged"]), accept(base, files, keys)
    problems = []
    if site not in about["sites"]:
        problems.append(f"{model}: {site} is not in it; {', '.join(about['sites'])} are")
    if about["base"] != base.digest:
        problems.append(f"{model}: was merged from another base")
    if {s: card.tensors for s, (card, _) in vectors.items() if s != site} != {
        s: d for s, d in about["sites"].items() if s != site
    }:
        problems.append(f"{model}: holds the vectors of {', '.join(about['sites'])}, here are {', '.join(vectors)}")
    if about["restoration"] != (dict(restoration.named) if restoration else None):
        was = about["restoration"]
        told = (
            f"was restored on the role {was['role']!r} of {was['site']}; name the study, the site and the role"
            if (was)
            else "was merged without a restoration set; name none"
        )
        if was and restoration and {**was, "data": ""} == {**restoration.named, "data": ""}:
            told = "was restored on these data, and they have changed since"
        problems.append(f"{model}: {told}")
    if problems:
        raise VectorRefused("\n".join([*problems, "Nothing was removed."]))
    rest = {name: vector for name, vector in vectors.items() if name != site}
    return merge(base, rest, Merging(**about["merging"]), out, restoration)


def _controls(
    task: Task, base: Base, taus: Mapping[str, Tree], how: Merging, scale: float, params: Tree, data: Any
) -> dict[str, dict[str, float]]:
    """Scores of the merge, and of what it must beat, each restored on the same data."""
    rng = Site("server").rng("random vectors")
    random = how.direction({site: random_like(tau, rng) for site, tau in taus.items()})
    moved = {"base": base.params, "random": tree.shift(base.params, tree.scale(random, scale))}
    moved |= {f"{site} alone": tree.shift(base.params, tau) for site, tau in taus.items()}
    models = {"merged": params} | {name: restored(task, leaves, data) for name, leaves in moved.items()}
    return {
        name: {"loss": loss_on(task, model, data)} | task.summary(outputs(task, model, data))
        for name, model in models.items()
    }


def _fits(base: Base, own: Examples) -> None:
    if own.shape != base.plan.inputs:
        raise VectorRefused(f"the data have inputs of shape {list(own.shape)}, the model {list(base.plan.inputs)}")
    if own.classes and len(own.classes) != base.plan.outputs:
        raise VectorRefused(f"the data have {len(own.classes)} classes, the model {base.plan.outputs} outputs")


def _against(base: Base, keys: Mapping[str, str], card: Card, vector: Tree) -> list[str]:
    """What keeps a vector from being merged into ``base``."""
    problems = []
    if card.site not in keys:
        problems.append(f"no key is known of {card.site!r}; ask the site for its public key, and add it")
    elif keys[card.site] != card.key:
        problems.append(f"signed with another key than that of {card.site}: not its vector")
    if card.architecture != base.architecture:
        problems.append(f"{card.site} fine-tuned another architecture or task than the base's")
    elif card.base != base.digest:
        problems.append(
            f"{card.site} began from other parameters than the base's ({card.base[:12]}, {base.digest[:12]})"
        )
    if {name: tuple(leaf.shape) for name, leaf in vector.items()} != base.form:
        problems.append("its tensors are not those of a vector for the base")
    elif not tree.finite(vector):
        problems.append("it holds NaN or an infinity")
    return problems
