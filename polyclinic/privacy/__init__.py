"""Differential privacy: clipping, noise, accounting, ledgers and budgets."""
