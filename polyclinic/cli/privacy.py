"""``polyclinic privacy``: how much noise a wanted ε takes, what it costs in accuracy, and what a ledger has spent."""

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from polyclinic.cli.rendering import console
from polyclinic.errors import ConfigError

if TYPE_CHECKING:
    from polyclinic.studies.utility_curve import Price

app = App(name="privacy", help="Plan a privacy budget, and read what was spent of one.")


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
) -> None:
    """How much noise in each step of training keeps a patient's budget, and what it costs in accuracy.

    With a study file, one of its methods is trained on its data, without noise and at each ε, and the study's metric
    is drawn against ε. Without one, `--patients` and `--rounds` are enough to tell the noise.

    Args:
        study: A study file. Its first federated method is taken, with its seeds, rounds and training.
        epsilon: The wanted ε; several make a curve.
        delta: δ, below one in the number of patients.
        rounds: How many rounds; several are compared, for more rounds learn longer and need more noise. The study's
            own by default.
        patients: Without a study: how many patients the smallest site trains on; it needs the most noise.
        batch: Without a study: how many of them a step takes on average.
        epochs: Without a study: passes over the data in a round.
        bound: With a study: on the length of one patient's gradient; what is longer is cut to it.
        method: With a study: the label of another of its methods.
        resume: Go on where an earlier run stopped.
        fresh: Begin again.
        out: Where run folders are kept. Each holds a report, with a picture of the curve.
        workers: How many processes; as many as there are cores by default.
    """
    from polyclinic.privacy.accounting import BadPlan

    if study is None:
        if patients < 1 or not rounds or min(rounds) < 1:
            raise BadPlan("give a study file, or how many patients and rounds: --patients 120 --rounds 20")
        _noise(epsilon, delta, rounds, patients, batch, epochs)
        return
    if patients:
        raise BadPlan(f"--patients goes without a study file: {study} says how many patients a site has")
    from polyclinic.cli.run import run_all
    from polyclinic.studies.config.scenarios import parse_all
    from polyclinic.studies.utility_curve import priced, prices

    found = parse_all(priced(study, epsilon, delta, rounds, bound, method), study)
    run_all(study, found, resume, fresh, out, workers)
    told = prices({scenario.study.rounds: scenario.folder(out) for scenario in found}, epsilon)
    _curve(told, found[0].study.metric, found[0].study.higher_is_better)


def _noise(
    epsilon: tuple[float, ...], delta: float, rounds: tuple[int, ...], patients: int, batch: int, epochs: int
) -> None:
    """Tells the noise for each ε and number of rounds."""
    from polyclinic.learning.training.dp_sgd import Spend
    from polyclinic.privacy.accounting import curve
    from polyclinic.privacy.guarantee import guarantee, meaning

    rate, steps = min(1.0, batch / patients), epochs * -(-patients // batch)
    for many in rounds:
        console.print(
            f"  {patients} patients, batches of {batch} (q = {rate:.3f}), {many} rounds of {steps} steps, δ = {delta:g}"
        )
        console.print("      ε    by Rényi   noise   noise on a mean gradient, over the bound")
        for one in curve(epsilon, delta, rate, many, steps=steps, batch=batch):
            bar = "█" * max(1, round(40 * min(1.0, one.deviation)))
            said = f"  {one.epsilon:>6.2f}  {one.epsilon_rdp:>8.2f}  {one.noise:>6.3f}   {one.deviation:.4f} {bar}"
            console.print(said)
    whom = guarantee([Spend(1.0, rate, 1, "patient")], "patient")
    console.print(f"  {meaning(whom.unit, whom.adjacency, whom.assumptions)}", soft_wrap=True, markup=False)
    console.print("  [dim]What that costs in accuracy on your data: polyclinic privacy plan STUDY[/dim]")
    console.print('  [dim]In a study: \\[training] private = { noise = …, bound = 1.0, unit = "patient" }[/dim]')


def _curve(told: "list[Price]", metric: str, higher: bool) -> None:
    """Draws quality against ε."""
    from polyclinic.studies.utility_curve import best_rounds

    most = max((one.value.value or 0.0 for one in told), default=1.0) or 1.0
    from polyclinic.learning.training.dp_sgd import Spend
    from polyclinic.privacy.guarantee import guarantee, meaning

    whom = guarantee([Spend(1.0, 0.5, 1, "patient")], "patient")
    console.print(f"\n  {meaning(whom.unit, whom.adjacency, whom.assumptions)}", soft_wrap=True, markup=False)
    console.print(f"  {'rounds':>6}  {'ε':>6}  {'noise':>6}   {metric} on test patients, mean over sites")
    for one in told:
        wanted = "none" if one.epsilon is None else f"{one.epsilon:g}"
        value, low, high = one.value.value, one.value.low, one.value.high
        said = "—" if value is None else f"{value:.3f}"
        said += f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
        said += f" ± {one.seed_sd:.3f}" if one.seed_sd is not None else ""
        bar = "" if value is None else "█" * max(1, round(30 * value / most))
        console.print(f"  {one.rounds:>6}  {wanted:>6}  {one.noise:>6.3f}   {said:<32} {bar}", soft_wrap=True)
    better = "Higher" if higher else "Lower"
    console.print(f"  [dim]{better} is better. In brackets 95 % over patients; ± is the deviation over seeds.[/dim]")
    if len({one.rounds for one in told}) > 1:
        best = best_rounds(told, higher)
        listed = ", ".join(f"ε = {wanted:g} in {many} rounds" for wanted, many in best.items())
        console.print(f"  Best on validation patients: {listed}.", soft_wrap=True)


@app.command
def ledger(path: Path) -> None:
    """What was spent of a budget, and what is left.

    Args:
        path: A ledger; a run's folder, with the ledgers of its sites; or a site's folder, with one for each of its
            data sets.
    """
    from polyclinic.privacy.ledger import Ledger

    files = sorted({*path.glob("**/ledgers/*.jsonl"), *path.glob("*.jsonl.head")}) if path.is_dir() else [path]
    files = [file.with_name(file.name.removesuffix(".head")) for file in files]
    if not files:
        raise ConfigError(f"{path}: there is no ledger here. [privacy] in a study file or a site's policy makes one")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: there is no such ledger")
        found = Ledger(file)
        budget, spent = found.budget(), found.spent()
        where = f"{file.parent.parent.name}: " if path.is_dir() else ""
        console.print(f"  {where}{budget['site']}, {budget['data']}: {spent}", soft_wrap=True, markup=False)
        left = max(0.0, budget["epsilon"] - spent.epsilon)
        members = found.members()
        many = f"; {members['members']} hashes tell these data again" if members else ""
        console.print(f"  the budget is ε = {budget['epsilon']:g} for every {budget['unit']}; {left:.3f} is left{many}")
        console.print(f"  head {found.head()}: compare it with a run's records or a copy of yours", soft_wrap=True)
