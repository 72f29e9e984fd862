"""One resolver of columns: what a name is taken for, and that ids match whatever a spreadsheet did to their zeros."""

import pytest

from polyclinic.data.formats.column_roles import column_of, detected, identifying, matched, named_column, usual_columns


@pytest.mark.parametrize(
    ("names", "role", "column"),
    [
        (["patient_id", "x"], "patient", "patient_id"),
        (["Patient ID", "x"], "patient", "Patient ID"),
        (["PatientID", "case_id"], "patient", "PatientID"),
        (["case_id", "subject"], "patient", "subject"),
        (["id", "x"], "patient", "id"),
        (["hospital", "x"], "site", "hospital"),
        (["Centre", "scanner"], "site", "Centre"),
        (["site", "hospital"], "site", "site"),
        (["scanner"], "site", "scanner"),
        (["sitenum"], "site", ""),
        (["Diagnosis"], "label", "Diagnosis"),
        (["File_Name"], "image", "File_Name"),
        (["x", "y2"], "patient", ""),
    ],
)
def test_a_usual_name_has_a_role(names: list[str], role: str, column: str) -> None:
    columns = {name: ["1", "2", "3"] for name in names}
    assert column_of(columns, role, "", []) == column  # type: ignore[arg-type]


def test_a_split_has_the_values_of_a_split_and_a_patient_more_than_two() -> None:
    columns = {"set": ["train", "test", "Val"], "fold": ["1", "2", "3"], "split": ["a", "b", "c"]}
    assert usual_columns(columns, "split") == ["set"]
    assert usual_columns({"case": ["0", "1"] * 10, "id": [*"abcdefghijklmnopqrst"]}, "patient") == ["id"]
    assert identifying({"case_id": ["a"], "scanner": ["b"], "set": ["train"], "age": ["1"]}) == {
        "case_id",
        "scanner",
        "set",
    }


def test_a_given_name_is_found_or_refused() -> None:
    columns = {"Hospital": ["a"], "age": ["1"]}
    problems: list[str] = []
    assert column_of(columns, "site", "hospital", problems) == "Hospital"
    assert column_of(columns, "site", "none", problems) == ""
    assert not problems
    assert column_of(columns, "site", "hospitl", problems) == ""
    assert problems == ["has no column 'hospitl' for the site. Did you mean 'Hospital'?"]
    assert named_column(["a b", "a_b"], "A-B") is None
    assert detected({"patient": ("", "pid"), "site": ("hospital", "Hospital")}) == [
        'Columns chosen by their names: patient = "pid".'
    ]


def test_ids_match_without_their_leading_zeros_unless_that_is_ambiguous() -> None:
    assert matched(["1", "02", "3"], ["001", "002", "3"]) == {"1": "001", "02": "002", "3": "3"}
    assert matched(["1"], ["01", "001"]) == {}
    assert matched(["1", "01"], ["001"]) == {}
    assert matched(["sub-1", "x10", "9"], ["sub-01", "x10"]) == {"sub-1": "sub-01", "x10": "x10"}
