"""Site policies and privacy accounting."""
