"""FedRep trains the head and the representation in turn, and shares only the second."""

from dataclasses import replace

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import InHead, Not
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.personalization.fedrep import fedrep
from polyclinic.testing import equal
from tests.support.known import known


def test_the_head_is_fitted_first_and_stays(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method, site, head = fedrep(task, local, head_epochs=3), sites["site-1"], InHead(task)
    reply, memory = method.site_update(known(method.request(method.init(task.first()))), {}, site)
    fitted = replace(local, epochs=3).fit(task, task.first(), site, 0, trainable=head, slot="head")
    whole = local.fit(task, fitted, site, 0, trainable=Not(head))
    change = tree.scale(reply.mean("update").total, 1 / 17)
    expected = tree.select(tree.sub(whole, task.first()), Not(head))
    assert change.keys() == expected.keys()
    assert all((change[n] - expected[n]).abs().max() < 1e-6 for n in change)
    for name, leaf in memory["own"].items():
        assert head(name)
        assert (leaf - fitted[name]).abs().max() < 1e-6


def test_without_head_training_the_head_never_moves(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = fedrep(task, local, head_epochs=0)
    memory = method.site_update(known(method.request(method.init(task.first()))), {}, sites["site-0"])[1]
    assert equal(memory["own"], tree.select(task.first(), InHead(task)))
