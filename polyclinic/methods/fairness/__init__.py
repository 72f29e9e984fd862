"""Server end: domain shift and fairness."""
