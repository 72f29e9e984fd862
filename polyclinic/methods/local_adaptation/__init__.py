"""Methods that adapt a shared model at each site before it predicts there."""
