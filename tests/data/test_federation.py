"""From a [data] table to sites: no patient is in two roles, everything is named, all mistakes are listed at once."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from polyclinic.data import config as specs
from polyclinic.data.federation import DataError, DataSpec, Federated, federate
from polyclinic.data.sources.lung_nodules import Nodules
from tests.data.conftest import Made
from tests.support.data_sets import data_spec, loaded


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch) -> None:
    """``kind = "made"`` is the source of the tests."""
    monkeypatch.setitem(specs.KINDS, "made", ("tests.data.conftest", "Made"))


def roles_of(data: Federated) -> dict[str, set[tuple[str, str]]]:
    """Where each patient is."""
    found: dict[str, set[tuple[str, str]]] = {}
    for site, roles in data.sites.items():
        for role, examples in roles.items():
            for patient in examples.patients:
                found.setdefault(patient, set()).add((site, role))
    return found


SPECS: list[dict[str, Any]] = [
    {},
    {"split": (0.8, 0.0, 0.2)},
    {"external": ("celle",)},
    {"unlabeled": 0.5},
    {"sites": {"partition": "dirichlet", "count": 3}, "min_patients": 1},
    {"sites": {"partition": "iid", "count": 2}},
    {"sites": "scanner"},
    {"max_patients": 12},
]


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_no_patient_is_in_two_places(options: dict[str, Any]) -> None:
    """Not in two roles, not at two sites, whatever is asked; and no example is lost silently."""
    data = federate(DataSpec(kind="made", **options), seed=1)
    assert all(len(places) == 1 for places in roles_of(data).values())
    total = sum(len(examples) for roles in data.sites.values() for examples in roles.values())
    if "max_patients" not in options and options.get("sites") != "scanner":
        assert total == len(Made().table())
    else:
        assert total < len(Made().table())
    for row in data.rows:
        for role, summary in row.roles.items():
            examples = loaded(data.sites[row.name][role])
            assert (summary.examples, summary.patients) == (len(examples), len(set(examples.patients)))
            if role != "unlabeled":
                assert list(summary.classes) == torch.bincount(examples.targets, minlength=2).tolist()
    assert "They mean nothing." in data.notes


def test_the_same_seed_is_the_same_federation() -> None:
    """Examples, order and fingerprint; another seed or option changes the fingerprint."""
    first, again, other = (federate(DataSpec(kind="made"), seed) for seed in (0, 0, 1))
    for site, roles in first.sites.items():
        for role, examples in roles.items():
            assert torch.equal(loaded(examples).inputs, loaded(again.sites[site][role]).inputs)
    assert first.fingerprint == again.fingerprint
    assert (
        len({first.fingerprint, other.fingerprint, federate(DataSpec(kind="made", split=(0.5, 0.2, 0.3))).fingerprint})
        == 3
    )


def test_external_sites_only_test() -> None:
    """By name or by its title in the data; such a site does not train."""
    for name in ("celle", "Celle"):
        data = federate(DataSpec(kind="made", external=(name,)))
        assert data.external == ("celle",)
        assert set(data.sites["celle"]) == {"test"}
        assert data.training == ("aachen", "bonn")
        assert next(row for row in data.rows if row.external).title == "Celle"


def test_withheld_labels_are_withheld_from_training_patients_only() -> None:
    """Half of what would train has no labels; test and validation are the same as before."""
    plain, half = federate(DataSpec(kind="made")), federate(DataSpec(kind="made", unlabeled=0.5))
    for site in plain.sites:
        assert half.sites[site]["test"].ids == plain.sites[site]["test"].ids
        parts = set(half.sites[site]["train"].ids) | set(half.sites[site]["unlabeled"].ids)
        assert parts == set(plain.sites[site]["train"].ids)
        assert set(loaded(half.sites[site]["unlabeled"]).targets.tolist()) == {-1}
        counts = [len(set(half.sites[site][role].patients)) for role in ("train", "unlabeled")]
        assert abs(counts[0] - counts[1]) <= 2


def test_simulated_sites_carry_the_badge_and_real_ones_do_not() -> None:
    """The sentence names the partition."""
    badge = federate(data_spec(kind="made", sites={"partition": "dirichlet", "count": 3}, min_patients=1)).simulated
    assert badge is not None
    assert "Dirichlet(0.5)" in badge
    assert federate(DataSpec(kind="made")).simulated is None


def test_small_sites_and_traveling_patients_are_named() -> None:
    """What is left out is listed."""
    data = federate(data_spec(kind="made", patients=61, min_patients=21))
    assert "Left out, with fewer than 21 patients: bonn (20), celle (20)." in data.notes
    assert list(data.sites) == ["aachen"]
    (note,) = [n for n in federate(DataSpec(kind="made", sites="scanner")).notes if "seen at several sites" in n]
    assert "each is kept where most examples are" in note


def test_duplicates_are_reported_dropped_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that trains and tests is a leak: named, or removed from training, or a reason to stop."""
    original = Made.examples

    def copied(self: Made, ids: Any) -> Any:
        found = original(self, ids)
        found.inputs[:, 0] = found.inputs[:, 0] // 3  # three neighbors look the same if their labels agree
        return found

    monkeypatch.setattr(Made, "examples", copied)
    data = federate(DataSpec(kind="made"))
    assert any(d.across_roles for d in data.duplicates)
    assert any("occur more than once" in note for note in data.notes)
    clean = federate(DataSpec(kind="made", duplicates="drop", split=(0.6, 0.0, 0.4)))
    seen: list[tuple[float, ...]] = []
    for roles in clean.sites.values():
        for examples in roles.values():
            seen += [tuple(row) for row in loaded(examples).inputs.tolist()]
    assert len(seen) == len(set(seen))
    assert any("copies were dropped" in note for note in clean.notes)
    with pytest.raises(DataError, match='set duplicates = "drop"'):
        federate(DataSpec(kind="made", duplicates="refuse"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sites": "ward"}, "the data has no column 'ward'. There are hospital, scanner"),
        (
            {"external": ("dresden",)},
            'external names "dresden", which is not a site of this data. There are aachen, bonn',
        ),
        ({"external": ("aachen", "bonn", "celle")}, "no site is left to train"),
        ({"min_patients": 100}, "no site has min_patients = 100 patients; the largest has 20"),
        ({"split": "official"}, "has no official split"),
        ({"sites": {"partition": "iid", "count": 99}}, "60 patients are too few for 99 sites"),
    ],
)
def test_what_the_data_cannot_give_is_refused(options: dict[str, Any], says: str) -> None:
    """One sentence, with what there is."""
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        federate(DataSpec(kind="made", **options))


BAD: list[tuple[dict[str, Any], list[tuple[tuple[str, ...], str]]]] = [
    ({}, [(("use",), "polyclinic data list")]),
    ({"kind": "mad"}, [(("kind",), 'Did you mean "made"')]),
    ({"kind": "made", "patient": 3}, [(("patient",), 'Did you mean "patients"')]),
    ({"kind": "made", "zzz": 3}, [(("zzz",), 'unknown key. "made" takes patients, seed')]),
    (
        {
            "kind": "made",
            "patients": "many",
            "split": [1, 2],
            "min_patients": 0,
            "sites": {"partition": "iid", "counts": 2},
        },
        [
            (("patients",), "integer"),
            (("split",), "sum to 1"),
            (("min_patients",), "equal to 1"),
            (("sites", "counts"), 'Did you mean "count"'),
        ],
    ),
    ({"kind": "made", "split": [1.0, 0.0, 0.0]}, [(("split",), "training and test each need a share")]),
    ({"kind": "made", "sites": 3}, [(("sites",), "must be a column's name")]),
    ({"kind": "made", "sites": {"partition": "dirichlt"}}, [(("sites", "partition"), 'Did you mean "dirichlet"')]),
    ({"kind": "made", "max_patients": 5}, [(("max_patients",), "below min_patients")]),
    ({"kind": "made", "external": ["a", "a"]}, [(("external",), "twice")]),
    ({"use": "lidc-nodules", "size": 3, "mm": 0.0}, [(("size",), "choose 8 to 256"), (("mm",), "choose 0.2 to 5")]),
]


@pytest.mark.parametrize(("given", "expected"), BAD, ids=lambda v: str(v)[:40])
def test_every_mistake_is_named_at_its_key_in_one_pass(
    given: dict[str, Any], expected: list[tuple[tuple[str, ...], str]]
) -> None:
    """From Python and from JSON alike."""
    for make in (partial(DataSpec, **given), partial(DataSpec.model_validate_json, json.dumps(given))):
        with pytest.raises(ValidationError) as error:
            make()
        found = {line["loc"]: line["msg"] for line in error.value.errors()}
        assert len(found) == len(expected)
        for where, says in expected:
            assert says in found[where]


def test_a_spec_survives_being_written_down() -> None:
    """Through JSON and back it is equal, options and partition included."""
    spec = data_spec(
        kind="made", patients=40, sites={"partition": "quantity", "alpha": 2}, external=["a"], split="official"
    )
    assert DataSpec.model_validate_json(spec.model_dump_json()) == spec
    assert DataSpec(**spec.model_dump()) == spec
    assert spec.options == {"patients": 40}
    assert spec.source() == Made(40)


def test_the_demo_data(nodules: Nodules) -> None:
    """Real nodules: five protocols, both classes in every role, shares within a few percent, one held out if asked."""
    data = federate(data_spec(use="lidc-nodules", external=["slices 3 mm"]))
    assert len(data.sites) == 5
    assert data.shape == (1, 32, 32)
    assert data.simulated is None
    assert any("not CT pixels" in note for note in data.notes)
    assert any("not hospitals" in note for note in data.notes)
    assert all(len(places) == 1 for places in roles_of(data).values())
    for row in data.rows:
        assert all(min(summary.classes) > 0 for summary in row.roles.values())
        if not row.external:
            everyone = sum(summary.patients for summary in row.roles.values())
            assert abs(row.roles["train"].patients / everyone - 0.6) < 0.03


def test_the_place_of_the_files_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    """A copy of the same table in another place is the same federation; another split is not."""
    rows = "\n".join(f"p{i},{i},{i % 2},{'ab'[i % 3 == 0]}" for i in range(90))
    names = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "t.csv").write_text(f"id,x,y,site\n{rows}\n")
        spec = data_spec(kind="table", path=str(tmp_path / place / "t.csv"), label="y", patient="id")
        names.add(federate(spec).fingerprint)
        names.add(federate(spec.model_copy(update={"split": (0.5, 0.2, 0.3)})).fingerprint)
    assert len(names) == 2
