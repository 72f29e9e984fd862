"""Client end: multi-task learning."""
