"""Attacks on models and methods, and audits based on them."""
