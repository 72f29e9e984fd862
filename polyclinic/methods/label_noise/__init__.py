"""Methods for sites whose labels are partly wrong."""
