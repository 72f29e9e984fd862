"""Protocol shared by server and sites: messages, files, paths."""
