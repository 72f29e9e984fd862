"""Preprocessing of images and tables."""
