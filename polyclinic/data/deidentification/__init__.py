"""Removal of identifying information from DICOM files."""
