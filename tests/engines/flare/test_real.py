"""Real processes, mutual TLS, NVIDIA FLARE: what runs between hospitals gives the bits of what runs in one process."""

from functools import partial
from typing import Any

import pytest

from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.testing import equal
from tests.support.flare_deployment import Hospitals, reference, study, until

pytestmark = pytest.mark.deploy
GROUP = {"width": 8, "norm": "group"}
DP = [
    {"name": "top-k", "fraction": 0.5},
    {"name": "clip", "bound": 1.0},
    {"name": "gaussian", "multiplier": 0.5},
    {"name": "secure-sum", "limit": 8.0, "bits": 20},
]
CODECS = [{"name": "int8"}, {"name": "zstd"}]
GOLDEN: dict[str, dict[str, Any]] = {
    "fedavg": {"score_every": 2, "test": "score/test"},
    "scaffold": {"score_every": 1},
    "fedbn": {"score_every": 2},
    "mime": {},
    "small": {"method": "scaffold", "score_every": 2, "plan": {"uplink": CODECS, "downlink": CODECS}},
    "fedmic": {},
    "private": {"method": "fedavg", "plan": {"options": {"uniform": True}, "uplink": DP, "network_options": GROUP}},
    "data-vectors": {"mode": "buffered", "passes": 1},
    "trimmed-mean": {},
    "ditto": {"sites_per_round": 2, "min_replies": 2},
}


def run_and_compare(hospitals: Hospitals, run: str, **how: Any) -> None:
    """Runs a run request, and compares the server's state and what every site keeps, to the bit."""
    an = hospitals.order(study(run, **how))
    hospitals.finished(run)
    state, memory = reference(an)
    assert equal(state, hospitals.state(run))
    for site, kept in memory.items():
        assert equal(kept, hospitals.memory(run, site)), site
    assert hospitals.lost(run) == []


def test_a_study_between_hospitals_gives_the_bits_of_one_process(hospitals: Hospitals) -> None:
    """From `server init` to the journal, as people do it; SCAFFOLD, because its sites remember."""
    an = study("quick", rounds=2, score_every=2)
    file = hospitals.root / "quick.json"
    file.write_text(an.to_json())
    hospitals.command("server", "run", str(file), home=hospitals.server.path)

    def listed(home: SiteFolder) -> bool:
        return "quick" in hospitals.command("site", "review", home=home.path)

    for site, home in hospitals.homes.items():
        until(partial(listed, home), f"the study to come to {site}", pause=1.0)
        assert 'method = "scaffold"' in hospitals.command("site", "review", "quick", home=home.path)
        hospitals.command("site", "approve", "quick", "--reason", "IRB 1", home=home.path)
    hospitals.finished("quick")
    state, memory = reference(an)
    assert equal(state, hospitals.state("quick"))
    for site, home in hospitals.homes.items():
        assert equal(memory[site], hospitals.memory("quick", site))
        assert hospitals.events(home.journal, "quick").count("answered") == 2 + 1
        assert "answered" in hospitals.command("site", "log", home=home.path)
    out = hospitals.root / "out"
    hospitals.command("server", "export", "quick", str(out), home=hospitals.server.path)
    assert (out / "model.safetensors").stat().st_size > 0
    hospitals.journals_hold()


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, hospitals: Hospitals) -> None:
    how = {"method": name, "rounds": 3, **GOLDEN[name]}
    run_and_compare(hospitals, f"golden-{name}", **how)
