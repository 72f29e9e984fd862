"""Plug-in methods at a site: nothing of a package runs that the policy does not name, or that changed since the
approval.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.core.plugin_packages import exact_rule
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews
from polyclinic.methods.plugins import packages_in
from tests.engines.flare.test_approval import Server, study, survey
from tests.methods.test_plugins import CODE, Install, install
from tests.support.known import known
from tests.support.local_deployment import hospital, order, read_and_approve

__all__ = ["install"]
LITTLE = "[limits]\nmin_patients = 2\n"


def test_a_package_that_is_not_allowed_is_refused_before_it_is_loaded(tmp_path: Path, install: Install) -> None:
    (install() / "make.py").write_text("raise SystemExit('loaded')\n")
    homes = hospital(tmp_path / "h", policy=LITTLE)
    server = Server(homes, order("mine"))
    assert "needs the package mine-pack 1.0, whose code the policy does not allow" in server.hello()
    assert "refused" in server.ask("train")[0] or "waits" in server.ask("train")[0]
    assert "minepack" not in sys.modules


def test_an_ask_after_the_policy_changed_its_mind_loads_nothing(tmp_path: Path, install: Install) -> None:
    """The training process may have been started anew since the approval, and must not build the method first."""
    folder = install()
    homes = hospital(tmp_path / "h", policy=LITTLE + '[allow]\npackages = ["mine-pack"]\n')
    server = Server(homes, order("mine"))
    server.hello()
    read_and_approve(homes["site-0"], "run-1")
    assert server.hello() == ""
    homes["site-0"].policy.write_text(LITTLE)
    server.agent.trainer.close()
    for name in ("minepack", "minepack.make"):
        sys.modules.pop(name, None)
    assert "needs the package mine-pack" in server.ask("train")[0]
    assert "minepack" not in sys.modules
    assert folder.exists()


@pytest.mark.parametrize("automatic", [False, True])
def test_changed_code_of_a_package_waits_for_a_person(tmp_path: Path, install: Install, automatic: bool) -> None:
    folder, an = install(), order("mine")
    policy = LITTLE + '[allow]\npackages = ["mine-pack"]\n'
    policy += f'[approve]\nautomatically = ["{an.method_hash}"]\n' if automatic else ""
    homes = hospital(tmp_path / "h", policy=policy)
    server, reviews = Server(homes, an), Reviews(homes["site-0"].reviews)
    assert ("waits" in server.hello()) is not automatic
    if not automatic:
        read_and_approve(homes["site-0"], "run-1")
        assert server.hello() == ""
        assert known(reviews.current(an)).state == APPROVED
    (folder / "make.py").write_text(CODE + "# changed\n")
    assert reviews.current(an) is None
    lost, _ = server.ask("train")
    assert lost.startswith(("waits for a person", "refused: a package")), lost
    server.agent.trainer.close()  # a fresh process
    assert "waits for a person" in Server(homes, an).hello()
    (package,) = packages_in({"method": "mine"})
    assert known(reviews.get("run-1")).packages == (package,)
    read_and_approve(homes["site-0"], "run-1")
    assert known(reviews.get("run-1")).statement["packages"] == [list(package)]


def test_a_process_that_loaded_earlier_code_does_not_run_it_as_the_new(tmp_path: Path, install: Install) -> None:
    folder, an = install(), order("mine")
    homes = hospital(tmp_path / "h", policy=LITTLE + '[allow]\npackages = ["mine-pack"]\n')
    server = Server(homes, an)
    server.hello()
    (folder / "make.py").write_text(CODE + "# changed\n")
    Reviews(homes["site-0"].reviews).offer(an, ())
    read_and_approve(homes["site-0"], "run-1")
    assert "a package that the study needs was changed here during the run" in server.hello()


def test_a_survey_is_answered_though_an_arm_needs_a_package_that_is_not_allowed(
    tmp_path: Path, install: Install
) -> None:
    install()
    homes = hospital(tmp_path / "h", policy=LITTLE)
    of = study("x").study
    arms = [of["arms"][0], {"label": "mine", "plan": {**of["arms"][1]["plan"], "method": "mine"}}]
    whole = replace(survey(), study={**of, "arms": arms})
    server = Server(homes, whole)
    assert "waits" in server.hello()
    review = known(Reviews(homes["site-0"].reviews).get("spots-survey"))
    (note,) = review.notes
    assert note.startswith("mine is refused here: the plan needs the package mine-pack 1.0")
    assert exact_rule(review.packages[0]) in note
    read_and_approve(homes["site-0"], "spots")
    assert server.hello() == ""
    assert server.ask()[0] == ""
