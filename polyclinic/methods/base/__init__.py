"""Baselines and parts that methods are composed of."""
