"""Statistics of a data set, and the preprocessing derived from them."""
