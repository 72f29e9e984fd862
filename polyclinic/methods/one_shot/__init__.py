"""Communication: one-shot merging."""
