"""Rules by which a server makes one update of many, when some of the sites may be broken or hostile.

A rule is a frozen dataclass over ``Updates``, what the sites sent kept apart. ``methods.robust.robust_method`` puts one
under any method.
"""
