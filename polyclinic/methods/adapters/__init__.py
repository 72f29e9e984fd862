"""Federated training of low-rank adapters, with an aggregation that is right for products of factors."""
