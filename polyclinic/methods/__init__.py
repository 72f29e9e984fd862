"""Federated methods: one file per paper, what the site does and what the server does side by side."""
