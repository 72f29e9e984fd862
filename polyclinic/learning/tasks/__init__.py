"""What is learned at a site: networks, losses, the training loop, the scoring. No federation in sight."""
