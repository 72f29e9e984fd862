"""Networks, and functions on their parameters."""
