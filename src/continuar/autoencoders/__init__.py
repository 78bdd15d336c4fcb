"""Training of tokenizers: autoencoders with a KL or a codebook, from images."""
