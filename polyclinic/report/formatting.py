"""Formatting of numbers: few digits, true minus signs, intervals after values, a dash without a number."""

from collections.abc import Sequence

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.site_scores import decimals
from polyclinic.report.page_blocks import Cell
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.paired_tests import BETTER, UNDECIDED, WORSE, Difference

NONE = "–"
THIN = "\u202f"
SIGNIFICANCE = {
    BETTER: "significantly better",
    WORSE: "significantly worse",
    UNDECIDED: "not significant",
}
"""Verdicts on differences in words; those with a margin are shown as they are."""


def outcome(d: Difference) -> str:
    """Return the verdict of a comparison in words."""
    verdict = d.verdict()
    return SIGNIFICANCE.get(verdict, verdict)


def digits_of(metric: Metric) -> int:
    """Return the number of decimals of a metric."""
    return (
        1 if metric.unit in ("mm", "dB", "pixels", "ml", "mm²") else 2 if metric.name in ("mae", "rmse", "bias") else 3
    )


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Format as ``0.744``, ``−0.020``, or ``+0.031`` if signed."""
    if value is None:
        return NONE
    text = decimals(abs(value), digits)
    minus = value < 0 and float(text) != 0
    return ("−" if minus else "+" if signed and float(text) != 0 else "") + text


def interval(low: float | None, high: float | None, digits: int = 3, signed: bool = False) -> str:
    """Format as ``0.726–0.761``, or ``−0.020 to +0.051``."""
    if low is None or high is None:
        return NONE
    a, b = number(low, digits, signed), number(high, digits, signed)
    return f"{a} to {b}" if signed or low < 0 else f"{a}–{b}"


def with_interval(e: Estimate | Difference, digits: int = 3, signed: bool = False) -> str:
    """Format as ``0.744 (0.726–0.761)``; the value alone without an interval."""
    value = number(e.value, digits, signed)
    return value if e.low is None else f"{value} ({interval(e.low, e.high, digits, signed)})"


def p_value(p: float | None) -> str:
    """Format as ``0.012``, or ``<0.001``."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def count(n: int) -> str:
    """Format as ``4 235``, with a narrow no-break space."""
    return f"{n:,}".replace(",", THIN)


def many(n: int, one: str, several: str = "") -> str:
    """Format as ``1 site``, ``4 sites``."""
    return f"{count(n)} {one if n == 1 else several or one + 's'}"


def size(nbytes: float) -> str:
    """Format as ``28.9 MB``."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= step:
            return f"{nbytes / step:.3g}{THIN}{unit}"
    return f"{nbytes:.0f}{THIN}B"


def duration(seconds: float) -> str:
    """Format as ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f}{THIN}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60}{THIN}min"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Format as ``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""


def amount(value: float | None, digits: int = 3, signed: bool = False) -> Cell:
    """Return a number as a cell."""
    return Cell(number(value, digits, signed), value)


def whole(n: int | None) -> Cell:
    """Return a count as a cell."""
    return Cell(NONE if n is None else count(n), n)


def cell(e: Estimate | Difference | None, digits: int, signed: bool = False) -> Cell:
    """Return a value with its interval as a cell."""
    if e is None:
        return Cell(NONE)
    return Cell("none" if e.value is None else with_interval(e, digits, signed), e.value)
