"""Secure summation: the server learns the sum of what sites send, and nothing else of it.

``SecureSum`` is the transform: fixed-point numbers in a ring. The protocol below it masks them, and belongs to the
engine: ``protocol`` says how an engine runs it, ``memory`` runs all of it in one process.
"""

from polyclinic.secure_aggregation.fixed_point import SecureSum, Terms, contents, layout_of, reply_of, terms, vector_of

__all__ = ["SecureSum", "Terms", "contents", "layout_of", "reply_of", "terms", "vector_of"]
