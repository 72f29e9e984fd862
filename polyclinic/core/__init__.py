"""What federated learning is, in tensors. Knows no engine, no network, no clock."""
