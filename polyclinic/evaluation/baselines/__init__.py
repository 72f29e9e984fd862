"""Baselines that no method may be below: the constant, and linear models."""
