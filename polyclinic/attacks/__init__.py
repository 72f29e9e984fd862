"""Attacks on models and on methods, and audits built on them."""
