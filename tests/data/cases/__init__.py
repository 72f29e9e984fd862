"""Tests of the cases on disk."""
