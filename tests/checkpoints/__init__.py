"""A package, because other folders have a `test_mar.py`, too."""
