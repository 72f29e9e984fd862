"""The report of a run: one page that a person reads and a reviewer checks, and the same numbers as files."""

from polyclinic.report.report_builder import build_report

__all__ = ["build_report"]
