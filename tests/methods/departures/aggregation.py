"""Departures of robust rules, of topologies and of statistics."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from polyclinic.core import tree
from polyclinic.learning.tasks.case_sums import row_of, sums_of
from polyclinic.methods.robust.rules.aggregation_rule import Updates
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.dos import DOS
from polyclinic.methods.statistics.case_statistics import spacing
from polyclinic.methods.topology.swarm import Swarm
from tests.conftest import little_sites
from tests.support.departures import LOCAL, apart, departs, moves, small


@departs(
    "centered-clipping",
    "sites send updates instead of momentum",
    "the sum of 10 aggregates of 5 sites, relative, if these send momentum of 0.9 over rounds",
)
def centered_clipping_momentum() -> float:
    rng = torch.Generator().manual_seed(0)
    common, sums = torch.randn(20, generator=rng), []
    drawn = [{f"s{i}": common + torch.randn(20, generator=rng) for i in range(5)} for _ in range(10)]
    for beta in (0.0, 0.9):
        kept, last, total = drawn[0], dict[str, Any](), torch.zeros(20)
        for updates in drawn:
            kept = {s: (1 - beta) * g + beta * kept[s] for s, g in updates.items()}
            last = dict(CentredClipping().aggregate(Updates.of({s: {"w": m} for s, m in kept.items()}), last).aggregate)
            total = total + last["w"]
        sums.append(total)
    return float((sums[0] - sums[1]).norm() / sums[1].norm())


@departs(
    "dos", "compares updates instead of models", "largest difference of a site's weight among five, in points of 1"
)
def dos_models() -> float:
    task, sites = small(), little_sites(count=5)
    start = task.first()
    ends = {n: LOCAL.fit(task, start, site, 0) for n, site in sites.items()}
    changes = {n: tree.sub(end, start) for n, end in ends.items()}
    found, published = (DOS().aggregate(Updates.of(t), {}).shares for t in (changes, ends))
    assert found is not None
    assert published is not None
    return max(abs(found[n] - published[n]) for n in sites)


class OtherElection(Swarm):
    """A swarm that elects other sites."""

    def server_update(self, state: Any, reply: Any, server: Any) -> Any:
        return super().server_update(state, reply, replace(server, seed=99))


@departs(
    "swarm",
    "a random generator elects the merging site instead of a blockchain",
    "the global model after 3 rounds, relative to its change, from that of whichever site merges",
)
def swarm_election() -> float:
    start = small().first()
    found, published = (moves(kind(small(), LOCAL), little_sites(), start, 3) for kind in (Swarm, OtherElection))
    return apart(found, published, start)


@departs(
    "case-statistics",
    "sums in public bins in place of values of single images",
    "largest relative difference of a quantile (0.1, 0.5) of the spacing of 50 images",
)
def case_statistics_bins() -> float:
    rng = np.random.default_rng(0)
    spacings = rng.uniform(0.5, 3.0, 50)
    rows = torch.stack([row_of(torch.ones(1, 8, 8, 8), None, (float(s), 1.0, 1.0)) for s in spacings])
    with patch("polyclinic.learning.tasks.case_sums.rows_in", lambda data: [data]):
        sums = sums_of(rows)
    exact = [float(np.quantile(spacings, share)) for share in (0.1, 0.5)]
    return max(abs(spacing(sums, share)[0] - x) / x for share, x in zip((0.1, 0.5), exact, strict=True))
