"""Checks of a site's data."""
