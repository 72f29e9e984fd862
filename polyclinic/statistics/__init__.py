"""Estimates, intervals and tests of arrays, without knowledge of federations, runs or models.

The package lies below ``learning``, since tasks (AUC), data checks (Holm), attacks (DeLong's interval) and the
evaluation use the same statistics; none of them may import another.
"""
