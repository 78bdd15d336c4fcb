"""The fast engine: the same images as the eager one, with fewer and larger kernel launches."""
