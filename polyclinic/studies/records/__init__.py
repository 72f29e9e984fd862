"""Descriptions derived from a run."""
