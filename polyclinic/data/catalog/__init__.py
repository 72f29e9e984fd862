"""Catalog of public data sets."""
