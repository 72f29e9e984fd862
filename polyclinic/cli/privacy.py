"""``polyclinic privacy``: how much noise a wanted ε takes, and what a ledger has spent."""

from pathlib import Path

from cyclopts import App
from rich.console import Console

app = App(name="privacy", help="Plan a privacy budget, and read what was spent of one.")
console = Console(highlight=False)


@app.command
def plan(
    *, epsilon: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0), delta: float, patients: int, batch: int = 16,
    rounds: int, epochs: int = 1,
) -> None:  # fmt: skip
    """How much noise in each step of training keeps a patient's budget, and what it costs.

    Parameters
    ----------
    epsilon
        The wanted ε; several make a curve.
    delta
        δ, below one in the number of patients.
    patients
        How many patients the smallest site trains on: it needs the most noise.
    batch
        How many of them a step takes on average.
    rounds
        How many rounds the study has.
    epochs
        Passes over the data in a round.
    """
    from polyclinic.transforms.accounting import curve

    rate, steps = min(1.0, batch / patients), epochs * -(-patients // batch)
    console.print(
        f"  {patients} patients, batches of {batch} (q = {rate:.3f}), {rounds} rounds of {steps} steps, δ = {delta:g}"
    )
    console.print("      ε    by Rényi   noise   noise on a mean gradient, over the bound")
    for one in curve(epsilon, delta, rate, rounds, steps=steps, batch=batch):
        bar = "█" * max(1, round(40 * min(1.0, one.deviation)))
        console.print(f"  {one.epsilon:>6.2f}  {one.epsilon_rdp:>8.2f}  {one.noise:>6.3f}   {one.deviation:.4f} {bar}")
    console.print('  [dim]In a study: \\[training] private = { noise = …, bound = 1.0, unit = "patient" }[/dim]')


@app.command
def ledger(file: Path) -> None:
    """What was spent of a budget, and what is left.

    Parameters
    ----------
    file
        A ledger, as a run keeps them under arms/…/ledgers.
    """
    from polyclinic.transforms.ledger import Ledger

    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such ledger")
    found = Ledger(file)
    budget, spent = found.budget(), found.spent()
    console.print(f"  {budget['site']}, {budget['data']}: {spent}", soft_wrap=True)
    console.print(
        f"  the budget is ε = {budget['epsilon']:g}; {max(0.0, budget['epsilon'] - spent.epsilon):.3f} is left"
    )
