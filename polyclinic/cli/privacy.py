"""``polyclinic privacy``: the noise that a target ε needs, its cost in accuracy, and what a ledger has spent."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from polyclinic.cli.rendering import Json, document, hint, line
from polyclinic.errors import ConfigError

if TYPE_CHECKING:
    from polyclinic.studies.utility_curve import Price

app = App(name="privacy", help="Plan a privacy budget, and read what was spent.")


@app.command
def plan(
    study: Path | None = None,
    *,
    epsilon: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
    delta: float,
    rounds: tuple[int, ...] = (),
    patients: int = 0,
    batch: int = 16,
    epochs: int = 1,
    bound: float = 1.0,
    method: str = "",
    resume: bool = False,
    fresh: bool = False,
    out: Path = Path("runs"),
    workers: int | None = None,
    json_: Json = False,
) -> None:
    """Compute the noise that keeps a privacy budget, and measure its cost in accuracy.

    With a study file, one of its methods is trained on its data, without noise and at each ε, and the study's metric
    is shown against ε. Without one, `--patients` and `--rounds` are enough to compute the noise.

    Args:
        study: A study file. Its first federated method is used, with its seeds, rounds and training.
        epsilon: The target ε; several give a curve.
        delta: δ, below one divided by the number of patients.
        rounds: The number of rounds; several are compared, since more rounds train longer and need more noise. The
            study's own by default.
        patients: Without a study: the number of training patients of the smallest site, which needs the most noise.
        batch: Without a study: the mean number of patients in a training step.
        epochs: Without a study: passes over the data in a round.
        bound: With a study: the norm to which each patient's gradient is clipped.
        method: With a study: the label of another of its methods.
        resume: Continue an earlier run.
        fresh: Delete earlier runs and start again.
        out: Folder of the run folders. Each holds a report with a figure of the curve.
        workers: Number of processes; the number of cores by default.
    """
    from polyclinic.privacy.accounting import BadPlan

    if study is None:
        if patients < 1 or not rounds or min(rounds) < 1:
            raise BadPlan("give a study file, or the number of patients and rounds: --patients 120 --rounds 20")
        if batch < 1 or epochs < 1:
            raise BadPlan("--batch and --epochs must be at least 1")
        with document(json_) as emit:
            emit(_noise(epsilon, delta, rounds, patients, batch, epochs))
        return
    if patients:
        raise BadPlan(f"--patients is for planning without a study file; {study} defines the number of patients")
    from polyclinic.cli.run import require_file, run_all
    from polyclinic.studies.config.scenarios import parse_all
    from polyclinic.studies.utility_curve import priced, prices

    require_file(study)
    with document(json_) as emit:
        scenarios = parse_all(priced(study, epsilon, delta, rounds, bound, method), study)
        run_all(study, scenarios, resume, fresh, out, workers)
        curve = prices({scenario.study.rounds: scenario.folder(out) for scenario in scenarios}, epsilon)
        metric = scenarios[0].study.metric
        _curve(curve, metric, scenarios[0].study.higher_is_better)
        emit({"metric": metric, "curve": curve})


def _noise(
    epsilon: tuple[float, ...], delta: float, rounds: tuple[int, ...], patients: int, batch: int, epochs: int
) -> list[dict[str, Any]]:
    """Print and return the noise for each ε and number of rounds."""
    from polyclinic.learning.training.dp_sgd import Spend
    from polyclinic.privacy.accounting import curve
    from polyclinic.privacy.guarantee import guarantee, meaning

    rate, steps = min(1.0, batch / patients), epochs * -(-patients // batch)
    rows = []
    for many in rounds:
        line(
            f"  {patients} patients, batches of {batch} (q = {rate:.3f}), {many} rounds of {steps} steps, δ = {delta:g}"
        )
        line("      ε    by Rényi   noise   noise on a mean gradient, over the bound")
        for one in curve(epsilon, delta, rate, many, steps=steps, batch=batch):
            bar = "█" * max(1, round(40 * min(1.0, one.deviation)))
            line(f"  {one.epsilon:>6.2f}  {one.epsilon_rdp:>8.2f}  {one.noise:>6.3f}   {one.deviation:.4f} {bar}")
            rows.append(
                {"rounds": many, "epsilon": one.epsilon, "epsilon_rdp": one.epsilon_rdp, "delta": delta}
                | {"noise": one.noise, "deviation": one.deviation}
            )
    protects = guarantee([Spend(1.0, rate, 1, "patient")], "patient")
    line(f"  {meaning(protects.unit, protects.adjacency, protects.assumptions)}")
    hint("  The cost in accuracy on your data: polyclinic privacy plan STUDY")
    hint('  In a study: [training] private = { noise = …, bound = 1.0, unit = "patient" }')
    return rows


def _curve(curve: "list[Price]", metric: str, higher: bool) -> None:
    """Print quality against ε."""
    from polyclinic.learning.training.dp_sgd import Spend
    from polyclinic.privacy.guarantee import guarantee, meaning
    from polyclinic.studies.utility_curve import best_rounds

    largest = max((one.value.value or 0.0 for one in curve), default=1.0) or 1.0
    protects = guarantee([Spend(1.0, 0.5, 1, "patient")], "patient")
    line(f"\n  {meaning(protects.unit, protects.adjacency, protects.assumptions)}")
    line(f"  {'rounds':>6}  {'ε':>6}  {'noise':>6}   {metric} on test patients, mean over sites")
    for one in curve:
        target = "none" if one.epsilon is None else f"{one.epsilon:g}"
        value, low, high = one.value.value, one.value.low, one.value.high
        text = "—" if value is None else f"{value:.3f}"
        text += f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
        text += f" ± {one.seed_sd:.3f}" if one.seed_sd is not None else ""
        bar = "" if value is None else "█" * max(1, round(30 * value / largest))
        line(f"  {one.rounds:>6}  {target:>6}  {one.noise:>6.3f}   {text:<32} {bar}")
    better = "Higher" if higher else "Lower"
    line(f"  {better} is better. In brackets: 95 % interval over patients; ±: standard deviation over seeds.")
    if len({one.rounds for one in curve}) > 1:
        best = best_rounds(curve, higher)
        text = ", ".join(f"ε = {target:g} in {many} rounds" for target, many in best.items())
        line(f"  Best on validation patients: {text}.")


@app.command
def ledger(path: Path, *, json_: Json = False) -> None:
    """Show what was spent of a privacy budget, and what is left.

    Args:
        path: A ledger; a run folder, with the ledgers of its sites; or a site's folder, with one for each of its data
            sets.
    """
    from polyclinic.privacy.ledger import Ledger

    files = sorted({*path.glob("**/ledgers/*.jsonl"), *path.glob("*.jsonl.head")}) if path.is_dir() else [path]
    files = [file.with_name(file.name.removesuffix(".head")) for file in files]
    if not files:
        raise ConfigError(f"{path}: there is no ledger here. [privacy] in a study file or a site's policy creates one")
    with document(json_) as emit:
        rows = []
        for file in files:
            if not file.is_file():
                raise ConfigError(f"{file}: there is no such ledger")
            book = Ledger(file)
            budget, spent, members = book.budget(), book.spent(), book.members()
            place = f"{file.parent.parent.name}: " if path.is_dir() else ""
            line(f"  {place}{budget['site']}, {budget['data']}: {spent}")
            left = max(0.0, budget["epsilon"] - spent.epsilon)
            many = f"; {members['members']} hashes identify these data" if members else ""
            line(f"  the budget is ε = {budget['epsilon']:g} for every {budget['unit']}; {left:.3f} is left{many}")
            rows.append(
                {"ledger": file, "site": budget["site"], "data": budget["data"], "unit": budget["unit"]}
                | {"delta": budget["delta"], "budget": budget["epsilon"], "spent": spent.epsilon, "left": left}
            )
        emit(rows)
