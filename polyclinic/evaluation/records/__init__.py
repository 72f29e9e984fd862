"""Records of runs and predictions, and their reader."""
