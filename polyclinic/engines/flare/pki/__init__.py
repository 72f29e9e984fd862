"""Certificates, keys and startup kits."""
