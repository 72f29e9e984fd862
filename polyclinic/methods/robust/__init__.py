"""Server end: corrupted clients."""
