"""Simulated data and scanners."""
