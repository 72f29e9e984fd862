"""Reader of DICOM series."""
