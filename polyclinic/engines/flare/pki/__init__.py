"""Certificates, keys and provisioning."""
