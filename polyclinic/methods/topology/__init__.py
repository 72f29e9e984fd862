"""Topologies other than a server with its sites."""
