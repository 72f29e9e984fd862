"""Core of federated learning: tensors, aggregates, methods and rounds. Depends on no engine, network or clock."""
