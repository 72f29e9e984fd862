"""Simulated patients, for protocols whose real data need an agreement. Every result on them is marked as simulated.

``RoiPhantom`` draws regional gray-matter volumes as used in the survey's experiment (Guan, Yap, Bozoki and Liu, 2024,
section 6: ADNI-1 and ADNI-2, patients against controls), with a scanner that scales, shifts and blurs each region by
site. The parameters are chosen so that a linear model performs about as such studies report; they are not fitted to
ADNI.

``SurvivalPhantom`` draws times to an event from a proportional hazards model with a Weibull baseline hazard, by
inversion (Bender, Augustin and Blettner, "Generating survival times to simulate Cox proportional hazards models",
Statistics in Medicine 2005, https://doi.org/10.1002/sim.2059).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from polyclinic.data.examples import DataError, Examples
from polyclinic.data.source import Info, Table, digest

SIMULATED = "Simulated patients: regional volumes drawn from a stated model, not measured in anyone."
SIMULATED_TIMES = "Simulated patients: covariates and times drawn from a stated model, not observed in anyone."
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RoiPhantom:
    """Regional volumes of simulated patients and controls, measured by each site's scanner.

    Region r of subject i at site s: ``x = a_sr (m_r + y_i d_r + g_i l_r + e_ir) + b_sr + n_isr``, with disease y, a
    head size g shared by all regions, and per-site gain a, offset b and noise n.

    Attributes:
        sites: Number of scanners.
        subjects: Number of subjects per scanner.
        regions: Number of regions, as in an atlas; a fifth of them shrink in disease.
        effect: Shrinkage of an affected region in standard deviations.
        gain: Standard deviation of a site's gain over regions. ``shift``: that of its offset.
        noise: Largest standard deviation of a site's own noise.
        seed: Seed of the phantom.
    """

    sites: int = 2
    subjects: int = 400
    regions: int = 90
    effect: float = 0.35
    gain: float = 0.15
    shift: float = 0.6
    noise: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        small = {"sites": 1, "subjects": 10, "regions": 5}
        if wrong := [
            f"{name} must be at least {least}" for name, least in small.items() if getattr(self, name) < least
        ]:
            raise DataError(wrong)

    @property
    def info(self) -> Info:
        """Description of the data set, which states that it is simulated."""
        return Info(
            "roi-phantom",
            "Simulated regional brain volumes",
            "table",
            "brain",
            "classification",
            ("control", "patient"),
            license="made here",
            simulated=SIMULATED,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the options."""
        return digest("roi-phantom", 1, sorted(asdict(self).items()))

    def table(self) -> Table:
        """Return the table of subjects."""
        _, y, site = self._drawn
        ids = _ids(len(y))
        return Table(ids, ids, y, {"site": tuple(f"scanner-{s + 1}" for s in site)}, ("site",))

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named subjects."""
        x, y, _ = self._drawn
        return _examples(x, y, ids)

    @cached_property
    def _drawn(self) -> tuple[Array, Array, Array]:
        """Volumes float32 [n, regions], disease int64 [n], site int64 [n]."""
        rng = np.random.default_rng(self.seed)
        n, r = self.sites * self.subjects, self.regions
        site, y = np.arange(n) // self.subjects, np.arange(n) % 2
        mean, loading = rng.normal(0, 1, r), rng.uniform(0.3, 0.7, r)
        affected = np.zeros(r)
        affected[rng.permutation(r)[: max(1, r // 5)]] = -self.effect
        head, own = rng.normal(0, 1, (n, 1)), rng.normal(0, 1, (n, r)) * np.sqrt(1 - loading**2)
        true = mean + y[:, None] * affected + head * loading + own
        gain = np.exp(rng.normal(0, self.gain, (self.sites, r)))
        offset = rng.normal(0, self.shift, (self.sites, r))
        blur = rng.uniform(0, self.noise, (self.sites, 1))
        seen = gain[site] * true + offset[site] + blur[site] * rng.normal(0, 1, (n, r))
        return seen.astype(np.float32), y.astype(np.int64), site


@dataclass(frozen=True)
class SurvivalPhantom:
    """Covariates of simulated patients with the time in months to an event, which is censored for some.

    Patient i at site s has the log hazard ``h_i = effect (x_1 + 0.7 x_2 − 0.5 x_3 + curve (x_4² − 1) / √2) + b_s``, and
    the time ``40 (−log u_i / exp h_i)^(1/1.3)``, which has a Weibull distribution. Patients are censored at a uniform
    time between 6 and ``follow_up`` months. All other covariates have no effect.

    Attributes:
        subjects: Number of patients at each site.
        features: Number of covariates.
        effect: Log hazard ratio of the first covariate.
        curve: Effect of the fourth covariate, which a linear model does not see, relative to the first.
        shift: Standard deviation of the log baseline hazard b between sites.
        follow_up: The longest follow-up in months.
        seed: Seed of the phantom.
    """

    subjects: tuple[int, ...] = (200, 120, 60, 40)
    features: int = 12
    effect: float = 0.7
    curve: float = 0.0
    shift: float = 0.3
    follow_up: float = 90.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.subjects or min(self.subjects) < 1:
            problems.append(f"subjects = {list(self.subjects)}: give the number of patients at each site")
        if self.features < 4:
            problems.append(f"features = {self.features}: at least 4 are needed")
        if not self.follow_up > 6:
            problems.append(f"follow_up = {self.follow_up}: must be above 6 months")
        if problems:
            raise DataError(problems)

    @property
    def info(self) -> Info:
        """Description of the data set, which states that it is simulated."""
        title = "Simulated times to an event"
        return Info(
            "survival-phantom", title, "table", "none", "survival", license="made here", simulated=SIMULATED_TIMES
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the options."""
        return digest("survival-phantom", 1, sorted(asdict(self).items()))

    def table(self) -> Table:
        """Return the table of patients."""
        _, y, site = self._drawn
        ids = _ids(len(y))
        return Table(ids, ids, y, {"site": tuple(f"hospital-{s + 1}" for s in site)}, ("site",), True)

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named patients."""
        x, y, _ = self._drawn
        return _examples(x, y, ids)

    @cached_property
    def _drawn(self) -> tuple[Array, Array, Array]:
        """Covariates float32 [n, features], time and event float32 [n, 2], site int64 [n]."""
        rng = np.random.default_rng(self.seed)
        site = np.repeat(np.arange(len(self.subjects)), self.subjects)
        x = rng.normal(0, 1, (len(site), self.features))
        base = rng.normal(0, self.shift, len(self.subjects))
        linear = x[:, 0] + 0.7 * x[:, 1] - 0.5 * x[:, 2] + self.curve * (x[:, 3] ** 2 - 1) / 2**0.5
        log_hazard = self.effect * linear + base[site]
        time = 40 * (rng.exponential(size=len(site)) / np.exp(log_hazard)) ** (1 / 1.3)
        censored = rng.uniform(6, self.follow_up, len(site))
        seen = np.maximum(np.minimum(time, censored), 0.01)
        y = np.stack([seen, time <= censored], 1).astype(np.float32)
        return x.astype(np.float32), y, site


def _ids(count: int) -> tuple[str, ...]:
    """Return the names of ``count`` patients, which end with their rows."""
    return tuple(f"phantom-{i:05d}" for i in range(count))


def _examples(x: Array, y: Array, ids: Sequence[str]) -> Examples:
    """Return the named rows of ``x`` and ``y``."""
    rows = [int(name.removeprefix("phantom-")) for name in ids]
    return Examples(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), tuple(ids), tuple(ids))
