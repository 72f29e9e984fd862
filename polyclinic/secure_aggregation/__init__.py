"""Secure aggregation: the server learns only the sum of the sites' replies.

``SecureSum`` is the transform, which encodes numbers as integers in a ring. An engine runs the protocol that masks
them: ``client`` and ``server`` are its two sides, and ``in_memory`` runs it in one process.
"""

from polyclinic.secure_aggregation.fixed_point import SecureSum, Terms, contents, layout_of, reply_of, terms, vector_of

__all__ = ["SecureSum", "Terms", "contents", "layout_of", "reply_of", "terms", "vector_of"]
