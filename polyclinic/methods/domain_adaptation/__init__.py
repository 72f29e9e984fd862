"""Client end: domain adaptation."""
