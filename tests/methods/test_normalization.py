"""FedBN and SiloBN by module type, one round against an average in numpy over hand-picked layers.

FedBN: Li et al., ICLR 2021, equation 2: every layer but batch normalization is averaged. SiloBN: Andreux et al., 2020,
section 2.2: the weights of batch normalization are averaged, its running statistics are not.
"""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.personalization.partial_personalization import fedbn, silobn
from tests.conftest import little_sites
from tests.support.known import known

# Of `cnn` with depth 2: encoder.1 and encoder.5 are the batch normalizations. Nothing in their names says so.
NORMALIZATION = {f"encoder.{i}.{part}" for i in (1, 5) for part in ("weight", "bias", "running_mean", "running_var")}
RUNNING = {name for name in NORMALIZATION if "running" in name}


@pytest.mark.parametrize(("make", "kept"), [(fedbn, NORMALIZATION), (silobn, RUNNING)])
def test_one_round_is_the_average_of_what_is_shared(make: Any, kept: Any) -> None:
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    assert "bn" not in "".join(task.first())
    local, sites, first = LocalTraining(batch_size=8, lr=0.1), little_sites(), task.first()
    method = make(task, local)
    federation, state = InProcess(method, sites), method.init(first)
    for step in train(method, federation, state, rounds=1):
        state = step.state
        assert not kept & step.reply.mean("update").total.keys()  # they do not leave
    ends = {name: local.fit(task, first, site, 0) for name, site in sites.items()}
    sizes = np.array([len(site.data["train"]) for site in sites.values()], float)
    for name in first:
        if name in kept:
            for site, end in ends.items():
                torch.testing.assert_close(federation.memory[site]["own"][name], end[name])
        else:
            stacked = np.stack([end[name].double().numpy() for end in ends.values()])
            expected = np.tensordot(sizes / sizes.sum(), stacked, 1)
            np.testing.assert_allclose(state.params[name].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_they_differ_in_the_weights_of_normalization(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """A site's model under SiloBN has everyone's scales and shifts; under FedBN its own."""
    models = {}
    for make in (fedbn, silobn):
        method = make(task, local)
        federation, state = InProcess(method, sites), method.init(task.first())
        for step in train(method, federation, state, rounds=2):
            state = step.state
        request = known(method.request(state))
        models[make] = [method.site_model(request.for_site(s), federation.memory[s])["encoder.1.weight"] for s in sites]
    assert not torch.equal(*models[fedbn][:2])
    assert torch.equal(*models[silobn][:2])
