"""Site side of a deployment: site agent, training process, approvals, setup."""
