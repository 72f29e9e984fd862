"""Plots without matplotlib: ticks, widths of text as matplotlib measures them, gaps in lines, markers, legends."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from polyclinic.report.svg_plot import Key, Plot, text_width, ticks


def plot(**limits: tuple[float, float]) -> Plot:
    return Plot("p", "alt", (4.0, 3.0), (0.1, 0.2, 0.8, 0.7), limits.get("x", (0, 1)), limits.get("y", (0, 1)))


@pytest.mark.parametrize("most", [3, 5, 8])
@pytest.mark.parametrize("low", [-3.7e6, -12.0, -0.031, 0.0, 0.7031, 1.9, 4e-7, 250.0])
@pytest.mark.parametrize("width", [3e-7, 0.0123, 0.5, 1.04, 77.0, 2.6e5])
def test_ticks_are_inside_evenly_spaced_and_round(low: float, width: float, most: int) -> None:
    if width < 1e-9 * abs(low) * 1e3:
        pytest.skip("beyond the digits of a label")
    high = low + width
    found = ticks(low, high, most)
    slack = 1e-6 * width
    assert 1 <= len(found.at) <= most + 1
    assert all(low - slack <= v <= high + slack for v in found.at)
    steps = np.diff(found.at)
    if len(steps):
        np.testing.assert_allclose(steps, steps[0], rtol=1e-5)
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-5
    assert len(set(found.labels)) == len(found.labels)
    read = [float(label.replace("−", "-")) for label in found.labels]
    np.testing.assert_allclose(read, found.at, atol=max(1e-3 * width, 1e-12))


def test_ticks_of_rounds_are_whole_numbers() -> None:
    assert ticks(0.9, 3.1, 6, integer=True).labels == ["1", "2", "3"]
    assert ticks(0, 42, 6, integer=True).labels == ["0", "10", "20", "30", "40"]
    assert ticks(-0.5, 0.5, 2).labels == ["−0.5", "0.0", "0.5"]


@pytest.mark.parametrize("text", ["FedAvg", "0.812 (0.790–0.834)", "Köln", "site-000123", "Mean rank over sites"])
def test_text_is_as_wide_as_matplotlib_says(text: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    wide, *_ = text_to_path.get_text_width_height_descent(text, FontProperties(family="DejaVu Sans", size=9), False)
    assert text_width(text, 9) == pytest.approx(wide, rel=0.04)  # without kerning


def test_characters_that_the_font_table_lacks_have_a_width() -> None:
    assert text_width("病院", 10) == 20
    assert text_width("é", 10) == text_width("e", 10) == text_width("e\u0301", 10)


def test_a_line_is_interrupted_where_it_has_no_value() -> None:
    drawn = plot()
    drawn.line([0, 0.25, 0.5, 0.75, 1.0], [0, 1, np.nan, 0, 1], "#000000", 1)
    (path,) = re.findall(r'<path d="(M[^"]+)" fill="none"', drawn.svg())
    assert path == "M28.8 172.8L86.4 21.6M201.6 172.8L259.2 21.6"
    empty = plot()
    empty.line([0.0], [np.nan], "#000000", 1)
    empty.markers([0.0], [np.inf], "o", 3, "#000000")
    empty.band([0.0, 1.0], [np.nan, 0.0], [1.0, 1.0], "#000000", 0.1)
    assert "NaN" not in empty.svg()
    assert "nan" not in empty.svg()
    assert "inf" not in empty.svg()


def test_an_infinite_interval_reaches_the_edge_and_one_without_a_number_is_not_drawn() -> None:
    drawn = plot()
    drawn.segments([(0.5, -math.inf, 0.25), (0.5, 0.5, math.inf), (0.5, math.nan, 0.75)], "#000000", 1)
    drawn.text(math.nan, 1, "of a method without a value")
    drawn.centered(1, math.inf, "of a method without a value", 9)
    (path,) = re.findall(r'<path d="(M[^"]+)" fill="none"', drawn.svg())
    assert path == "M28.8 97.2H86.4M144 97.2H259.2"
    assert "<text" not in drawn.svg()


@pytest.mark.parametrize("mark", "os^DvPX*")
def test_a_marker_is_centered_and_has_its_size(mark: str) -> None:
    drawn = plot()
    drawn.markers([0.5], [0.5], mark, 6, "#000000")
    root = ET.fromstring(drawn.svg())
    (use,) = root.iter("{http://www.w3.org/2000/svg}use")
    assert (use.get("x"), use.get("y")) == ("144", "97.2")
    (shape,) = [p.get("d") or "" for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("id")]
    if mark == "o":
        assert shape.startswith("M-3 0a3 3 ")
        return
    at = np.array([[float(v) for v in p.split()] for p in shape[1:-1].split("L")])
    assert len(np.unique(at, axis=0)) == len(at) == {"s": 4, "^": 3, "D": 4, "v": 3, "P": 12, "X": 12, "*": 10}[mark]
    assert np.abs(at).max() == pytest.approx(3 * (math.sqrt(2) if mark == "D" else 1), abs=0.2)
    assert np.abs(at.max(0) + at.min(0))[0] < 0.02


def test_a_legend_in_columns_has_every_title_once() -> None:
    drawn = plot()
    drawn.legend([Key(f"t{i}", "#000000", "-") for i in range(7)], 10, 10, columns=3)
    texts = list(ET.fromstring(drawn.svg()).iter("{http://www.w3.org/2000/svg}text"))
    assert [t.text for t in texts] == [f"t{i}" for i in range(7)]
    assert len({(t.get("x"), t.get("y")) for t in texts}) == 7
    assert len({t.get("x") for t in texts}) == 3
