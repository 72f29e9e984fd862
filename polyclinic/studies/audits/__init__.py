"""Audits of a finished run."""
