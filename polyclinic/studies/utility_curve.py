"""Cost of privacy: a study's method and data without noise and at several ε, for one or more numbers of rounds.

The result is an ordinary study, which is run, resumed and reported as any other. Its report plots quality against ε.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.config_problems import Problem
from polyclinic.core.toml_text import dumps
from polyclinic.data.federation import federate
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.methods import registry
from polyclinic.privacy.accounting import BadPlan, plan
from polyclinic.statistics.intervals import Estimate
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.loader import table_of, text_of
from polyclinic.studies.config.study_config import parse

PLAIN = "no-noise"


@dataclass(frozen=True)
class Price:
    """Cost of one ε.

    Attributes:
        epsilon: The wanted ε; None for training without noise. ``noise``: σ, which keeps it at the smallest site.
        rounds: For how many rounds.
        value: The mean over training sites of the study's metric, on test patients; its interval is over patients.
        seed_sd: Standard deviation of ``value`` over seeds; None with one seed.
        validation: The same mean on validation patients, by which numbers of rounds are compared.
    """

    epsilon: float | None
    noise: float
    rounds: int
    value: Estimate
    seed_sd: float | None = None
    validation: float | None = None


def priced(
    file: Path,
    epsilons: Sequence[float],
    delta: float,
    rounds: Sequence[int] = (),
    bound: float = 1.0,
    method: str = "",
) -> str:
    """Return a study, as TOML, that measures the cost of ``epsilons`` on the data and task of the study in ``file``.

    Args:
        epsilons: Above 0, each once.
        delta: δ, below one in the number of patients of the smallest site.
        rounds: Numbers of rounds to compare; by default the study's own.
        bound: Bound on the norm of one patient's gradient.
        method: Label of the method; by default the first federated method.

    Raises:
        BadStudy: If the file is not a study, or has no such method.
        DataError: If its data cannot be read.
        BadPlan: If no noise achieves an ε, or the numbers are invalid.
    """
    text = text_of(file)
    study, data = parse(text, file), table_of(text, file, None)
    federated = [m for m in study.methods if not registry.entry(m.name).baseline]
    chosen = next((m for m in federated if method in ("", m.called)), None)
    if chosen is None:
        there = ", ".join(m.called for m in federated) or "none"
        says = (
            f'no federated method of the study is called "{method}". There are: {there}'
            if method
            else ("the study has no federated method, so nothing leaves a site")
        )
        raise BadStudy(file, text, data, [Problem(("methods",), says)])
    if not epsilons or len(set(epsilons)) != len(epsilons):
        raise BadPlan("give one ε or more, each once")
    patients = min(
        row.roles["train"].patients
        for seed in study.seeds
        for row in federate(study.data, seed).rows
        if not row.external and "train" in row.roles
    )
    if delta >= 1 / patients:
        raise BadPlan(f"δ = {delta:g} must be below 1 in {patients}, the patients of the smallest site")
    given = study.training_of(chosen)
    batch, epochs = int(given["batch_size"]), int(given["epochs"])
    item = chosen.model_dump(mode="json", exclude_unset=True)
    scenarios = []
    for many in rounds or [study.rounds]:
        methods: list[dict[str, Any]] = [{**item, "label": PLAIN}]
        for wanted in epsilons:
            rate, steps = min(1.0, batch / patients), int(given.get("steps") or epochs * -(-patients // batch))
            noise = plan(wanted, delta, rate, many, steps=steps, batch=batch).noise
            private = {"noise": noise, "bound": bound, "unit": "patient"}
            training = {**item.get("training", {}), "private": private}
            methods.append({**item, "label": _label(wanted), "training": training})
        scenarios.append({"name": f"rounds-{many}", "set": {"rounds": many, "methods": methods}})
    kept = {key: value for key, value in data.items() if key not in ("methods", "search", "privacy", "attack")}
    budget = {"epsilon": 1.001 * max(epsilons), "delta": delta, "unit": "patient"}
    name = f"{study.name[:50]}-priced"
    return dumps(
        {
            **kept,
            "name": name,
            "privacy": budget,
            "methods": scenarios[0]["set"]["methods"],  # type: ignore[index]
            "scenarios": scenarios,
        }
    )


def prices(runs: Mapping[int, Path], epsilons: Sequence[float], options: Options = Options()) -> list[Price]:
    """What was found in the ``runs``, by number of rounds: without noise first, then by ε."""
    found = []
    for rounds, folder in runs.items():
        run = read_run(folder)
        result = evaluate(run, options)
        study = parse((folder / "study.toml").read_text(encoding="utf-8"), folder / "study.toml")
        noise = {m.called: float(m.training.get("private", {}).get("noise", 0.0)) for m in study.methods}
        for wanted in [None, *sorted(epsilons)]:
            label = PLAIN if wanted is None else _label(wanted)
            one = result.of(label)
            found.append(Price(wanted, noise[label], rounds, one.macro, one.seed_sd, one.validation))
    return found


def best_rounds(found: Sequence[Price], higher_is_better: bool) -> dict[float, int]:
    """For each ε, the number of rounds with the best value on validation patients; the fewest of equal ones."""
    best: dict[float, Price] = {}
    sign = 1 if higher_is_better else -1
    for one in sorted(found, key=lambda p: p.rounds):
        if one.epsilon is None or one.validation is None:
            continue
        before = best.get(one.epsilon)
        if before is None or before.validation is None or sign * one.validation > sign * before.validation:
            best[one.epsilon] = one
    return {wanted: best[wanted].rounds for wanted in sorted(best)}


def _label(epsilon: float) -> str:
    return f"eps-{epsilon:g}"
