"""Server side of a deployment: setup, job queue, supervisor, run coordinator."""
