"""Federated optimization."""
