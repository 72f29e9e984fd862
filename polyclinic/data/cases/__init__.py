"""Images of unequal shapes that stay on disk: one file per case, and views of one shape of them."""
