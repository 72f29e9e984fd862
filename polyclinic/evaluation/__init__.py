"""Metrics, intervals, tests and comparisons."""
