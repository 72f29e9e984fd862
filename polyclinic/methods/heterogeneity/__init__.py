"""Client end: unequal machines."""
