"""``after`` sees the model after every step, and changes nothing itself."""

import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining


def test_after_each_step(task: Classification, sites: dict[str, Site]) -> None:
    local, start, site = LocalTraining(epochs=2, batch_size=8, lr=0.1), task.first(0), sites["site-1"]
    seen = []
    end = local.fit(task, start, site, 0, after_step=lambda model: seen.append(params_of(model)))
    assert len(seen) == local.count(site.data["train"])
    assert all(torch.equal(seen[-1][name], end[name]) for name in end)
    plain = local.fit(task, start, site, 0)
    assert all(torch.equal(plain[name], end[name]) for name in end)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in end)
