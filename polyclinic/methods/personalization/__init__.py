"""Client end: domain-specific learning."""
