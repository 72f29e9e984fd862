"""Engines on one machine."""
