"""Differences over repeated splits of the same patients, as the pages of docs/results print them.

Test sets of several random splits overlap, and so do training sets, so that the scores of splits are not independent: an
interval of Student or a bootstrap over splits excludes 0 in 9 to 36 % of studies without any difference. Nadeau and
Bengio's corrected t (``polyclinic.statistics.paired_tests.corrected_t``) keeps 5 %, and Holm's correction is over the
differences of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from polyclinic.statistics.jackknife import Spread
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference, Question, corrected_t, paired

WHAT = (
    "Differences are paired by split; their intervals are Nadeau and Bengio's for repeated splits of the same patients. A "
    "difference is bold if Holm's correction over its table leaves p < 0.05; of all others these data show nothing."
)


def compared(
    differences: Mapping[str, Sequence[float]],
    test: float,
    train: float,
    question: Question = "difference",
    margin: float | None = None,
) -> dict[str, Difference]:
    """Return the tests of one table, corrected by Holm.

    Args:
        differences: By method, one difference per split.
        test: Fraction of patients in each test set.
        train: Fraction of patients in each training set.
        question: What is tested.
        margin: The margin of non-inferiority or equivalence.
    """
    return _corrected(
        {k: corrected_t(d, test, train, question=question, margin=margin) for k, d in differences.items()}
    )


def over_disjoint(
    differences: Mapping[str, Sequence[float]], question: Question = "difference", margin: float | None = None
) -> dict[str, Difference]:
    """Return the tests of one table over repetitions that have no patient in common, corrected by Holm.

    Args:
        differences: By method, one difference per repetition.
        question: What is tested.
        margin: The margin of non-inferiority or equivalence.
    """
    found = dict[str, Difference]()
    for key, values in differences.items():
        d = np.asarray(values, float)
        spread = Spread(float(d.var(ddof=1)) / len(d), len(d) - 1.0)
        test = paired(d.mean(keepdims=True), spread, int((d != 0).sum()), len(d), question=question, margin=margin)
        found[key] = replace(test, why=test.why.replace("patients", "repetitions"))
    return _corrected(found)


def _corrected(found: dict[str, Difference]) -> dict[str, Difference]:
    asked = [k for k, d in found.items() if d.p is not None]
    for k, p in zip(asked, holm([found[k].p or 0.0 for k in asked]), strict=True):
        found[k] = replace(found[k], adjusted=p)
    return found


def text_of(d: Difference, digits: int = 1) -> str:
    """Return a difference with its interval, bold if it is shown."""
    if d.value is None or d.low is None or d.high is None:
        return "" if d.value is None else f"{d.value:+.{digits}f} ({d.why})"
    text = f"{d.value:+.{digits}f} ({d.low:+.{digits}f} to {d.high:+.{digits}f})"
    return f"**{text}**" if d.verdict() in ("better", "worse") else text


def level_of(values: np.ndarray, digits: int = 1) -> str:
    """Return a mean over splits with its standard deviation over splits, which is no standard error."""
    return (
        f"{values.mean():.{digits}f} (SD {values.std(ddof=1):.{digits}f})"
        if len(values) > 1
        else f"{values.mean():.{digits}f}"
    )
