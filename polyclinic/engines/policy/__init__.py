"""What a site allows, and what it accounts for."""
