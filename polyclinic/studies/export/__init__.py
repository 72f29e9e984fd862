"""Models and records for other tools."""
