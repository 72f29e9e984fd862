"""Figures: identical bytes, unique ids, text that remains text, and empty figures without values."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from polyclinic.evaluation.calibration import reliability
from polyclinic.evaluation.net_benefit import NetBenefit
from polyclinic.report import discrimination_figures as curves
from polyclinic.report import figures as fig
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.paired_tests import rank_methods

P = np.linspace(0.02, 0.98, 60)
Y = (np.random.default_rng(0).uniform(size=60) < P).astype(int)
CURVE = [
    NetBenefit(t, Estimate(0.4 - t / 2, 0.3 - t / 2, 0.5 - t / 2), Estimate(0.4 - t), Estimate(0.0)) for t in (0.1, 0.5)
]
DRAWN = {
    "points": lambda name: fig.points(
        name,
        "alt",
        [
            fig.Point("Köln & Ötz", 0.8, 0.7, 0.9, "0.800 (0.700–0.900)"),
            fig.Point("nothing", None, None, None, "no value", "external"),
            fig.Point("no interval", 0.6, None, None, "0.600", "bad"),
        ],
        "AUC",
        0.75,
    ),
    "zero": lambda name: fig.points(name, "alt", [fig.Point("a", 0.1, 0.05, 0.2, "+0.1")], "Gain", 0.0, zero=True),
    "curves": lambda name: fig.curves(name, "alt", {"FedAvg": ([1, 2, 3], [0.5, 0.6, 0.7]), "1": ([1], [0.4])}, "AUC"),
    "reliability": lambda name: fig.reliability_plot(name, "alt", {"x": reliability(np.stack([1 - P, P], 1), Y)}),
    "decision": lambda name: fig.decision_plot(name, "alt", CURVE),
    "scatter": lambda name: fig.scatter(name, "alt", [("a", 1.0, 0.8, "plain"), ("b", 1.0, 0.8, "baseline")], "x", "y"),
    "unit curves": lambda name: curves.unit_curves(
        name, "alt", P, {"a (0.5)": P, "b": 1 - P}, ("x", "y"), diagonal=True
    ),
    "confusion": lambda name: curves.confusion_plot(
        name,
        "alt",
        ["benign", "malignant", "a class with a rather long name"],
        np.array([[1, 0, 0], [0.4, 0.5, 0.1], [np.nan] * 3]),
    ),
    "agreement": lambda name: fig.agreement_plot(name, "alt", P, P - 0.5, (-1.0, 0.0, 1.0), " (years)"),
    "ranks": lambda name: fig.ranks_plot(
        name, "alt", rank_methods("abcd", np.random.default_rng(1).normal(size=(6, 4))), {"a": "FedAvg"}
    ),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_every_picture_is_well_formed_and_the_same_twice(kind: Any) -> None:
    first = DRAWN[kind]("one")
    assert first == DRAWN[kind]("one")
    root = ET.fromstring(first)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "alt"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.findall(".//{http://www.w3.org/2000/svg}text")
    assert "metadata" not in first


def test_ids_of_two_pictures_do_not_clash() -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', DRAWN[k](f"p{i}"))) for i, k in enumerate(DRAWN)]
    assert sum(map(len, ids)) == len(set().union(*ids))


@pytest.mark.parametrize("kind", DRAWN)
def test_references_lead_somewhere(kind: Any) -> None:
    text = DRAWN[kind]("one")
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= ids


def test_alt_text_is_escaped_and_names_are_kept() -> None:
    text = fig.points("p", 'a "quoted" <alt>', [fig.Point("<b>&", 1.0, 0.5, 1.5, "1.0")], "x")
    assert ET.fromstring(text).get("aria-label") == 'a "quoted" <alt>'
    assert "<b>&" in "".join(ET.fromstring(text).itertext())


def test_names_however_long_stay_within_the_picture() -> None:
    text = fig.points(
        "p", "alt", [fig.Point("a hospital with a very long name indeed", 1.0, 0.5, 1.5, "1.0 (0.5–1.5)")], "x"
    )
    assert ET.fromstring(text) is not None
    assert fig.inches("wide", 9) > fig.inches("i", 9) > 0


def test_contrast_of_the_colors_on_white() -> None:
    """At least 4.5 to 1, as WCAG 2.2 AA asks of text."""

    def light(color: Any) -> Any:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in (*fig.CURVES, fig.TEAL, fig.ORANGE, fig.GRAY, fig.INK):
        assert 1.05 / (light(color) + 0.05) >= 4.5, color


def test_many_rows_are_drawn_in_order_and_without_names() -> None:
    values = [(i * 37 % 101) / 101 for i in range(101)]
    rows = [fig.Point(f"site-{i}", v, 0.0, 1.0, "text", "external" if i % 9 else "plain") for i, v in enumerate(values)]
    rows.append(fig.Point("void", None, None, None, "no value"))
    root = ET.fromstring(fig.points("p", "alt", rows, "AUC", 0.5))
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert not any("site-" in text or text == "text" for text in texts)
    assert "101 rows of the table, in order of their values" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}use"))) >= 101  # markers, and the ticks of the axis
    assert fig.points("p", "alt", rows[: fig.MOST_NAMED], "AUC", 0.5).count(">site-") == fig.MOST_NAMED


@pytest.mark.parametrize("values", [(0.755, 0.785), (-0.4, 0.9)])
def test_the_label_of_the_vertical_axis_is_inside_the_figure(values: tuple[float, float]) -> None:
    """Print cuts off what is outside. A line of text is 9 points high, to the left of where it begins."""
    drawn = [
        fig.curves("name", "alt", {"FedAvg": ([1, 2], list(values))}, "Validation AUC"),
        fig.scatter("name", "alt", [(str(v), 1.0, v, "plain") for v in values], "MB", "Dice, mean over sites"),
    ]
    for text in drawn:
        (x,) = re.findall(r"rotate\(-90 ([\d.-]+) ", text)
        assert float(x) >= 9
