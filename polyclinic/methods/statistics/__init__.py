"""Pooled statistics."""
