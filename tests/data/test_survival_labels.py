"""Times and events of tables: what is read, what is refused with rows and remedy, and what is recognized."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.quality.recognition import recognize
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.source import Table
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.manifest import Manifest
from polyclinic.data.splits import strata
from polyclinic.studies.config import study_config
from polyclinic.studies.config.new_study import new_study


def written(folder: Path, rows: list[str], header: str = "id,hospital,time,status,age") -> str:
    path = folder / "t.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def patients(n: int = 60, scale: float = 1.0) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        f"{i},{'ab'[i % 2]},{(1 + rng.integers(1, 40)) * (scale if i % 2 else 1):g},{int(i % 3 > 0)},{40 + i % 30}"
        for i in range(n)
    ]


def problems(folder: Path, rows: list[str], **options: object) -> str:
    with pytest.raises(DataError) as refusal:
        FeatureTable(written(folder, rows), "time", "status", patient="id", **options).table()  # type: ignore[arg-type]
    return str(refusal.value)


def test_a_table_gives_time_and_event_and_no_feature_of_them(tmp_path: Path) -> None:
    source = FeatureTable(written(tmp_path, ["1,a,3.5,1,50", "2,a,7,0,60"]), "time", event="status")
    table = source.table()
    assert table.labels is not None
    assert table.labels.tolist() == [[3.5, 1.0], [7.0, 0.0]]
    assert table.survival
    assert source.info.task == "survival"
    assert source.names == ("age",)
    assert source.texts(["row 2"]) == [("['50.0']", "3.5, 1.0")]


def test_other_codes_are_named_and_never_guessed(tmp_path: Path) -> None:
    rows = ["1,a,3,1,50", "2,a,7,2,60", "3,a,9,2,60"]
    assert "2 rows with an unknown status: '2' (2)" in problems(tmp_path, rows)
    assert 'event_codes = ["2"] and censored_codes = ["1"]' in problems(tmp_path, rows)
    named = FeatureTable(written(tmp_path, rows), "time", "status", ("2",), ("1",), patient="id")
    assert named.table().labels[:, 1].tolist() == [0, 1, 1]  # type: ignore[index]
    words = FeatureTable(
        written(tmp_path, ["1,a,3,Dead,50", "2,a,7,alive,60"]), "time", "status", ("dead",), ("ALIVE",), patient="id"
    )
    assert words.table().labels[:, 1].tolist() == [1, 0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("9,a,0,1,50", "1 row with a time of 0 or less (row 3: '0')"),
        ("9,a,-4,1,50", "1 row with a time of 0 or less (row 3: '-4')"),
        ("9,a,soon,1,50", "1 row with no number in time (row 3: 'soon')"),
        ("9,a,inf,1,50", "1 row with no number in time (row 3: 'inf')"),
        ("9,a,,1,50", "1 row without a time (row 3)"),
        ("9,a,NaN,1,50", "1 row without a time (row 3: 'NaN')"),
        ("9,a,4,NA,50", "1 row without a status (row 3: 'NA')"),
        ("9,a,4,0.5,50", "1 row with an unknown status: '0.5' (1)"),
        ("1,a,4,1,50", "1 patients have rows with different times or events (1)"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path: Path, row: str, words: str) -> None:
    assert words in problems(tmp_path, ["1,a,3,1,50", row])


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    said = problems(tmp_path, ["1,a,-3,1,50", "2,a,,1,60", "3,a,4,7,60"])
    assert [words in said for words in ("of 0 or less", "without a time", "unknown status")] == [True] * 3


def test_rows_without_time_or_event_are_left_out_if_asked(tmp_path: Path) -> None:
    source = FeatureTable(
        written(tmp_path, ["1,a,3,1,50", "2,a,,1,60", "3,a,4,,60"]),
        "time",
        event="status",
        patient="id",
        missing_labels="drop",
    )
    assert len(source.table()) == 1
    assert "2 rows without time or status are left out." in source.info.notes


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match="event = is for survival analysis"):
        FeatureTable("t.csv", "time", event="status", regression=True)
    with pytest.raises(DataError, match="event_codes and censored_codes need event"):
        FeatureTable("t.csv", "time", event_codes=("2",))
    with pytest.raises(DataError, match="name the column of times with label"):
        Manifest("t.csv", event="status")


def test_old_tables_keep_their_fingerprint(tmp_path: Path) -> None:
    """The options of survival enter the hash only if they are set."""
    path = written(tmp_path, patients())
    one, two = FeatureTable(path, "status"), FeatureTable(path, "time", event="status")
    assert one.fingerprint == "14b68b34c12d877faa80a2d646968b5f"
    assert two.fingerprint != FeatureTable(path, "time", regression=True).fingerprint


def test_a_manifest_of_images_gives_survival(tmp_path: Path) -> None:
    for name in "xy":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{name}.png")
    path = written(tmp_path, ["x.png,p,a,3,1", "y.png,q,a,5,0"], "path,patient,site,time,dead")
    table = Manifest(path, label="time", event="dead").table()
    assert table.survival
    assert table.labels is not None
    assert table.labels.tolist() == [[3, 1], [5, 0]]
    bad = written(tmp_path, ["x.png,p,a,3,1", "y.png,p,a,5,0"], "path,patient,site,time,dead")
    with pytest.raises(DataError, match="give one time and one event for each patient"):
        Manifest(bad, label="time", event="dead").table()


def test_any_source_is_checked() -> None:
    """Also a data set of a program, which no reader of cells has seen."""
    with pytest.raises(DataError, match="1 times are 0 or less"):
        Table(("a", "b"), ("a", "b"), np.array([[0.0, 1], [2, 1]], np.float32), survival=True)
    with pytest.raises(DataError, match="1 events are neither 1 nor 0"):
        Table(("a", "b"), ("a", "b"), np.array([[1.0, 2], [2, 1]], np.float32), survival=True)
    with pytest.raises(DataError, match="a time and an event for each example"):
        Table(("a", "b"), ("a", "b"), np.array([[1.0], [2]], np.float32), survival=True)


def test_splits_are_even_in_events(tmp_path: Path) -> None:
    source = FeatureTable(written(tmp_path, patients()), "time", event="status", patient="id", site="hospital")
    assert set(strata(source.table()).values()) == {0, 1}
    data = federate(DataSpec(kind="table", path=source.path, label="time", event="status", patient="id"), 0)  # type: ignore[call-arg]
    for row in data.rows:
        for role in row.roles.values():
            assert role.classes[1] / role.examples == pytest.approx(2 / 3, abs=0.1)


def test_units_that_differ_between_hospitals_are_a_warning(tmp_path: Path) -> None:
    """Days at one hospital and months at the other: the medians differ by a factor of 30."""
    same = check_folder(written(tmp_path, patients()))
    assert not [f for f in same.findings if "median time" in f.message]
    (mixed,) = [f for f in check_folder(written(tmp_path, patients(scale=30.4))).findings if "median time" in f.message]
    assert mixed.level == "warning"
    assert "check that all sites use one unit" in mixed.message


def test_a_hospital_without_an_event_is_warned_and_can_still_take_part(tmp_path: Path) -> None:
    rows = [row.replace(",1,", ",0,") for row in patients()]
    source = FeatureTable(written(tmp_path, rows), "time", event="status", patient="id")
    assert any("No row has an event" in note for note in source.info.notes)
    assert len(source.table()) == 60


def test_it_is_recognized_and_a_study_is_written_that_is_valid(tmp_path: Path) -> None:
    path = written(tmp_path, [row.replace(",1,", ",2,").replace(",0,", ",1,") for row in patients(200)])
    found = recognize(path)
    assert found.task == "survival"
    assert {"label": "time", "event": "status", "event_codes": ["2"], "censored_codes": ["1"]}.items() <= (
        found.options.items()
    )
    report = check_folder(path)
    assert report.classes == {"event": 133, "censored": 67}
    assert report.data["event"] == "status"
    study = study_config.parse(new_study(found, "mine").text)
    assert study.task.kind == "survival"
    assert study.task.cuts is not None
    assert list(study.task.cuts) == sorted(set(study.task.cuts))


@pytest.mark.parametrize(
    ("header", "row", "task"),
    [
        ("id,hospital,OS_MONTHS,OS_STATUS,age", "{i},a,{t},{e:deceased},50", "survival"),
        ("id,hospital,time,DEATH_EVENT,age", "{i},a,{t},{e},50", "survival"),
        ("id,hospital,time,label,age", "{i},a,{t},{e},50", "classification"),  # what is called a label is one
        ("id,hospital,time,status,age", "{i},a,{t},{k},50", "classification"),  # a code that is not known
    ],
)
def test_what_is_taken_for_survival(tmp_path: Path, header: str, row: str, task: str) -> None:
    def filled(i: int) -> str:
        e = "1:DECEASED" if i % 2 else "0:LIVING"
        return row.replace("{e:deceased}", e).format(i=i, t=i % 17 + 1, e=i % 2, k=i % 3)

    found = recognize(written(tmp_path, [filled(i) for i in range(60)], header))
    assert found.task == task
    if task == "survival":
        assert recognize(written(tmp_path, [filled(i) for i in range(60)], header), {"event": "none"}).task != task
