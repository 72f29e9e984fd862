"""Methods for sites with few or no examples of some classes."""
