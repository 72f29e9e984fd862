"""Compression of messages in both directions."""
