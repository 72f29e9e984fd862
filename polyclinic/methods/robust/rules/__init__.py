"""Rules by which a server aggregates updates if some sites may be faulty or hostile.

A rule is a frozen dataclass over ``Updates``, the updates separate by site. ``methods.robust.robust_method`` applies
one to any method.
"""
