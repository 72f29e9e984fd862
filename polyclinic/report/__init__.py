"""The report of a run: one HTML page for readers and reviewers, and the same numbers as files."""

from polyclinic.report.report_builder import build_report

__all__ = ["build_report"]
