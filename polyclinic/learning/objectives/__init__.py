"""Losses and objectives that several methods use."""
