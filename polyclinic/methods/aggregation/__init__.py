"""Server end: weight aggregation."""
