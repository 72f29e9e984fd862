"""Compression of what travels, in both directions."""
