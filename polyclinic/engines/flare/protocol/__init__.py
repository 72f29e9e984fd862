"""What both ends agree on: messages, files, paths."""
