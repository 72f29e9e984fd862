"""Client end: data synthesis."""
