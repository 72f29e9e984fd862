"""Tasks: losses, outputs and scores of the models that sites train."""
