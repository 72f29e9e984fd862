"""The release audit as a command: of a study's methods that add noise, or of one method by its name."""

from dataclasses import dataclass
from pathlib import Path

from polyclinic.attacks.release_audit import Verdict
from polyclinic.core.config_problems import Problem
from polyclinic.data.federation import federate
from polyclinic.engines.plan import Plan, ways
from polyclinic.engines.policy.coverage import audited, typical
from polyclinic.methods.registry import entry
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.loader import table_of, text_of
from polyclinic.studies.config.method_plan import plan_of
from polyclinic.studies.config.study_config import parse

SAID = {"dp-sgd": "private training (DP-SGD)", "gaussian": "clip and noise on replies"}


@dataclass(frozen=True)
class Audited:
    """One verdict.

    Attributes:
        label: Of the method. ``noise``: where noise is added, in words.
    """

    label: str
    noise: str
    verdict: Verdict


def audit_release(target: str, full: bool = False) -> list[Audited]:
    """Audit what ``target`` names, and return the verdicts.

    Args:
        target: A study file, of which every method that adds noise is audited with its settings; or the name of a
            method, which is audited with private training and with noise on its replies.
        full: Whether to try more changes, in all roles and at all sites.

    Raises:
        BadStudy: If the file is not a study, or adds no noise.
        DataError: If its data cannot be read. They tell the shape of an example, and are not used otherwise.
        UnknownMethod: If there is no such method; the message suggests one.
    """
    if target.endswith(".toml") or "/" in target or Path(target).is_file():
        return [_verdict(label, plan, full) for label, plan in _plans(Path(target))]
    entry(target)
    return [_verdict(target, typical(target, way), full) for way in ("dp-sgd", "gaussian")]


def _plans(file: Path) -> list[tuple[str, Plan]]:
    """The plans of the methods of a study that add noise, by label."""
    text = text_of(file)
    study = parse(text, file, covered=False)
    noisy = [m for m in study.methods if ways(study.training_of(m), m.uplink)]
    if not noisy:
        says = "no method of this study trains privately or sends through noise, so no ε is claimed and none is audited"
        raise BadStudy(file, text, table_of(text, file, None), [Problem(("methods",), says)])
    data = federate(study.data, study.seeds[0])
    return [(method.called, plan_of(study, method, data, study.seeds[0])) for method in noisy]


def _verdict(label: str, plan: Plan, full: bool) -> Audited:
    """The verdict on one plan; a method that cannot be built is not covered."""
    noise = " and ".join(SAID[way] for way in ways(plan.training, plan.uplink))
    try:
        return Audited(label, noise, audited(plan, full))
    except (ValueError, TypeError) as error:
        return Audited(label, noise, Verdict(plan.method, (), str(error), 0, 0, 0.0, "patient"))
