"""The robust rules under the names by which a study calls them. The papers are beside the rules, in
``methods.robust.rules``.

``over`` names the method whose updates the rule aggregates, with that method's own defaults: a rule is not tied to
FedAvg. ``bound`` and ``quarantined`` are as in ``Robust``.
"""

from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Average, Rule
from polyclinic.methods.robust.rules.bulyan import Bulyan
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.dos import DOS
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.geometric_median import GeometricMedian
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum


def watched(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """The plain mean, with every site's standing for people to see.

    Nothing is withstood, except where ``bound`` is set: then no site is heard louder than the usual one. A site stands
    out by the median of its distances to the others (Iglewicz and Hoaglin, "How to detect and handle outliers", 1993).
    """
    return _under(Average(), task, local, sites, rounds, over, bound, quarantined)


def krum(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    corrupt: float = 0.2,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """The one update that lies closest to its neighbors; all else that was learned in the round is lost.

    Blanchard, El Mhamdi, Guerraoui and Stainer, NeurIPS 2017, https://arxiv.org/abs/1703.02757. ``corrupt`` is the
    share of sites presumed corrupt; f of n sites need n to be at least 2f + 3.

    Args:
        corrupt: The share of sites presumed corrupt.
    """
    return _under(Krum(corrupt), task, local, sites, rounds, over, bound, quarantined)


def multi_krum(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    corrupt: float = 0.2,
    keep: int = 0,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """The mean of the updates that lie closest to their neighbors.

    Blanchard et al., NeurIPS 2017, https://arxiv.org/abs/1703.02757. ``corrupt`` is the share of sites presumed
    corrupt; f of n sites need n to be at least 2f + 3. ``keep`` is how many updates are averaged, n - f where 0: those
    of honest hospitals that differ are left out first.

    Args:
        corrupt: The share of sites presumed corrupt.
        keep: How many updates are averaged; n - f where 0.
    """
    return _under(MultiKrum(corrupt, keep), task, local, sites, rounds, over, bound, quarantined)


def bulyan(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    corrupt: float = 0.1,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """Krum's choice again and again, then the trimmed mean around the median.

    El Mhamdi, Guerraoui and Rouault, ICML 2018, https://arxiv.org/abs/1802.07927. ``corrupt`` is the share of sites
    presumed corrupt; f of n sites need n to be at least 4f + 3.

    Args:
        corrupt: The share of sites presumed corrupt.
    """
    return _under(Bulyan(corrupt), task, local, sites, rounds, over, bound, quarantined)


def coordinate_median(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """Each coordinate's median over sites, whatever minority is corrupt; sites count the same.

    Yin, Chen, Ramchandran and Bartlett, ICML 2018, https://arxiv.org/abs/1803.01498.
    """
    return _under(Median(), task, local, sites, rounds, over, bound, quarantined)


def trimmed_mean(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    corrupt: float = 0.2,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """Each coordinate's mean over sites without its largest and smallest values; sites count the same.

    Yin, Chen, Ramchandran and Bartlett, ICML 2018, https://arxiv.org/abs/1803.01498. ``corrupt`` is the share of values
    left out at either end.

    Args:
        corrupt: The share of values left out at either end.
    """
    return _under(TrimmedMean(corrupt), task, local, sites, rounds, over, bound, quarantined)


def geometric_median(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    weighted: bool = False,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """The point nearest to all updates together (RFA).

    Pillutla, Kakade and Harchaoui, IEEE Transactions on Signal Processing 2022, https://arxiv.org/abs/1912.13445.
    ``weighted`` counts sites by what they claim to weigh, as in the paper; a liar then counts more.

    Args:
        weighted: Whether sites count by what they claim to weigh, as in the paper; a liar then counts more.
    """
    return _under(GeometricMedian(weighted), task, local, sites, rounds, over, bound, quarantined)


def centered_clipping(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    tau: float = 0.0,
    steps: int = 3,
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """The mean of what each site would move the last aggregate, none by more than ``tau``.

    Karimireddy, He and Jaggi, ICML 2021, https://arxiv.org/abs/2012.10333. Where ``tau`` is 0, the median distance
    takes its place. ``steps`` is how often to repeat it.

    Args:
        tau: The farthest a site may move the aggregate; the median distance where 0.
        steps: How often it is repeated.
    """
    return _under(CentredClipping(tau, steps), task, local, sites, rounds, over, bound, quarantined)


def fltrust(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    root: str = "",
    bound: float = 0.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """Updates weighed by their agreement with a trusted one, and scaled to its length.

    Cao, Fang, Liu and Gong, NDSS 2021, https://arxiv.org/abs/2012.13995. ``root`` is whose: a site's, the first
    in name order where none is named; or ``server``, where that has training data of its own.

    Args:
        root: Whose update is trusted: a site's, or ``server``; the first site's in name order where none is named.
    """
    return _under(FLTrust(root or min(sites)), task, local, sites, rounds, over, bound, quarantined)


def dos(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    *,
    over: str = "fedavg",
    bound: float = 1.0,
    quarantined: tuple[str, ...] = (),
) -> Robust:
    """Updates weighed by how usual their distances to the others are (DOS, with COPOD), behind a bound on their length.

    Alkhunaizi, Kamzolov, Takáč and Nandakumar, MICCAI 2022, https://arxiv.org/abs/2207.10804. It needs no setting, but
    colluders who send the same pass for the most usual sites, and one honest site may get a third of the weight.
    """
    return _under(DOS(), task, local, sites, rounds, over, bound, quarantined)


def _under(
    rule: Rule,
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    rounds: int,
    over: str,
    bound: float,
    quarantined: tuple[str, ...],
) -> Robust:
    """The method called ``over`` under ``rule``.

    Raises:
        ValueError: If sites are quarantined that there are not.
    """
    if unknown := set(quarantined) - set(sites):
        raise ConfigError(f"quarantined names {sorted(unknown)}, which no site is called; there are {', '.join(sites)}")
    return Robust(build(over, Setting(task, local, tuple(sites), rounds)), rule, bound, tuple(quarantined))
