"""Generation: the plan, the eager loop, the fast engine, and the options."""
