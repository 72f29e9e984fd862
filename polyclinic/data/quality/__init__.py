"""Quality checks of a site's data."""
