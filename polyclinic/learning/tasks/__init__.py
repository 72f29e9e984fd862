"""Tasks: losses, outputs and scores of what a site learns."""
