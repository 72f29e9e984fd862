"""Client end: image harmonization."""
