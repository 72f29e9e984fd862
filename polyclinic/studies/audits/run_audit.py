"""Audit of the information that a finished run reveals: membership, an image from a gradient, and ε of its training.

Everything is computed on the machine that holds the study's data, and only the resulting numbers are written. Each
audit includes a control that is known to leak. Other attacks may find what these do not.
"""

from pathlib import Path

import torch

from polyclinic.attacks import canary, inversion
from polyclinic.core import atomic
from polyclinic.core.site import Site
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.record_schema import Privacy
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.learning.networks.model_tree import load
from polyclinic.studies.audits.audit_file import Audit, Inverted, Leak
from polyclinic.studies.audits.audit_membership import Target, audit_membership
from polyclinic.studies.audits.audit_privacy import NotAudited, Progress, audit_training
from polyclinic.studies.run.data_identity import read_again
from polyclinic.studies.run.run_directory import read_plan, read_tensors

__all__ = ["Audit", "NotAudited", "audit_run"]

LEFT_OUT = {
    "loss": "LiRA and RMIA, which are stronger, were not tried: --attack all trains shadow models for them.",
    "lira": "The loss attack and RMIA were not tried.",
    "rmia": "The loss attack and LiRA were not tried.",
}


def audit_run(
    run_dir: Path,
    label: str = "",
    seed: int | None = None,
    *,
    attack: str = "loss",
    shadow_models: int = 16,
    site: str = "",
    limit: int = 1000,
    steps: int = 30,
    restarts: int = 2,
    canaries: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Audit:
    """Audit the model of one method run, and write audit.json to its folder.

    Args:
        run_dir: The run folder.
        label: Label of the method; by default the last one that shares a model.
        seed: Seed of the method run; by default the first.
        attack: ``loss``, ``lira``, ``rmia`` or ``all``: which attacks tell members from non-members.
        shadow_models: Number of models to train for LiRA and RMIA. Each costs as much as the method run.
        site: The site whose patients are tried; by default all sites, and for the canaries the site with the largest
            ε.
        limit: Largest number of patients of each kind and site to try, drawn with the seed.
        steps: Number of optimization steps of the inversion from each start.
        restarts: Number of starts of the inversion.
        canaries: Number of canaries in private training; 0 omits that audit. The default is what the claim needs.
        progress: Called with what is trained, and the finished and the whole amount of work.

    Raises:
        NotARun: If the folder is not a run.
        NotAudited: If the method run has no model.
        DataChanged: If the data are not those that the run began with, so that its members are not known.
    """
    run = read_run(run_dir)
    label = label or _last_shared(run)
    target = _target(run, label, run.info.seeds[0] if seed is None else seed)
    sites = _sites(run, target, site)
    members = audit_membership(target, sites, attack, shadow_models, limit, progress)
    drawn = _inverted(target, sites[0], limit, inversion.Inversion(steps=steps, restarts=restarts))
    privacy, whose, why = _privacy(run, target, label, site, canaries, progress)
    not_done = tuple(text for text in (LEFT_OUT.get(attack, ""), why) if text)
    result = Audit(label, target.seed, target.folder.name, members, drawn, privacy, whose, not_done)
    atomic.write_json(result.file(run.path), result.to_json())
    return result


def _target(run: Run, label: str, seed: int) -> Target:
    """Return the model of a method run and what it was trained from."""
    from safetensors import safe_open

    file = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None) / "model.safetensors"
    if not file.is_file():
        methods = ", ".join(m.label for m in run.info.methods)
        seeds = ", ".join(str(s) for s in run.info.seeds)
        unfinished = label in [m.label for m in run.info.methods] and seed in run.info.seeds
        why = (
            f"{label} is not finished with seed {seed}: go on with polyclinic run --resume"
            if unfinished
            else (f"there is no method {label!r} with seed {seed}. Methods: {methods}. Seeds: {seeds}")
        )
        raise NotAudited(f"{run.path}: {why}")
    study, _, data = read_again(run, seed)
    plan = read_plan(file)
    with safe_open(file, "pt") as opened:
        taken = int((opened.metadata() or {}).get("round", study.rounds))
    method, params = plan.build_method(), read_tensors(file)
    task = method.prediction_task or plan.build_task()
    if any(method.kept_at_sites(name) for name in task.first()):
        raise NotAudited(
            f"{run.path}: with {label} each site keeps layers of its own, so that no model can be attacked as a whole. "
            "Audit another method"
        )
    return Target(file.parent, study, plan, data, seed, task, params, taken)


def _sites(run: Run, target: Target, site: str) -> list[str]:
    """Where patients are tried."""
    able = [name for name in target.data.training if {"train", "test"} <= target.data.sites[name].keys()]
    able = [name for name in able if len(target.data.sites[name]["train"])]
    if not able:
        raise NotAudited(
            f"{run.path}: no site has both training and test data, so members cannot be compared with non-members"
        )
    if site and site not in able:
        raise NotAudited(f"{run.path}: {site} is no site with training and test data. There are {', '.join(able)}")
    return [site] if site else able


def _inverted(target: Target, site: str, limit: int, how: inversion.Inversion) -> Inverted:
    """One of a site's training images, from its gradient."""
    model, roles = load(target.task.model(), target.params).eval(), target.data.sites[site]
    x, y = roles["train"][torch.tensor([0])]
    others = torch.randperm(len(roles["test"]), generator=Site("audit", seed=target.seed).rng(site, "test"))[:limit]
    prior = roles["test"][others][0].mean(0)
    drawn = inversion.audit(model, target.task.loss, x, y, prior, how, seed=target.seed)
    control, found = (Leak(one.psnr_db, one.guess_db, one.rdlv) for one in (drawn.control, drawn.found))
    return Inverted(site, control, found, drawn.says)


def _privacy(
    run: Run, target: Target, label: str, site: str, canaries: int | None, progress: Progress
) -> tuple[canary.Verdict | None, str, str]:
    """The lower bound on ε, and whose; or why there is none."""
    if not target.plan.training.get("private"):
        noised = ", and this run adds noise to whole updates" if target.plan.private else ""
        return None, "", f"No lower bound on ε: the canary audit is of training with DP-SGD{noised}."
    if canaries == 0:
        return None, "", "No lower bound on ε: no canaries were asked for."
    mine = [p for p in run.privacy if (p.method, p.seed, p.fold) == (label, target.seed, 0)]
    claims: dict[str, Privacy] = {p.site: p for p in mine if p.site}  # the last of each site
    whose = site or max(target.plan.sites, key=lambda name: (claims[name].epsilon or 0.0) if name in claims else 0.0)
    each = [r for r in run.rounds if (r.method, r.seed, r.fold) == (label, target.seed, 0)]
    rounds = sum(whose in r.asked and whose not in r.lost for r in each)  # those in which it trained, and paid
    try:
        verdict = audit_training(
            target.plan,
            target.data.sites[whose],
            whose,
            claims.get(whose),
            rounds=rounds,
            canaries=canaries,
            seed=target.seed,
            progress=progress,
        )
    except NotAudited as reason:
        return None, "", f"No lower bound on ε: {reason}."
    return verdict, whose, ""


def _last_shared(run: Run) -> str:
    shared = [m.label for m in run.info.methods if m.leaves != "nothing" and not m.baseline]
    if not shared:
        raise NotAudited(f"{run.path}: no federated method of this run shares a model; name one to audit it anyway")
    return shared[-1]
