"""Losses and objectives shared by several methods."""
