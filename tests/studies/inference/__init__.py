"""Tests of the use of trained models."""
