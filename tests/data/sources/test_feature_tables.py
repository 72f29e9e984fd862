"""Tables: read in any dialect, filled and scaled with training rows only, against plain numpy."""

import gzip
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.sources.tabular_files import read_rows
from tests.support.data_sets import loaded

TEXT = """id,age,chol,kind,ill,site
a,10,200,x,0,North
b,20,0,y,2,North
c,?,240,x,0,South
d,40,-9.0,y,1,South
e,50,260,,0,South
f,60,280,x,,South
"""


def written(path: Path, text: str = TEXT, name: str = "t.csv") -> str:
    """A file."""
    (path / name).write_text(text, encoding="utf-8")
    return str(path / name)


def table(path: str, **options: Any) -> FeatureTable:
    """The table of ``TEXT``."""
    usual: dict[str, Any] = {
        "label": "ill",
        "patient": "id",
        "categories": ("kind",),
        "missing": ("-9",),
        "zero_is_missing": ("chol",),
        "threshold": 0.0,
        "missing_labels": "drop",
    }
    return FeatureTable(path, **usual | options)


def test_every_dialect_reads_the_same(tmp_path: Path) -> None:
    """Comma, semicolon, tab, gzip, a byte order mark, Windows' line ends, blank lines, Parquet."""
    expected = read_rows(Path(written(tmp_path)))
    assert expected["chol"] == ["200", "0", "240", "-9.0", "260", "280"]
    dialects = (TEXT.replace(",", ";"), TEXT.replace(",", "\t"), "\ufeff" + TEXT, TEXT.replace("\n", "\r\n"))
    for i, text in enumerate((*dialects, TEXT + "\n\n")):
        assert read_rows(Path(written(tmp_path, text, f"{i}.csv"))) == expected
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert read_rows(tmp_path / "t.csv.gz") == expected
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra: tables)")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(expected), tmp_path / "t.parquet")
    assert read_rows(tmp_path / "t.parquet") == expected


def test_inputs_are_what_the_table_says(tmp_path: Path) -> None:
    """Names and order; missing values of every spelling; codes as 0 and 1; the row without a label left out."""
    source = table(written(tmp_path))
    assert source.names == (
        "age",
        "chol",
        "kind = x",
        "kind = y",
        "age is missing",
        "chol is missing",
        "kind is missing",
    )
    assert source.table().patients == ("a", "b", "c", "d", "e")
    assert source.table().labels.tolist() == [0, 1, 0, 1, 0]  # type: ignore[union-attr]
    assert source.table().columns["site"] == ("North", "North", "South", "South", "South")
    assert any("1 rows without ill are left out" in note for note in source.info.notes)
    assert source.info.classes == ("ill up to 0", "ill above 0")
    with pytest.raises(DataError, match="NaN"):
        source.examples(source.table().ids)  # not yet filled


def test_statistics_come_from_training_rows_of_training_sites(tmp_path: Path) -> None:
    """Against numpy: mean and deviation of what trains; other rows and external sites change nothing."""
    source = table(written(tmp_path))
    ids = source.table().ids
    fitted = source.fitted({"north": ids[:2], "south": ids[2:4], "far": ids[4:]}, external=("far",))
    ages = np.array([10.0, 20, 40])
    expected = (np.array([10, 20, ages.mean(), 40, 50]) - ages.mean()) / ages.std()
    for site in ("north", "south", "far"):
        x, _ = fitted[site].examples(ids)[torch.arange(5)]
        assert x[:, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert x[:, 2:4].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]]
        assert x[:, 4:].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_each_sites_own_statistics(tmp_path: Path) -> None:
    """Mean 0 and deviation 1 at each site; the median fills; what a site never saw is 0."""
    source = table(written(tmp_path), statistics="site", fill="median")
    ids = source.table().ids
    fitted = source.fitted({"north": ids[:2], "south": ids[2:5]})
    north, _ = fitted["north"].examples(ids[:2])[torch.arange(2)]
    assert north[:, 0].tolist() == pytest.approx([-1, 1])
    south, _ = fitted["south"].examples(ids[2:5])[torch.arange(3)]
    assert south[0, 0] == pytest.approx((45 - 45) / 5)  # filled with the median of 40 and 50
    empty = source.fitted({"b": ids[1:2]})["b"].examples(ids[1:2])
    assert empty.inputs[0, 1] == 0  # chol is missing in every row of this site


def test_numbers_and_words_as_labels(tmp_path: Path) -> None:
    """Regression gives float32 [n, 1]; words are classes in order; numbers sort as numbers."""
    age = table(written(tmp_path), label="age", threshold=None, regression=True, leave_out=("ill",))
    assert age.table().labels.tolist() == [[10], [20], [40], [50], [60]]  # type: ignore[union-attr]
    assert age.info.task == "regression"
    kind = table(written(tmp_path), label="kind", threshold=None, categories=(), leave_out=("ill",), classes=("X", "Y"))
    assert kind.table().labels.tolist() == [0, 1, 0, 1, 0]  # type: ignore[union-attr]
    assert kind.info.classes == ("X", "Y")
    ill = table(written(tmp_path, TEXT.replace(",2,North", ",10,North")), threshold=None)
    assert ill.info.classes == ("0", "1", "10")


@pytest.mark.parametrize(
    ("options", "text", "says"),
    [
        ({"label": "sick"}, TEXT, "has no column 'sick'"),
        ({"categories": ()}, TEXT, "'x' in kind, which is not a number: list it in categories or leave_out"),
        ({"categories": ()}, TEXT, 'with patient = "kind" or site = "kind"'),
        (
            {"threshold": None, "label": "age", "classes": ("a", "b")},
            TEXT,
            r"5 rows with a age that is not among classes = \['a', 'b'\]: '10'",
        ),
        ({}, TEXT.replace(",site", ",age"), "the column 'age' occurs twice"),
        ({}, TEXT + "g,1\n", r"1 rows have another number of columns than the header's 6 \(the first is row 8\)"),
        ({}, "id,ill,site\n", "has no rows"),
        ({}, "", "is empty"),
        ({}, 'id,ill,site\n"a,1,x\n', "not a sound CSV"),
        ({"patient": "kind"}, TEXT, "1 rows have no kind"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, options: dict[str, Any], text: str, says: str) -> None:
    """File, column, row."""
    source = table(written(tmp_path, text), **options)
    with pytest.raises(DataError, match=says):
        source.fitted({"all": source.table().ids})


def test_a_median_over_the_federation_is_refused() -> None:
    """It does not follow from sums."""
    with pytest.raises(DataError, match="a median cannot be computed from sums"):
        FeatureTable("x", "y", fill="median")
    with pytest.raises(DataError, match="is for classes"):
        FeatureTable("x", "y", threshold=1.0, regression=True)


def test_not_text_and_too_large_are_refused(tmp_path: Path) -> None:
    """Bytes that are text in no known encoding, and a gzip bomb."""
    for data, says in (
        (b"id,x\n\x81\x8d,1\n", "not text in UTF-8, UTF-16 or Windows-1252"),
        (b"id\0x\n", "not a text"),
    ):
        (tmp_path / "b.csv").write_bytes(data)
        with pytest.raises(DataError, match=says):
            read_rows(tmp_path / "b.csv")
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"0" * (2**26 + 1)))
    with pytest.raises(DataError, match=r"bomb\.csv\.gz"):
        read_rows(tmp_path / "bomb.csv.gz")


def test_test_rows_never_touch_the_statistics(tmp_path: Path) -> None:
    """Change a test patient's value a millionfold: what trains does not move."""
    rng = np.random.default_rng(0)
    lines = ["id,x,y,site"] + [f"p{i},{rng.normal()},{i % 2},{'AB'[i % 2 == 0]}" for i in range(80)]
    path = written(tmp_path, "\n".join(lines))
    options: dict[str, Any] = {"kind": "table", "label": "y", "patient": "id"}
    first = federate(DataSpec(path=path, **options))
    victim = first.sites["a"]["test"].patients[0]
    changed = [line if not line.startswith(f"{victim},") else f"{victim},1e6,{line.split(',', 2)[2]}" for line in lines]
    second = federate(DataSpec(path=written(tmp_path, "\n".join(changed), "u.csv"), **options))
    for site in first.sites:
        assert torch.equal(loaded(first.sites[site]["train"]).inputs, loaded(second.sites[site]["train"]).inputs)
    assert first.fingerprint != second.fingerprint


def test_a_hospital_alone_reads_its_table_as_the_federation_does(tmp_path: Path) -> None:
    """Declared inputs and statistics: each hospital's own file gives the same numbers as the whole table did."""
    whole = table(written(tmp_path))
    ids = whole.table().ids
    fitted = whole.fitted({"north": ids[:2], "south": ids[2:]})["south"]
    (tmp_path / "inputs.toml").write_text(fitted.statistics.text())
    south = "\n".join([line for line in TEXT.splitlines() if "North" not in line and ",y," not in line]) + "\n"
    alone = table(
        written(tmp_path, south.replace(",x,", ",x,"), "s.csv"),
        statistics="declared",
        declared=str(tmp_path / "inputs.toml"),
    )
    got = alone.fitted({"south": alone.table().ids})["south"].examples(alone.table().ids)
    expected = fitted.examples((ids[2], ids[4]))
    assert alone.names == whole.names
    assert torch.equal(got.inputs, expected.inputs)


def test_declared_statistics_are_checked(tmp_path: Path) -> None:
    """They survive being written; an edit that makes no sense, or an input that is not here, is named."""
    source = table(written(tmp_path))
    fitted = source.fitted({"all": source.table().ids})["all"]
    file = tmp_path / "inputs.toml"
    file.write_text(fitted.statistics.text())
    back = Statistics.read(file)
    assert back.names == fitted.statistics.names
    assert np.array_equal(back.spread, fitted.statistics.spread)
    file.write_text(fitted.statistics.text() + '"weight" = { center = 1.0, spread = 2.0, fill = 0.0 }\n')
    declared = table(source.path, statistics="declared", declared=str(file))
    with pytest.raises(DataError, match='has no input "weight"'):
        declared.names  # noqa: B018
    for text in ('"age" = { center = 1, spread = 0, fill = 1 }', '"age" = 3', "", "["):
        file.write_text(text)
        with pytest.raises(DataError, match=r"needs center, spread|lists no inputs|cannot be read|is empty"):
            Statistics.read(file)
    with pytest.raises(DataError, match="give it with statistics"):
        table(source.path, declared=str(file))


def test_one_category_however_it_is_written(tmp_path: Path) -> None:
    """4 and 4.0 are one; a class that a hospital lacks keeps its place."""
    text = "c,y\n4.0,1\n4,1\n3,1.0\n"
    source = FeatureTable(written(tmp_path, text), "y", categories=("c",), classes=("0", "1", "2"), indicators=False)
    assert source.names == ("c = 3", "c = 4")
    assert source.table().labels.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    assert source.info.classes == ("0", "1", "2")


def test_several_labels_are_columns_of_0_and_1(tmp_path: Path) -> None:
    """A list of one column is one logit; none of the columns is a feature."""
    text = "site,a,fibrosis,edema\n" + "".join(f"s,{i},{i % 2},{int(i > 4)}\n" for i in range(8))
    path = written(tmp_path, text)
    both, one = (FeatureTable(path, label=label) for label in (("fibrosis", "edema"), ("edema",)))
    assert both.info.task == one.info.task == "multilabel"
    assert both.info.classes == ("fibrosis", "edema")
    assert both.names == ("a",)
    assert one.names == ("a", "fibrosis")
    found = both.examples(both.table().ids).targets
    assert found.dtype == torch.float32
    assert found.tolist() == [[float(i % 2), float(i > 4)] for i in range(8)]
    assert one.examples(one.table().ids).targets.shape == (8, 1)
    assert both.texts(["row 3"])[0][1] == "1.0, 0.0"


def test_several_labels_are_refused_if_they_are_not_0_to_1(tmp_path: Path) -> None:
    path = written(tmp_path, "a,x,y\n1,0,2\n2,1,\n3,,1\n")
    with pytest.raises(DataError) as found:
        FeatureTable(path, label=("x", "y")).table()
    assert "1 row with a y that is not 0 to 1 (row 2: '2')" in str(found.value)
    assert "1 row without a y (row 3)" in str(found.value)
    assert "1 row without a x (row 4)" in str(found.value)
    with pytest.raises(DataError, match="label lists columns of 0 and 1, and threshold is for one column"):
        FeatureTable(path, label=("x", "y"), threshold=0.0)
    with pytest.raises(DataError, match="no column 'z'"):
        FeatureTable(path, label=("x", "z")).table()
    with pytest.raises(DataError, match="needs a label"):
        FeatureTable(path, label=()).table()
